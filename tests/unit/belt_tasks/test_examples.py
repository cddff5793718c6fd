"""Examples are the rows that an oracle chooses from whole tables, in however many files and row groups they lie."""

from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_contracts
from belt_tasks import examples, storage
from belt_tasks.publishing import Manifest, RunRef
from belt_tasks.receipts import FileReceipt
from belt_tasks.score_corpus import score_corpus
from belt_tasks.specs import ScoreSpec

RUN_ID = "0123456789abcdef"
SAME = {"score": 0.5, "start_token": 0, "stop_token": 2, "start_char": 3, "stop_char": 9, "run_id": RUN_ID}


def written(folder, name: str, parts: list[pl.DataFrame], *, row_group_size: int = 3) -> tuple[RunRef, Manifest]:
    """A run with a table in some files."""
    run = RunRef(output_uri=str(folder), run_id=RUN_ID)
    files = []
    for i, part in enumerate(parts):
        files.append(FileReceipt(table=name, path=run.path_of(name, str(i)), num_rows=len(part)))
        schema = data_contracts.arrow_schema(name)
        with storage.parquet_writer(storage.join(run.output_uri, files[-1].path), schema) as writer:
            writer.write_table(part.select(schema.names).to_arrow().cast(schema), row_group_size)
    return run, Manifest(run={}, rejected_by_reason={}, files=tuple(files))


def evidence(rows: list[tuple[str, float]], part: int, *, text: str | None = None) -> pl.DataFrame:
    """Chunks by label and contribution, two of each document of which the second counts less."""
    found = []
    for i, (label, contribution) in enumerate(rows):
        for rank in (1, 2):
            one = {"doc_id": f"{part}-{i}", "label": label, "rank": rank, "chunk_index": rank - 1}
            one |= {"contribution": contribution if rank == 1 else contribution + 100.0}
            found.append(one | SAME | {"text": text and f"{text} {part}-{i}"})
    schema = pl.DataFrame(data_contracts.arrow_schema("evidence").empty_table()).schema
    return pl.DataFrame(found, schema=schema)


parts = st.lists(st.lists(st.tuples(st.sampled_from("abc"), st.integers(-3, 9).map(float)), max_size=9), max_size=3)


@settings(max_examples=40, deadline=None)
@given(parts=parts)
def test_evidence_is_what_contributes_most_to_each_label(tmp_path_factory, parts):
    folder = tmp_path_factory.mktemp("evidence")
    run, manifest = written(folder, "evidence", [evidence(rows, i, text="of") for i, rows in enumerate(parts)])

    found = examples.top_evidence(run, manifest, ("c", "a"))

    everything = [(label, value, f"{i}-{j}") for i, rows in enumerate(parts) for j, (label, value) in enumerate(rows)]
    expected = [
        row
        for wanted in ("c", "a")
        for row in sorted((row for row in everything if row[0] == wanted), key=lambda row: -row[1])[
            : examples.NUM_PASSAGES
        ]
    ]
    assert [(row["label"], row["contribution"], row["doc_id"]) for row in found] == expected
    assert [row["text"] for row in found] == [f"of {doc_id}" for *_, doc_id in expected]


def test_evidence_without_passages_has_none(tmp_path):
    run, manifest = written(tmp_path, "evidence", [evidence([("a", 1.0)], 0)])

    (row,) = examples.top_evidence(run, manifest, ("a",))

    assert row == {
        "doc_id": "0-0",
        "label": "a",
        "score": 0.5,
        "contribution": 1.0,
        "start_char": 3,
        "stop_char": 9,
        "text": None,
    }


def test_a_passage_is_found_far_down_in_its_row_group(tmp_path):
    rows = [("a", 0.0)] * 1_500 + [("a", 1.0)]
    run, manifest = written(tmp_path, "evidence", [evidence(rows, 0, text="of")], row_group_size=5_000)

    found = examples.top_evidence(run, manifest, ("a",))

    assert [row["text"] for row in found] == ["of 0-1500", "of 0-0", "of 0-1"]


def rejected(rows: list[tuple[str, str]]) -> pl.DataFrame:
    """Rejected rows by file and reason."""
    return pl.DataFrame(
        {
            "source_uri": pl.Series([uri for uri, _ in rows], dtype=pl.String),
            "row_index": pl.Series(range(len(rows)), dtype=pl.Int64),
            "doc_id": pl.Series([None] * len(rows), dtype=pl.String),
            "reason": pl.Series([reason for _, reason in rows], dtype=pl.String),
            "detail": pl.Series(["why"] * len(rows), dtype=pl.String),
            "run_id": pl.Series([RUN_ID] * len(rows), dtype=pl.String),
        }
    )


def test_rejected_rows_are_counted_and_each_reason_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "NUM_ROWS", 6)
    monkeypatch.setattr(examples, "BATCH_ROWS", 4)
    first = [("b", "text_null")] * 10 + [("a", "doc_id_null"), ("a", "text_null")]
    second = [("c", "doc_id_duplicate")] * 3
    run, manifest = written(tmp_path, "rejected", [rejected(first), rejected([]), rejected(second)])

    found = examples.rejected_rows(run.output_uri, manifest.files)

    assert found.num_rows == 15
    assert found.by_reason.rows() == [("text_null", 11), ("doc_id_duplicate", 3), ("doc_id_null", 1)]
    assert found.by_source.rows() == [
        ("b", "text_null", 10),
        ("c", "doc_id_duplicate", 3),
        ("a", "doc_id_null", 1),
        ("a", "text_null", 1),
    ]
    assert found.rows["source_uri"].to_list() == ["a", "b", "b", "b", "c", "c"]
    assert found.rows["reason"].value_counts().sort("reason").rows() == [
        ("doc_id_duplicate", 2),
        ("doc_id_null", 1),
        ("text_null", 3),
    ]


def test_nothing_rejected_is_nothing_to_show(tmp_path):
    run, manifest = written(tmp_path, "rejected", [rejected([])])

    found = examples.rejected_rows(run.output_uri, manifest.files)

    assert (found.num_rows, len(found.by_source), len(found.rows)) == (0, 0, 0)


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "corpus").mkdir()
    return tmp_path / "corpus"


def test_the_runs_before_one_are_those_that_began_before_it(corpus, tiny_checkpoint, output, monkeypatch):
    monkeypatch.setattr(examples, "NUM_RUNS", 3)
    manifests = []
    for i in range(5):
        pl.DataFrame({"doc_id": [f"{i}"], "text": ["the fox"]}).write_parquet(corpus / f"{i}.parquet")
        manifests.append(score_corpus(str(corpus), tiny_checkpoint, output, spec=ScoreSpec(device="cpu")))
    ids = [manifest.run["run_id"] for manifest in manifests]

    for last, expected in ((4, ids[2:]), (1, ids[:2])):
        found = examples.last_runs(RunRef(output_uri=output, run_id=ids[last]), manifests[last])
        assert found["run_id"].to_list() == expected
        assert found.columns == examples.RUN_COLUMNS


def test_a_run_that_was_not_shown_stands_alone(tmp_path):
    started_at = datetime(2026, 1, 2, tzinfo=UTC)
    run = dict.fromkeys(examples.RUN_COLUMNS) | {"run_id": RUN_ID, "started_at": started_at.isoformat()}
    manifest = Manifest(run=run, rejected_by_reason={}, files=())

    found = examples.last_runs(RunRef(output_uri=str(tmp_path), run_id=RUN_ID), manifest)

    assert found.select("run_id", "started_at").rows() == [(RUN_ID, started_at + timedelta(0))]
