"""Telemetry: what is scraped, pushed or read from a file is what a run did; nobody asked, nothing happens."""

import http.server
import logging
import pickle
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from belt_tasks import telemetry
from belt_tasks.errors import ConfigError, TransientError
from belt_tasks.milestones import tried_again
from belt_tasks.receipts import Counts
from belt_tasks.score_corpus import score_corpus
from belt_tasks.specs import CorpusSpec, ScoreSpec
from tests.conftest import labelled_rows

CPU = ScoreSpec(device="cpu", max_rejected_share=1.0)
SCORE = """
import sys
from belt_tasks.score_corpus import score_corpus
from belt_tasks.specs import CorpusSpec, ScoreSpec
score_corpus(*sys.argv[1:], CorpusSpec(), ScoreSpec(device="cpu", max_rejected_share=1.0))
"""


@pytest.fixture(autouse=True)
def meters(monkeypatch) -> Iterator[None]:
    """Those of a new process, by the environment as the test sets it; none is served or told after the test."""
    monkeypatch.setattr(telemetry.atexit, "register", lambda _: None)
    telemetry._meters_of.cache_clear()
    yield
    if telemetry._meters_of.cache_info().currsize and (made := telemetry._meters()) is not None:
        made.close()
    telemetry._meters_of.cache_clear()


@pytest.fixture
def corpus(write_corpus) -> str:
    """Two files; of 12 rows one has no text."""
    rows = labelled_rows(12, most_words=40)
    return write_corpus(
        rows.with_columns(text=pl.when(pl.col("doc_id") == "doc-0003").then(None).otherwise(pl.col("text"))),
        num_files=2,
    )


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Values by name and labels."""
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@contextmanager
def pushgateway() -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Takes what a Pushgateway takes; yields its address, and (method, path, text) of what came."""
    came = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            text = self.rfile.read(int(self.headers["Content-Length"])).decode()
            came.append((self.command, self.path, text))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_) -> None:
            return

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", came
        finally:
            server.shutdown()
            thread.join()


def check(found, manifest, output: str) -> None:
    """The metrics are those of the run."""
    run = manifest.run
    assert found["belt_documents_total", "score"] == run["num_documents"] == 11
    assert found["belt_tokens_total", "score"] == run["num_tokens"]
    assert found["belt_chunks_total", "score"] == run["num_chunks"]
    assert found["belt_rejected_rows_total", "text_null"] == 1
    assert found["belt_shards_total", "finished", "score"] == 2
    assert found["belt_shard_seconds_count", "score"] == 2
    assert found["belt_tokens_per_second", "score"] > 0
    finished_at = datetime.fromisoformat(run["finished_at"]).timestamp()
    assert found["belt_last_published_timestamp_seconds", output] >= finished_at


def test_a_run_can_be_scraped_while_it_lasts(monkeypatch, corpus, tiny_checkpoint, tmp_path):
    port, output = free_port(), str(tmp_path / "out")
    monkeypatch.setenv("BELT_METRICS_PORT", str(port))

    manifest = score_corpus(corpus, tiny_checkpoint, output, CorpusSpec(), CPU)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        check(samples(answer.read().decode()), manifest, output)


def test_a_batch_leaves_a_file(monkeypatch, corpus, tiny_checkpoint, tmp_path):
    file, output = tmp_path / "belt.prom", str(tmp_path / "out")
    monkeypatch.setenv("BELT_METRICS_TEXTFILE", str(file))

    subprocess.run([sys.executable, "-c", SCORE, corpus, tiny_checkpoint, output], check=True)
    first = samples(file.read_text())
    manifest = score_corpus(corpus, tiny_checkpoint, output, CorpusSpec(), CPU)  # has nothing to do
    check(first, manifest, output)
    again = samples(file.read_text())

    assert ("belt_shards_total", "finished", "score") not in again
    published = ("belt_last_published_timestamp_seconds", output)
    assert again[published] > first[published]
    assert [path.name for path in tmp_path.glob("belt*")] == ["belt.prom"]


def test_a_night_that_fails_still_says_when_the_last_was_published(
    monkeypatch, write_corpus, corpus, tiny_checkpoint, tmp_path
):
    file, output = tmp_path / "belt.prom", str(tmp_path / "out")
    published = ("belt_last_published_timestamp_seconds", output)
    before = score_corpus(corpus, tiny_checkpoint, output, CorpusSpec(), CPU)
    telemetry._meters_of.cache_clear()
    monkeypatch.setenv("BELT_METRICS_TEXTFILE", str(file))
    write_corpus(labelled_rows(3, seed=7).with_columns(pl.lit(None, pl.String).alias("text")))

    with pytest.raises(Exception, match="were rejected"):
        score_corpus(corpus, tiny_checkpoint, output, CorpusSpec(), ScoreSpec(device="cpu", max_rejected_share=0.0))
    telemetry._meters().close()  # as at the end of a process

    found = samples(file.read_text())
    assert found[published] == datetime.fromisoformat(before.run["finished_at"]).timestamp()
    assert found["belt_rejected_rows_total", "text_null"] >= 3


