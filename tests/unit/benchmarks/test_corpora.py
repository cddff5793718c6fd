"""Corpora of the benchmark: drawn by a seed, whole documents, and only those that belt would score."""

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from belt_tasks.errors import ConfigError
from belt_tasks.specs import ChunkSpec
from tests.benchmarks import corpora

TABLE = pa.table({"doc_id": [f"d{i}" for i in range(50)], "text": [f"text {i} " * i for i in range(50)]})


def test_a_sample_is_seeded():
    assert corpora.sample(TABLE, 20, seed=1) == corpora.sample(TABLE, 20, seed=1)
    assert corpora.sample(TABLE, 20, seed=1) != corpora.sample(TABLE, 20, seed=2)


def test_a_smaller_sample_is_the_beginning_of_a_larger_one():
    assert corpora.sample(TABLE, 20).slice(0, 7) == corpora.sample(TABLE, 7)


def test_a_sample_is_of_whole_and_different_documents():
    drawn = corpora.sample(TABLE, 20).to_pylist()

    assert len({row["doc_id"] for row in drawn}) == 20
    assert all(row in TABLE.to_pylist() for row in drawn)


def test_no_more_is_drawn_than_there_is():
    assert corpora.sample(TABLE, 1000).num_rows == 50


@pytest.mark.parametrize(("budget_s", "expected"), [(0.0, 2), (3.0, 3), (3.9, 3), (100.0, 4)])
def test_documents_that_fit_the_time(budget_s, expected):
    num_tokens_D = np.array([10, 10, 10, 40])

    assert corpora.num_documents_within(num_tokens_D, seconds_per_token=0.1, budget_s=budget_s, at_least=2) == expected


@pytest.mark.parametrize(("num_tokens", "expected"), [(5, 2), (20, 2), (21, 3), (70, 4), (1000, 4)])
def test_documents_with_so_many_tokens(num_tokens, expected):
    assert corpora.num_documents_with(np.array([10, 10, 10, 40]), num_tokens, at_least=2) == expected


def test_a_reading_counts_what_overlaps_twice():
    read = corpora.reading(np.array([25, 0]), ChunkSpec(chunk_size=10, stride=5), num_special=2)

    assert read.num_tokens_C.tolist() == [12, 12, 12, 12, 7, 2]
    assert read.num_content_tokens == 45


def test_a_corpus_holds_what_is_the_same_work_for_all(write_corpus):
    rows = {"doc_id": [1, 2, 1, None, 5, 6], "text": ["one", None, "again", "nobody", "", "one"], "more": [0] * 6}

    table = corpora.read_corpus(_only_file(write_corpus(rows)))

    assert table.to_pylist() == [{"doc_id": "1", "text": "one"}, {"doc_id": "5", "text": ""}]


def test_a_corpus_without_its_columns_is_refused(write_corpus):
    path = _only_file(write_corpus({"id": ["a"], "text": ["b"]}))

    with pytest.raises(ConfigError, match=r"lacks doc_id; it has id, text"):
        corpora.read_corpus(path)


def test_a_corpus_without_documents_is_refused(write_corpus):
    path = _only_file(write_corpus(pl.DataFrame({"doc_id": ["a"], "text": pl.Series([None], dtype=pl.String)})))

    with pytest.raises(ConfigError, match="no document"):
        corpora.read_corpus(path)


def test_what_is_no_parquet_file_is_refused(tmp_path):
    path = tmp_path / "corpus.parquet"

    with pytest.raises(ConfigError, match="no such file"):
        corpora.read_corpus(path)
    path.write_text("no Parquet")
    with pytest.raises(ConfigError, match="must be a Parquet file"):
        corpora.read_corpus(path)


def _only_file(folder):
    (path,) = corpora.Path(folder).iterdir()
    return path
