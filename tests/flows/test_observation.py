"""Where logs of commands and flow runs go: nowhere unless asked, as JSON lines, and to Prefect with the flow run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

BELT = str(Path(sys.executable).parent / "belt")
TO_PREFECT = {
    "PREFECT_LOGGING_TO_API_ENABLED": "true",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "belt_tasks",
    "PREFECT_LOGGING_LEVEL": "INFO",
}
# a listener is called in the threads that do the work
FLOW = """
import logging, sys, threading
from belt_tasks import progress
from belt_tasks.specs import CorpusSpec, ScoreSpec
from flows.score import score
log = logging.getLogger("belt_tasks.probe")
with progress.listen(lambda stage, *_: log.info("in %s", threading.current_thread().name)):
    state = score(*sys.argv[1:], CorpusSpec(), ScoreSpec(device="cpu", max_rejected_share=1.0), return_state=True)
print(state.state_details.flow_run_id)
"""


def run(*command: str, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, env=os.environ | more, capture_output=True, text=True, check=False)


@pytest.fixture
def arguments(labelled_corpus, tiny_checkpoint, tmp_path) -> tuple[str, ...]:
    return ("score", labelled_corpus, "--checkpoint", tiny_checkpoint, "--output", str(tmp_path / "out"))


def test_prefect_shows_the_log_with_the_flow_run(client, labelled_corpus, tiny_checkpoint, tmp_path):
    done = run(sys.executable, "-c", FLOW, labelled_corpus, tiny_checkpoint, str(tmp_path / "out"), **TO_PREFECT)
    assert done.returncode == 0, done.stderr
    flow_run_id = UUID(done.stdout.strip())

    found = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id])), limit=200)

    of_belt = [record for record in found if record.name.startswith("belt_tasks")]
    assert {record.flow_run_id for record in of_belt} == {flow_run_id}
    finished = [record for record in of_belt if " finished: " in record.message]
    assert len(finished) == 3
    assert len({record.task_run_id for record in finished}) == 3
    assert any(record.message.endswith(" published, version 0 of predictions") for record in of_belt)
    in_threads = [record for record in of_belt if record.message.startswith("in ahead")]
    assert {record.task_run_id for record in in_threads} == {record.task_run_id for record in finished}


def test_a_mistake_is_a_sentence_in_the_log_of_its_run(client, tiny_checkpoint, tmp_path):
    where = str(tmp_path / "nowhere")
    done = run(sys.executable, "-c", FLOW, where, tiny_checkpoint, str(tmp_path / "out"), **TO_PREFECT)
    assert done.returncode == 0, done.stderr
    flow_run_id = UUID(done.stdout.strip())

    found = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id])), limit=200)

    of_mistake = [record.message for record in found if where in record.message]
    assert any("Encountered exception during execution: ConfigError(" in message for message in of_mistake)
    assert not [record.message for record in found if "Traceback" in record.message]
    assert "Traceback" not in done.stderr


CONTRADICTION = """
import sys
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.logging.loggers import flow_run_logger
from flows.score import score
with get_client(sync_client=True) as client:
    run = client.create_flow_run(score, parameters=dict(
        corpus_uri="a", checkpoint_uri="b", output_uri="c", spec={"full": True, "publish_every": 5}
    ) if sys.argv[1] == "spec" else {"corpus_uri": "a"})
print(run.id, flush=True)
run_flow(score, flow_run=run, error_logger=flow_run_logger(run, score))
"""


@pytest.mark.parametrize(("which", "words"), [("spec", "publish_every"), ("missing", "checkpoint_uri")])
def test_parameters_that_contradict_each_other_are_a_sentence_too(client, which, words):
    done = run(sys.executable, "-c", CONTRADICTION, which, **TO_PREFECT)
    flow_run_id = UUID(done.stdout.strip())

    found = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id])), limit=200)

    assert any(words in record.message for record in found)
    assert not [record.message for record in found if "Traceback" in record.message]


@pytest.mark.parametrize("how", ["option", "environment"])
def test_a_command_writes_json_lines_alone(arguments, how):
    given = ["--log-format", "json"] if how == "option" else []
    done = run(BELT, *given, *arguments, **({} if given else {"BELT_LOG_FORMAT": "json"}))
    refused = run(BELT, *given, *arguments[:-1], "/proc/nothing", **({} if given else {"BELT_LOG_FORMAT": "json"}))

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("## score: 35 documents")
    told = [json.loads(line) for line in done.stderr.splitlines()]
    shards = [record for record in told if "shard" in record]
    assert len(shards) == 6
    assert len({record["flow_run_id"] for record in shards}) == 1
    assert all({"timestamp", "level", "logger", "message", "flow_run_id"} <= record.keys() for record in told)
    # a checkpoint is loaded before it is known which run it is for
    assert all("run_id" in record for record in told if not record["message"].startswith("loaded checkpoint"))
    assert refused.returncode == 1
    assert json.loads(refused.stderr.splitlines()[-1])["level"] == "ERROR"


def test_a_command_that_is_not_asked_stays_quiet(arguments):
    done = run(BELT, *arguments)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("## score: 35 documents")


def test_a_verbose_command_shows_milestones(arguments):
    done = run(BELT, "--verbose", *arguments)

    assert done.returncode == 0
    assert " planned: 3 shards and 35 rows to score" in done.stderr
    assert " published, version 0 of predictions" in done.stderr


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("BELT_LOG_FORMAT", "xml", "log format must be text or json, got 'xml'"),
        ("BELT_METRICS_PORT", "many", "BELT_METRICS_PORT: Input should be a valid integer"),
    ],
)
def test_wrong_settings_end_a_command_before_it_works(arguments, variable, value, message):
    done = run(BELT, *arguments, **{variable: value})

    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {message}")
