"""A person's approval: the process ends while the run waits, and a later one finds all that was done."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import psutil
import pytest
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.flow_runs import resume_flow_run

from belt_tasks import promotion, registry
from flows.promote import promote
from tests.flows.test_promote import GATE, SPEC, digest, held_out, models  # noqa: F401 - fixtures

ROOT = Path(__file__).parents[2]
LONGEST_S = 120
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served(prefect_server, tmp_path_factory) -> Iterator[None]:
    """Runs of the deployments in tests/flows/served.py are executed, each in a process of its own."""
    environment = os.environ | {"PREFECT_RUNNER_POLL_FREQUENCY": "1", "PREFECT_API_URL": prefect_server}
    log = tmp_path_factory.mktemp("served") / "log"
    with log.open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.flows.served"], cwd=ROOT, env=environment, stdout=said, stderr=said
        )
    try:
        yield
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        for child in children:
            child.kill()


def start(name: str, parameters: dict[str, object]) -> UUID:
    """A run of a deployment, which may not be there yet."""
    give_up_at = time.monotonic() + LONGEST_S
    while True:
        try:
            return run_deployment(f"{name}/served", parameters=parameters, timeout=0).id
        except ObjectNotFound:
            if time.monotonic() > give_up_at:
                raise
            time.sleep(0.2)


def wait(client, flow_run_id: UUID, names: set[str]):
    """The run, in a state of one of these names."""
    give_up_at = time.monotonic() + LONGEST_S
    while time.monotonic() < give_up_at:
        run = client.read_flow_run(flow_run_id)
        if run.state.name in names:
            return run
        assert not run.state.is_final(), run.state
        time.sleep(0.2)
    raise AssertionError(f"not {names} within {LONGEST_S} s, but {run.state}")


@pytest.fixture
def asked(served, client, models, held_out, tmp_path):  # noqa: ARG001, F811 - runs are executed; fixtures
    """A run that waits for a person, with a poor champion and a challenger, by name."""
    registry_uri, output_uri = str(tmp_path / "registry"), str(tmp_path / "out")
    promote(models["poor"], registry_uri, held_out, output_uri, spec=SPEC, gate=GATE)

    def ask(name, gate=GATE):
        parameters = {
            "challenger_uri": models[name],
            "registry_uri": registry_uri,
            "corpus_uri": held_out,
            "output_uri": output_uri,
            "spec": SPEC.model_dump(),
            "gate": gate.model_dump(),
            "approval": "person",
        }
        flow_run_id = start("promote", parameters)
        wait(client, flow_run_id, {"Suspended"})
        return flow_run_id, registry_uri

    return ask


def written(folder: str) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()}


def test_a_person_says_yes(asked, client, models, tmp_path):  # noqa: F811 - a fixture
    flow_run_id, registry_uri = asked("good")
    assert registry.find(registry_uri, "champion").to_digest == digest(models["poor"])
    (decision,) = {path.stem for path in (tmp_path / "registry" / "decisions").glob("*")} - first_decision(registry_uri)
    wanted = ArtifactFilter(key=ArtifactFilterKey(any_=["promote-decision"]))
    assert any(decision in artifact.data for artifact in client.read_artifacts(artifact_filter=wanted))
    before = written(str(tmp_path))

    resume_flow_run(flow_run_id, run_input={"approve": True, "reason": "looked at 50 of them", "who": "ann"})
    run = wait(client, flow_run_id, {"Completed"})

    entry = registry.find(registry_uri, "champion")
    assert (entry.to_digest, entry.who, entry.why) == (digest(models["good"]), "ann", "looked at 50 of them")
    assert entry.decision == decision
    assert promotion.read_decision(registry_uri, decision).decision == "promote"
    scores = {path: changed for path, changed in before.items() if path.endswith(".parquet")}
    assert scores
    assert scores.items() <= written(str(tmp_path)).items()  # nothing was scored a second time
    assert {path for path in written(str(tmp_path)) if path.endswith(".parquet")} == scores.keys()
    assert run.run_count == 1  # waiting for a person is no failed attempt


def first_decision(registry_uri: str) -> set[str | None]:
    return {entry.decision for entry in registry.history(registry_uri)}


def test_a_person_says_no(asked, client, models):  # noqa: F811 - a fixture
    flow_run_id, registry_uri = asked("good")

    resume_flow_run(flow_run_id, run_input={"approve": False, "reason": "too risky", "who": "ann"})
    wait(client, flow_run_id, {"Completed"})

    assert registry.find(registry_uri, "champion").to_digest == digest(models["poor"])
    assert registry.find(registry_uri, "challenger").to_digest == digest(models["good"])


def test_a_person_may_promote_what_the_gate_holds(asked, client, models):  # noqa: F811 - a fixture
    flow_run_id, registry_uri = asked("other", GATE.model_copy(update={"max_recall_drop": None}))

    resume_flow_run(flow_run_id, run_input={"approve": True, "reason": "it is smaller", "who": "bob"})
    wait(client, flow_run_id, {"Completed"})

    entry = registry.find(registry_uri, "champion")
    assert (entry.to_digest, entry.who) == (digest(models["other"]), "bob")
    assert promotion.read_decision(registry_uri, entry.decision).decision == "hold"
