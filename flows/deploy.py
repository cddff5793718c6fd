"""Deploy: what deployments/ describes, made on a Prefect server or brought up to date; done again, nothing doubles.

Work pools first, then the block with the options of object stores, the deployments, and the automations.
"""

import os
import string
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from prefect.automations import Automation
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import StateType
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.states import AwaitingRetry
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from belt_tasks import storage
from belt_tasks.errors import BeltError, ConfigError
from flows.storage_block import options_of

FOLDER = Path(__file__).parents[1] / "deployments"
WORK_POOLS = ("cpu", "gpu")
NUMBERED_BY = {"id", "created", "updated"}


class DeploySettings(BaseSettings):
    """What differs from site to site; each is read from the environment, as BELT_CORPUS_URI and so on."""

    model_config = SettingsConfigDict(env_prefix="BELT_", extra="ignore", use_attribute_docstrings=True)

    corpus_uri: str = Field(min_length=1)
    """What is scored every night."""
    output_uri: str = Field(min_length=1)
    """Where the tables of predictions are."""
    labelled_uri: str = Field(min_length=1)
    """The labelled corpus to fine-tune on."""
    held_out_uri: str = Field(min_length=1)
    """The labelled corpus to compare checkpoints on; its documents are not in the one above."""
    encoder: str = Field(min_length=1)
    """What fine-tuning begins with: a local directory or a name on the hub."""
    models_uri: str = Field(min_length=1)
    """Where fine-tuned checkpoints, the registry and evaluations go."""
    checkpoint_uri: str | None = None
    """What it is scored with; None is the champion of the registry."""
    cron: str = "0 2 * * *"
    """When a night begins."""
    timezone: str = "UTC"
    """Where it does."""
    suffix: str = Field("", pattern=r"^[\w-]*$")
    """Of the deployments' names, where a server has several sites."""
    storage_block: str = "belt-storage"
    """The Secret block with the options of object stores; where there is none, an empty one is made."""
    storage_options: str | None = None
    """JSON to keep in that block, such as {"s3": {"key": ..., "secret": ...}}."""
    alert_block: str | None = None
    """TYPE/NAME of a notification block, such as slack-webhook/ops, that is told of failed and late runs."""

    def environment(self) -> dict[str, str]:
        """What prefect.yaml refers to.

        Raises:
            ConfigError: a place is none that belt knows.
        """
        values = self.model_dump(exclude={"storage_options", "alert_block"})
        values["checkpoint_uri"] = self.checkpoint_uri or storage.join(self.models_uri, "registry@champion")
        for name, value in values.items():
            if name.endswith("_uri"):  # as runs name them in the events that triggers wait for, wherever they run
                values[name] = storage.absolute(value)
        return {f"BELT_{name.upper()}": value for name, value in values.items()}


def read_settings() -> DeploySettings:
    """The site's settings, from the environment.

    Raises:
        ConfigError: some are missing or wrong; names them all.
    """
    try:
        return DeploySettings()
    except ValidationError as error:
        wrong = [(f"BELT_{'_'.join(map(str, each['loc'])).upper()}", each) for each in error.errors()]
        missing = [name for name, each in wrong if each["type"] in ("missing", "string_too_short")]
        others = [f"{name}: {each['msg']}" for name, each in wrong if name not in missing]
        told = [f"{', '.join(missing)} must be set; see deployments/README.md"] if missing else []
        raise ConfigError("\n".join(told + others)) from None


