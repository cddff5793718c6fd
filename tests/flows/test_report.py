"""Reports as the flow makes them: a killed attempt owes none, and one event tells of drift."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from belt_tasks import report, statistics
from belt_tasks.publishing import Manifest, RunRef
from belt_tasks.report import ScoreReport
from belt_tasks.specs import ChunkSpec, CorpusSpec, DriftSpec, ScoreSpec
from flows import events
from flows.score import score
from tests.conftest import words
from tests.flows.conftest import events_of
from tests.flows.test_flows import artifact, task_names

ROOT = Path(__file__).parents[2]
SPEC = ScoreSpec(device="cpu", chunks=ChunkSpec(chunk_size=30, stride=30))
LIMITS = DriftSpec(min_documents=20)


@pytest.fixture
def corpus(tmp_path):
    """Thirty documents."""
    write(tmp_path / "corpus", "a", most_words=30)
    return tmp_path / "corpus"


def write(folder: Path, name: str, *, most_words: int) -> None:
    """Thirty documents of other lengths."""
    folder.mkdir(exist_ok=True)
    texts = [words(most_words * (i + 1) // 30, seed=i) for i in range(30)]
    pl.DataFrame({"doc_id": [f"{name}-{i}" for i in range(30)], "text": texts}).write_parquet(
        folder / f"{name}.parquet"
    )


def run_of(manifest: Manifest) -> RunRef:
    return RunRef(output_uri=manifest.run["output_uri"], run_id=manifest.run["run_id"])


def night(corpus, checkpoint: str, output, **more):
    return score(str(corpus), checkpoint, str(output), CorpusSpec(), SPEC, drift=LIMITS, **more)


def drift_events(client, output, *, at_least: int) -> list:
    """The events of an output that the server keeps, once it keeps so many, or after a while."""
    return events_of(client, events.DRIFT, events.resource_id(str(output)), at_least=at_least)


def test_a_scoring_leads_to_its_report(corpus, tiny_checkpoint, tmp_path, client):
    output = tmp_path / "out"

    state = night(corpus, tiny_checkpoint, output, return_state=True)

    done = report.read_report(run_of(state.result()))
    assert done.is_reference
    assert all(Path(uri).is_file() for uri in (done.report_uri, done.quality_uri, done.statistics_uri))
    told = artifact(client, state, "score-summary")
    assert "This run is what later ones are compared with." in told
    for uri in (done.report_uri, done.quality_uri, done.run.uri, f"{output}/tables/predictions"):
        assert f"`{uri}` ([open](file://{uri}))" in told


def test_a_refused_run_says_where_its_rejected_rows_are(corpus, tiny_checkpoint, tmp_path, client):
    pl.DataFrame({"doc_id": ["x", None], "text": [None, "fox"]}).write_parquet(corpus / "b.parquet")

    state = night(corpus, tiny_checkpoint, tmp_path / "out", return_state=True)

    refused = state.result(raise_on_failure=False)
    assert state.is_failed()
    assert Path(refused.quality_uri).is_file()
    told = artifact(client, state, "score-refused")
    assert "2 of 32 rows (6.2%) were rejected" in told
    assert f"- data quality: `{refused.quality_uri}` ([open](file://{refused.quality_uri}))" in told


def test_a_run_of_nothing_changed_neither_counts_nor_draws_again(
    corpus, tiny_checkpoint, tmp_path, monkeypatch, client
):
    night(corpus, tiny_checkpoint, tmp_path / "out")
    monkeypatch.setattr(statistics, "of_run", lambda *_: pytest.fail("counted again"))

    state = night(corpus, tiny_checkpoint, tmp_path / "out", return_state=True)

    assert state.is_completed()
    assert {name.rsplit("-", 1)[0] for name in task_names(client, state)} == {
        "plan_scoring",
        "publish_tables",
        "score_report",
    }
    assert "This run is what later ones are compared with." in artifact(client, state, "score-summary")


def test_drift_is_told_by_one_event(corpus, tiny_checkpoint, tmp_path, client):
    output = tmp_path / "out"
    night(corpus, tiny_checkpoint, output)
    write(corpus, "b", most_words=600)
    state = night(corpus, tiny_checkpoint, output, return_state=True)
    done = report.read_report(run_of(state.result()))
    assert done.has_drifted
    assert done.is_announced
    for _ in range(2):
        night(corpus, tiny_checkpoint, output)
    write(corpus, "c", most_words=700)
    later = report.read_report(run_of(night(corpus, tiny_checkpoint, output)))

    second, first = drift_events(client, output, at_least=2)

    assert first.resource.id == f"belt.output.{output}"
    assert first.payload == {
        "run_id": done.run.run_id,
        "checkpoint_digest": done.checkpoint_digest,
        "scoring_fingerprint": done.scoring_fingerprint,
        "data_version": done.data_version,
        "verdict": done.verdict,
        "measures": [measure.model_dump() for measure in done.drift.measures],
        "report_uri": done.report_uri,
    }
    assert "prefect.flow-run" in str(first.related)
    assert second.payload["run_id"] == later.run.run_id
    assert second.payload["data_version"] != first.payload["data_version"]
    assert f"{done.verdict}." in artifact(client, state, "score-summary")


def test_without_drift_there_is_no_event(corpus, tiny_checkpoint, tmp_path, client):
    night(corpus, tiny_checkpoint, tmp_path / "out")
    write(corpus, "b", most_words=30)
    night(corpus, tiny_checkpoint, tmp_path / "out")
    write(corpus, "c", most_words=600)
    night(corpus, tiny_checkpoint, tmp_path / "out")

    (only,) = drift_events(client, tmp_path / "out", at_least=1)  # the last one's: events are kept in their order

    assert "lengths" in str(only.payload["measures"])


KILLED = """
import os, signal, sys
from belt_tasks import pages, report, score_tables, storage
from flows import events, tasks
from flows.score import score
from tests.flows.test_report import LIMITS, SPEC, CorpusSpec

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

