"""Logs: a record knows what the work is about in whichever thread it is made, and is one line of JSON."""

import json
import logging
import re
import threading
from pathlib import Path

import joblib
import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import belt_tasks
from belt_tasks import logs, progress, workers
from belt_tasks.errors import ConfigError, ShardError
from belt_tasks.pipeline import ahead, behind
from belt_tasks.score_corpus import score_corpus
from belt_tasks.specs import CorpusSpec, ScoreSpec
from belt_tasks.threads import Threads
from tests.conftest import labelled_rows

log = logging.getLogger("belt_tasks.somewhere")
CPU = ScoreSpec(device="cpu", max_rejected_share=1.0)


@pytest.fixture
def written(capsys):
    """Records written as JSON since the last call."""
    logs.write_json()
    logging.getLogger("belt_tasks.milestones").setLevel(logging.NOTSET)
    yield lambda: [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    logs.stop_json()


@given(
    st.lists(st.dictionaries(st.sampled_from(["run_id", "shard", "flow_run_id"]), st.text(), min_size=1), max_size=4)
)
def test_fields_are_those_of_the_blocks_around(layers):
    seen = []

    def enter(rest, expected) -> None:
        seen.append(dict(logs.fields()) == expected)
        if rest:
            with logs.about(**rest[0]):
                enter(rest[1:], expected | rest[0])
            seen.append(dict(logs.fields()) == expected)

    enter(layers, {})

    assert all(seen)


def test_threads_know_what_their_caller_is_about():
    with logs.about(shard="a"), Threads(2) as threads:
        first = threads.submit(logs.fields)
        with logs.about(shard="b"):
            later = list(threads.map(lambda _: logs.fields()["shard"], range(4)))

    assert first.result() == {"shard": "a"}
    assert later == ["b"] * 4


def test_stages_that_run_beside_each_other_do_too():
    behind_it = []

    def items():
        for _ in range(3):
            yield threading.current_thread().name, logs.fields()["shard"]

    with (
        logs.about(shard="a"),
        ahead(items(), most=2) as ready,
        behind(lambda _: behind_it.append(logs.fields()["shard"]), most=2) as hand_over,
    ):
        found = list(ready)
        for item in found:
            hand_over(item)

    assert found == [("ahead_0", "a")] * 3
    assert behind_it == ["a"] * 3


def test_workers_do_too(monkeypatch):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)

    class Encoder:
        device = torch.device("cpu")
        batch_tokens = 1
        pads = False

        def encode(self, batch):
            seen.append((threading.current_thread().name.split("_")[0], logs.fields().get("shard")))
            return torch.zeros(len(batch), 1)

    class Batch:
        input_ids_T = np.zeros(1)  # noqa: N815 - as in belt_tasks

        def __len__(self) -> int:
            return 1

    seen = []
    try:
        with logs.about(shard="a"):
            workers.encode_all(Encoder(), [np.array([i]) for i in range(4)], lambda _: Batch(), on_done=lambda _: None)
    finally:
        torch.set_num_threads(num_threads)

    assert seen == [("encode", "a")] * 4


def test_every_pool_is_such():
    """But for a thread that waits for the end of another process, and tells nothing."""
    for path in Path(belt_tasks.__file__).parent.glob("*.py"):
        assert path.name in ("threads.py", "data_parallel.py") or not re.search(
            r"ThreadPoolExecutor|threading\.Thread\(", path.read_text()
        ), path


@given(st.text(), st.dictionaries(st.sampled_from(["num_documents", "seconds"]), st.integers() | st.floats(0, 1e6)))
def test_a_record_is_one_line(message, counted):
    record = logging.LogRecord("belt_tasks.x", logging.INFO, "x.py", 1, "%s", (message,), None)
    record.__dict__.update(counted)
    (handler,) = [logs._JsonLines()]
    with logs.about(run_id="0123", shard="ab"):
        handler.filter(record)
    text = handler.format(record)

    assert "\n" not in text
    told = json.loads(text)
    assert told.pop("timestamp").endswith("+00:00")
    expected = {"level": "INFO", "logger": "belt_tasks.x", "message": message, "run_id": "0123", "shard": "ab"}
    assert told == expected | counted