def deploy(settings: DeploySettings, folder: Path = FOLDER) -> list[str]:
    """Bring a Prefect server up to date.

    Args:
        settings: of the site.
        folder: with prefect.yaml and automations.yaml.

    Returns:
        Names of the deployments.

    Raises:
        ConfigError: there is no such folder, or a block is wrong.
        BeltError: the server refused it.
    """
    if not (folder / "prefect.yaml").exists():
        raise ConfigError(f"{folder}: no prefect.yaml there; deploy from a checkout of belt")
    with get_client(sync_client=True) as client:
        for name in WORK_POOLS:
            try:
                client.read_work_pool(name)
            except ObjectNotFound:
                client.create_work_pool(WorkPoolCreate(name=name, type="process"))
    _save_storage_block(settings)
    alert_block_id = None if settings.alert_block is None else _block_id(settings.alert_block)
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(  # noqa: S603 - Prefect's own command
        [*command, "--prefect-file", str(folder / "prefect.yaml")],
        env=os.environ | settings.environment(),
        cwd=folder.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BeltError(f"`prefect deploy` failed: {' '.join((done.stdout + done.stderr).split())[-1000:]}")
    for wanted in automations(alert_block_id, folder):
        _put_automation(wanted)
    described = yaml.safe_load((folder / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    return [deployment["name"].replace("{{ $BELT_SUFFIX }}", settings.suffix) for deployment in described]


def automations(alert_block_id: str | None, folder: Path = FOLDER) -> list[Automation]:
    """The automations to have; those that tell somebody only where there is a block to tell them by."""
    text = (folder / "automations.yaml").read_text(encoding="utf-8")
    nobody = "00000000-0000-0000-0000-000000000000"
    text = string.Template(text).safe_substitute(alert_block_id=alert_block_id or nobody)
    described: list[dict[str, Any]] = yaml.safe_load(text)
    return [
        Automation.model_validate(each)
        for each in described
        if alert_block_id is not None or all(action["type"] != "send-notification" for action in each["actions"])
    ]


def take_up(before: datetime) -> list[str]:
    """Schedule again the runs of belt's that were under way, where everything that works was started anew at a time.

    Args:
        before: when that was, with its time zone; runs whose state is younger are left alone.

    Returns:
        Their names.
    """
    kinds = [StateType.RUNNING, StateType.PENDING, StateType.CRASHED]  # one that crashed waited for the server
    under_way = FlowRunFilterState(type=FlowRunFilterStateType(any_=kinds))
    wanted = FlowRunFilter(state=under_way, tags=FlowRunFilterTags(all_=["belt"]))
    message = "Its worker was stopped with everything else; it goes on from its finished shards."
    taken = []
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=wanted):
            if run.state is not None and run.state.timestamp < before:
                client.set_flow_run_state(run.id, AwaitingRetry(message=message))
                taken.append(run.name)
    return taken


def _put_automation(wanted: Automation) -> None:
    """Make an automation or change what differs: one that is written anew forgets which runs it has an eye on."""
    with get_client(sync_client=True) as client:
        found = client.read_automations_by_name(wanted.name)
    if not found:
        wanted.create()
        return
    if not is_same(found[0], wanted):
        wanted.id = found[0].id
        wanted.update()


def is_same(found: AutomationCore, wanted: AutomationCore) -> bool:
    """Whether two automations do the same, whatever they are numbered by and in whatever order they name events."""
    return bool(_without_ids(found.model_dump()) == _without_ids(wanted.model_dump()))  # as JSON, sets have an order


def _without_ids(described: Any) -> Any:  # noqa: ANN401 - whatever a model holds
    if isinstance(described, dict):
        return {name: _without_ids(value) for name, value in described.items() if name not in NUMBERED_BY}
    return [_without_ids(each) for each in described] if isinstance(described, list) else described


def _save_storage_block(settings: DeploySettings) -> None:
    """Keep the given options; a block that is there stays as it is where none are given."""
    if settings.storage_options is None:
        try:
            Secret.load(settings.storage_block)
        except ValueError:
            Secret(value="{}").save(settings.storage_block)
        return
    if options_of(settings.storage_options) is None:
        raise ConfigError(  # what it is instead may be a secret
            'BELT_STORAGE_OPTIONS must be a JSON object of options by protocol, such as {"s3": {"key": ...}}'
        )
    Secret(value=settings.storage_options).save(settings.storage_block, overwrite=True)


def _block_id(slug: str) -> str:
    kind, _, name = slug.partition("/")
    with get_client(sync_client=True) as client:
        try:
            return str(client.read_block_document_by_name(name, kind).id)
        except ObjectNotFound as error:
            raise ConfigError(
                f"BELT_ALERT_BLOCK: no block {slug!r} on this Prefect server; it must be TYPE/NAME, such as "
                "slack-webhook/ops"
            ) from error