corpus, checkpoint, output, when = sys.argv[1:]
really, follow = storage.write_bytes, score_tables._follow
match when:
    case "predictions shown":
        score_tables._follow = lambda run, *rest: follow(run, *rest) if report.read_report(run) else kill()
    case "tables shown":
        report._left_out = kill
    case "pages written":
        events._emit = kill
    case "event sent":
        storage.write_bytes = lambda uri, data: kill() if uri.endswith("report.json") else really(uri, data)
score(corpus, checkpoint, output, CorpusSpec(), SPEC, drift=LIMITS)
"""


@pytest.mark.parametrize(
    ("when", "corpus_changes"),
    [
        ("predictions shown", False),
        ("tables shown", False),
        ("pages written", False),
        ("event sent", False),
        ("predictions shown", True),
        ("event sent", True),
    ],
)
def test_whenever_an_attempt_is_killed_the_next_reports_and_the_server_keeps_one_event(
    when, corpus_changes, corpus, tiny_checkpoint, tmp_path, client
):
    output = tmp_path / "out"
    night(corpus, tiny_checkpoint, output)
    write(corpus, "b", most_words=600)
    command = [sys.executable, "-c", KILLED, str(corpus), tiny_checkpoint, str(output), when]
    killed = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if corpus_changes:
        write(corpus, "c", most_words=30)

    last = night(corpus, tiny_checkpoint, output)

    reports = [
        ScoreReport.model_validate_json(path.read_bytes()) for path in sorted(output.glob("runs/*/report/report.json"))
    ]
    assert len(reports) == 2 + corpus_changes
    assert report.read_report(run_of(last)) in reports
    (drifted,) = (each for each in reports if each.has_drifted)
    assert drifted.is_announced
    (event,) = drift_events(client, output, at_least=1)
    assert event.payload["run_id"] == drifted.run.run_id
