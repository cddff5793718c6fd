"""The runbooks of deployments/README.md, typed in as they stand there, from the first deployment to the last."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from belt_tasks import object_stores, registry, score_tables
from deployments.services import Stack
from tests.rehearsal.rehearsal import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

README = (ROOT / "deployments" / "README.md").read_text(encoding="utf-8")
# installed already, here
PRELUDE = f'make() {{ command make -o .venv/stack BIN={shlex.quote(str(Path(sys.executable).parent))} "$@"; }}\n'
STEP = "=== "


@pytest.fixture
def folder(tmp_path) -> Iterator[Path]:
    """Of a stack that is made here, and ends with the test."""
    folder = tmp_path / "stack"
    yield folder
    typed("make down", folder)


def typed(commands: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What a shell says to commands, one after the other until one fails."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "BELT_", "AWS_"))}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", PRELUDE + commands],
        env=clean | {"BELT_STACK": str(folder), "COLUMNS": "200"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def test_every_command_does_what_its_runbook_says(folder):
    blocks = re.findall(r"^## (.+?)$|^```sh\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    script = "".join(f"echo '{STEP}{title}'\n" if title else block for title, block in blocks)

    done = typed(script, folder)

    assert done.returncode == 0, done.stdout[-8000:]
    said = dict(part.split("\n", 1) for part in done.stdout.split(STEP)[1:])
    assert "Deployed score-nightly, " in said["First deployment"]
    runs = re.compile(r"^\| [0-9a-f]{16} \| (\w+) \| score \|", re.MULTILINE)
    assert runs.findall(said["First deployment"]) == ["shown"]
    assert re.search(r"^\| [0-9a-f]{64} \| challenger, champion \|", said["Change the model"], re.MULTILINE)
    assert "Deployed score-nightly-reviews, " in said["Add a corpus"]
    assert re.search("problem: 0$", said["A night failed"], re.MULTILINE)
    assert len(runs.findall(said["A night failed"])) == 2
    assert re.search(r"^Version: +3\.8", said["Upgrade Prefect"], re.MULTILINE)
    object_stores.configure(Stack.at(folder).storage_options)
    try:
        _, second, back = registry.history("s3://belt/models/registry")[-3:]
        shown = score_tables.shown("s3://belt/predictions")
    finally:
        object_stores.configure({})
    assert back.to_digest == second.from_digest
    assert shown.manifest.run["checkpoint_digest"] == second.from_digest
