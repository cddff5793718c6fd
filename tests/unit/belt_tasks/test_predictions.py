"""Predictions: scores to rows, by task."""

from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest

import data_contracts
from belt_tasks import predictions
from belt_tasks.predictions import DocumentScores, Stamp
from belt_tasks.prepare import TokenBlock, content_fingerprints
from belt_tasks.specs import ChunkSpec, Head
from belt_tasks.tokens import load_tokenizer
from belt_tasks.windows import chunk_windows

TEXTS = ["the quick brown fox, then the lazy dog", "", "a window  begins"]
STAMP = Stamp(
    run_id="0" * 16,
    checkpoint_digest="a" * 64,
    scoring_fingerprint="f" * 16,
    scored_at=datetime(2026, 1, 2, tzinfo=UTC),
)
WINDOWS = ChunkSpec(chunk_size=4, stride=2)


@pytest.fixture
def build(tiny_encoder):
    """Rows and rejected rows of TEXTS for given scores."""
    tokens = load_tokenizer(tiny_encoder).tokenize(TEXTS)
    windows = chunk_windows(tokens.num_tokens_D, WINDOWS)
    block = TokenBlock(
        documents=pl.DataFrame(
            {"doc_id": ["a", "b", "c"], "row_index": [0, 1, 2], "content_fingerprint": content_fingerprints(TEXTS)}
        ),
        tokens=tokens,
        rejected=pl.DataFrame(),
    )

    def call(head, logits_DL, scores_DL, *, threshold=0.5, last_chunk=False):
        rows = np.diff(windows.doc_offsets) - 1 if last_chunk else np.zeros(3, dtype=np.int64)
        scores = DocumentScores(
            logits_DL=np.array(logits_DL, dtype=np.float32), scores_DL=np.array(scores_DL), top_chunk_D=rows
        )
        return predictions.build(
            block, windows, scores, head=head, threshold=threshold, stamp=STAMP, source_uri="file.parquet"
        )

    return call


BINARY = Head(task="binary", labels=("no", "yes"))
BINARY_LOGITS = [[0.0], [2.0], [-2.0]]
BINARY_SCORES = [[0.5, 0.5], [0.1, 0.9], [0.8, 0.2]]


def test_rows_satisfy_the_contract_and_count_tokens(build):
    table, rejected = build(BINARY, BINARY_LOGITS, BINARY_SCORES)

    assert data_contracts.violations(table, "predictions") == []
    assert len(rejected) == 0
    rows = table.to_pylist()
    assert [row["label"] for row in rows] == ["no", "yes", "no"]
    assert [row["score"] for row in rows] == [0.5, 0.9, 0.8]
    assert rows[1]["scores"] == [{"label": "no", "score": 0.1}, {"label": "yes", "score": 0.9}]
    assert rows[1]["logits"] == [2.0]
    assert rows[1] | {"num_tokens": 0, "num_tokens_scored": 0, "num_chunks": 1} == rows[1]
    assert rows[0]["num_tokens"] == rows[0]["num_tokens_scored"] > 4
    assert rows[0]["num_chunks"] > 2


def test_the_top_chunk_is_named_by_its_characters(build):
    first = build(BINARY, BINARY_LOGITS, BINARY_SCORES)[0].to_pylist()
    last = build(BINARY, BINARY_LOGITS, BINARY_SCORES, last_chunk=True)[0].to_pylist()

    spans = [(row["top_chunk"]["start_char"], row["top_chunk"]["stop_char"]) for row in first]
    assert [TEXTS[d][slice(*span)] for d, span in enumerate(spans)][1] == ""
    assert TEXTS[0][slice(*spans[0])].startswith("the q")
    end = last[0]["top_chunk"]
    assert end["chunk_index"] == last[0]["num_chunks"] - 1
    assert TEXTS[0].endswith(TEXTS[0][end["start_char"] : end["stop_char"]])


def test_a_multilabel_document_carries_every_label_above_the_threshold(build):
    head = Head(task="multilabel", labels=("x", "y"))
    table, _ = build(head, np.zeros((3, 2)), [[0.7, 0.9], [0.1, 0.2], [0.61, 0.3]], threshold=0.6)

    rows = table.to_pylist()
    assert [row["labels"] for row in rows] == [["x", "y"], [], ["x"]]
    assert [row["label"] for row in rows] == ["y", None, "x"]
    assert [row["score"] for row in rows] == [0.9, 0.2, 0.61]
    assert data_contracts.violations(table, "predictions") == []


def test_a_regression_has_a_value_and_no_label(build):
    table, _ = build(Head(task="regression", labels=("stars",)), [[1.0], [7.5], [-3.0]], [[1.0], [7.5], [-3.0]])

    rows = table.to_pylist()
    assert [(row["label"], row["labels"], row["score"]) for row in rows] == [(None, [], v) for v in (1.0, 7.5, -3.0)]
    assert rows[1]["scores"] == [{"label": "stars", "score": 7.5}]
    assert data_contracts.violations(table, "predictions") == []


def test_a_document_whose_output_is_no_number_is_put_aside(build):
    table, rejected = build(BINARY, [[0.0], [np.nan], [np.inf]], [[0.5, 0.5], [np.nan, np.nan], [0.0, 1.0]])

    assert table["doc_id"].to_pylist() == ["a"]
    assert rejected["doc_id"].to_list() == ["b", "c"]
    assert rejected["row_index"].to_list() == [1, 2]
    assert set(rejected["reason"]) == {"output_not_finite"}
    assert data_contracts.violations(table, "predictions") == []