def test_json_is_written_once_and_nowhere_else(written, monkeypatch):
    elsewhere = []
    handler = logging.Handler()
    handler.emit = lambda record: elsewhere.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    logs.write_json()  # again

    with logs.about(shard="a"):
        log.info("one", extra={"num_documents": 3})
        log.warning("two", extra={"shard": "its own"})
        log.debug("nothing")

    assert [(told["message"], told["shard"]) for told in written()] == [("one", "a"), ("two", "its own")]
    assert elsewhere == []
    assert logs.writes_json()
    logs.stop_json()
    assert not logs.writes_json()
    log.warning("three")
    assert elsewhere == ["three"]


def test_a_traceback_stays_in_its_line(written):
    log.error("failed", exc_info=ValueError("with\nlines"))

    (told,) = written()
    assert told["exc_info"] == "ValueError: with\nlines"


def test_a_format_that_is_not_known():
    with pytest.raises(ConfigError, match="log format must be text or json, got 'xml'"):
        logs.checked_format("xml")


def test_a_run_tells_its_milestones(written, write_corpus, tiny_checkpoint, tmp_path):
    rows = labelled_rows(12, most_words=40).with_columns(
        text=pl.when(pl.col("doc_id") == "doc-0003").then(None).otherwise(pl.col("text"))
    )
    corpus = write_corpus(rows, num_files=3)

    # a listener is called in the threads that do the work
    with progress.listen(lambda stage, *_: log.info("at %s", stage, extra={"at": threading.current_thread().name})):
        manifest = score_corpus(corpus, tiny_checkpoint, str(tmp_path / "out"), CorpusSpec(), CPU)
    told = written()

    run_id = manifest.run["run_id"]
    in_threads = [record for record in told if record.get("at", "").startswith("ahead")]
    assert len(in_threads) >= 3
    assert all(record["run_id"] == run_id and record["shard"] for record in in_threads)
    milestones = [record for record in told if record["logger"] == "belt_tasks.milestones"]
    assert all(record["run_id"] == run_id for record in milestones)
    words = [re.sub(r"(run|shard) [0-9a-f]{16}", r"\1", record["message"]).split(":")[0] for record in milestones]
    assert words == [
        "run planned",
        *["shard started", "shard finished"] * 3,
        "run",
        "run published, version 0 of predictions",
    ]
    planned, finished = milestones[0], [record for record in milestones if record.get("outcome") == "finished"]
    assert (planned["num_shards"], planned["num_rows"], planned["num_new"]) == (3, 11, 11)
    assert len({record["shard"] for record in finished}) == 3
    for name in ("num_documents", "num_tokens", "num_chunks"):
        assert sum(record[name] for record in finished) == manifest.run[name]
    assert (milestones[-2]["num_rejected"], milestones[-2]["rejected_by_reason"]) == (1, {"text_null": 1})
    assert milestones[-2]["rejected_share"] == pytest.approx(1 / 12)

    score_corpus(corpus, tiny_checkpoint, str(tmp_path / "out"), CorpusSpec(), CPU)
    words = [record["message"] for record in written()]
    assert words == [f"run {run_id} is complete already"]


def test_a_shard_that_fails_says_so(written, write_corpus, tiny_checkpoint, tmp_path):
    corpus = Path(write_corpus(labelled_rows(4), num_files=1))

    def spoil(stage, *_) -> None:
        if stage == "encode":
            raise ShardError("spoiled")

    with progress.listen(spoil), pytest.raises(ShardError):
        score_corpus(str(corpus), tiny_checkpoint, str(tmp_path / "out"), CorpusSpec(), CPU)

    failed = [record for record in written() if record.get("outcome") == "failed"]
    assert [(record["error"], record["level"]) for record in failed] == [("ShardError", "WARNING")]


def test_without_being_asked_nothing_is_written(write_corpus, tiny_checkpoint, tmp_path, capsys):
    corpus = write_corpus(labelled_rows(4))

    score_corpus(corpus, tiny_checkpoint, str(tmp_path / "out"), CorpusSpec(), CPU)

    assert tuple(capsys.readouterr()) == ("", "")
