"""What deployments/README.md tells people to type exists: deployments, commands, targets and settings."""

import re
from pathlib import Path

import yaml

from flows.cli import app
from flows.deploy import DeploySettings

ROOT = Path(__file__).parents[2]
README = (ROOT / "deployments" / "README.md").read_text(encoding="utf-8")
SHELL = "\n".join(re.findall(r"^```sh\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL))


def described() -> dict[str, str]:
    """Names of the deployments, with their flows."""
    deployments = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    return {each["name"].partition("{{")[0]: each["entrypoint"] for each in deployments}


def test_every_deployment_that_is_run_is_described_and_listed():
    run = set(re.findall(r"prefect deployment run \S+?/([\w-]+)", SHELL))
    listed = set(re.findall(r"^\| `[\w-]+/([\w-]+)` \|", README, flags=re.MULTILINE))

    assert run - {"score-nightly-reviews"} <= described().keys()
    assert listed == described().keys()


def test_every_command_and_target_is_there():
    groups = {group.name for group in app.registered_groups}
    commands = {(each.name or each.callback.__name__).replace("_", "-") for each in app.registered_commands} | groups
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))

    assert set(re.findall(r"^belt ([\w-]+)", SHELL, flags=re.MULTILINE)) <= commands
    assert set(re.findall(r"\bmake (?:-s )?([a-z-]+)", SHELL)) <= targets


def test_every_setting_is_explained():
    explained = set(re.findall(r"`BELT_(\w+)`", README)) - {"PREFECT_LOGIN", "REPORT_LINK_HOURS"}

    assert {name.lower() for name in explained} == DeploySettings.model_fields.keys()