def test_a_pushgateway_is_told(monkeypatch, corpus, tiny_checkpoint, tmp_path):
    output = str(tmp_path / "out")
    with pushgateway() as (url, came):
        monkeypatch.setenv("BELT_METRICS_PUSHGATEWAY", url)
        monkeypatch.setenv("BELT_METRICS_INSTANCE", "nightly")
        manifest = score_corpus(corpus, tiny_checkpoint, output, CorpusSpec(), CPU)
        method, path, text = came[-1]

        assert (method, path) == ("POST", "/metrics/job/belt/instance/nightly")
        check(samples(text), manifest, output)


@given(st.dictionaries(st.sampled_from(["text_null", "doc_id_null"]), st.integers(0, 9)), st.integers(0, 9))
def test_counts_of_shards_add_up(reasons, num_documents):
    meters = telemetry.Meters(telemetry.TelemetrySettings())
    counts = Counts(num_documents=num_documents, rejected_by_reason=reasons)
    for _ in range(3):
        meters.count_rejected(counts)

    for reason, number in reasons.items():
        assert meters.registry.get_sample_value("belt_rejected_rows_total", {"reason": reason}) == 3 * number


def test_retries_and_failed_shards_are_counted(monkeypatch, tmp_path):
    file = tmp_path / "belt.prom"
    monkeypatch.setenv("BELT_METRICS_TEXTFILE", str(file))

    tried_again(TransientError("no answer"), delay_s=2)
    telemetry.shard_ended("score", "failed")

    found = samples(file.read_text())
    assert found["belt_retries_total",] == 1
    assert found["belt_shards_total", "failed", "score"] == 1


def test_no_run_fails_for_its_meters(monkeypatch, tmp_path, caplog):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("BELT_METRICS_PORT", str(taken.getsockname()[1]))
        monkeypatch.setenv("BELT_METRICS_TEXTFILE", str(tmp_path / "nowhere" / "belt.prom"))
        monkeypatch.setenv("BELT_METRICS_PUSHGATEWAY", f"http://user:hush@127.0.0.1:{free_port()}")
        with caplog.at_level(logging.WARNING):
            telemetry.published("somewhere", datetime.now(UTC))

    assert [message.split(":")[0] for message in caplog.messages] == ["metrics"] * 3
    assert "Address already in use" in caplog.messages[0]
    assert "hush" not in caplog.text


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PORT", "many", "BELT_METRICS_PORT: Input should be a valid integer"),
        ("PORT", "0", "BELT_METRICS_PORT: Input should be greater than or equal to 1"),
        ("PUSHGATEWAY", "host:9091", "BELT_METRICS_PUSHGATEWAY: String should match pattern"),
    ],
)
def test_wrong_settings_are_named(monkeypatch, name, value, message):
    monkeypatch.setenv(f"BELT_METRICS_{name}", value)

    with pytest.raises(ConfigError, match=message):
        telemetry.start()


def test_where_nobody_asks_nothing_is_imported(corpus, tiny_checkpoint, tmp_path):
    code = f"{SCORE}\nsys.exit('prometheus_client' in sys.modules)"

    subprocess.run([sys.executable, "-c", code, corpus, tiny_checkpoint, str(tmp_path / "out")], check=True)

    assert {path.name for path in Path(tmp_path).iterdir()} == {"corpus", "out"}


def test_what_a_worker_would_tell_is_told_elsewhere(monkeypatch, tmp_path):
    file, relayed = tmp_path / "belt.prom", []
    monkeypatch.setenv("BELT_METRICS_TEXTFILE", str(file))
    counts = Counts(num_documents=5, num_tokens=50, num_chunks=6, rejected_by_reason={"text_null": 2})

    with telemetry.relayed(relayed.append):
        telemetry.shard_ended("score", "finished", counts, seconds=2.0)
        telemetry.rows_rejected(counts)
        telemetry.tried_again()
        telemetry.published("/out", datetime(2026, 1, 2, tzinfo=UTC))
    assert not file.exists()
    for call in pickle.loads(pickle.dumps(relayed)):  # noqa: S301 - its own
        telemetry.tell(call)

    found = samples(file.read_text())
    assert found["belt_documents_total", "score"] == 5
    assert found["belt_rejected_rows_total", "text_null"] == 4
    assert found["belt_retries_total",] == 1
    assert found["belt_last_published_timestamp_seconds", "/out"] > 0


@pytest.mark.parametrize("address", ["http://localhost:abc", "http://[::1", "http://127.0.0.1:1"])
def test_no_address_of_a_pushgateway_stops_a_run(monkeypatch, caplog, address):
    monkeypatch.setenv("BELT_METRICS_PUSHGATEWAY", address)

    telemetry.published("/out", datetime(2026, 1, 2, tzinfo=UTC))

    assert "metrics: cannot tell the Pushgateway" in caplog.text
    assert address not in caplog.text


def test_a_wrong_address_is_refused_without_being_told(monkeypatch):
    monkeypatch.setenv("BELT_METRICS_PUSHGATEWAY", "user:hush@push.example.com:9091")

    with pytest.raises(ConfigError, match="BELT_METRICS_PUSHGATEWAY: String should match pattern") as error:
        telemetry.start()

    assert "hush" not in str(error.value)
