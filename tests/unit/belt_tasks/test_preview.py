"""A preview says what scoring then does, and leaves the output as it is."""

import polars as pl
import pytest

from belt_tasks import summaries
from belt_tasks.preview import preview_scoring
from belt_tasks.score_corpus import score_corpus
from belt_tasks.specs import ChunkSpec, CorpusSpec, ScoreSpec
from tests.conftest import words

SPEC = ScoreSpec(device="cpu", chunks=ChunkSpec(chunk_size=30, stride=30), max_rejected_share=0.3)


@pytest.fixture
def corpus(tmp_path) -> str:
    """Three files of ten documents, one of them without a text."""
    (tmp_path / "corpus").mkdir()
    for i in range(3):
        texts = [None if i == j == 0 else words(20 + 5 * j, seed=10 * i + j) for j in range(10)]
        rows = pl.DataFrame({"doc_id": [f"{i}-{j}" for j in range(10)], "text": texts})
        rows.write_parquet(tmp_path / "corpus" / f"{i}.parquet")
    return str(tmp_path / "corpus")


def files(folder) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def check(previewed, manifest) -> None:
    """It came as it was said."""
    told = {name: manifest.run[name] for name in ("num_new", "num_changed", "num_unchanged", "num_removed")}
    assert previewed.counts.model_dump() == told
    assert previewed.num_documents_to_score == manifest.run["num_documents"]
    assert previewed.rejected_by_reason == manifest.rejected_by_reason
    assert previewed.num_tokens_to_score == pytest.approx(manifest.run["num_tokens"], rel=0.3)


def test_what_it_says_is_what_is_done(corpus, tiny_checkpoint, tmp_path):
    output = tmp_path / "out"
    arguments = (corpus, tiny_checkpoint, str(output), CorpusSpec(), SPEC)

    first = preview_scoring(*arguments)
    assert not output.exists()
    check(first, score_corpus(*arguments))
    assert (first.num_files, first.num_files_read, first.counts.num_new) == (3, 3, 29)
    assert first.estimated_s > 0

    before = files(output)
    idle = preview_scoring(*arguments)
    assert (idle.num_files_read, idle.num_documents_to_score, idle.estimated_s) == (0, 0, 0)
    assert idle.counts.num_unchanged == 29

    path = tmp_path / "corpus" / "1.parquet"
    changed = pl.read_parquet(path).slice(1).with_columns(text=pl.col("text").str.replace("^", "fox "))
    changed.write_parquet(path)
    night = preview_scoring(*arguments)
    assert files(output) == before
    check(night, score_corpus(*arguments))
    assert (night.counts.num_changed, night.counts.num_removed, night.num_files_read) == (9, 1, 1)

    stepwise = SPEC.model_copy(update={"chunks": ChunkSpec(chunk_size=20, stride=20), "publish_every": 1})
    assert preview_scoring(*arguments[:-1], stepwise).num_documents_to_score == 28


def test_a_corpus_that_would_be_refused_is_called_so(corpus, tiny_checkpoint, tmp_path):
    strict = SPEC.model_copy(update={"max_rejected_share": 0.01})

    found = preview_scoring(corpus, tiny_checkpoint, str(tmp_path / "out"), CorpusSpec(), strict)

    assert found.is_refused
    told = summaries.preview_summary(found)
    assert "Nothing would be published: 3.3% of 30 rows would be rejected" in told
    assert "| rejected rows in the files to read | 1 (text_null 1) |" in told
