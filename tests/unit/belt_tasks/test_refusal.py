"""Refusal: too many rejected rows end a run, and whoever has to mend the corpus finds them on a page."""

import pickle
from pathlib import Path

import polars as pl
import pytest

from belt_tasks import publishing, refusal, storage
from belt_tasks.errors import RejectedError
from belt_tasks.publishing import RunRef
from belt_tasks.receipts import Counts, FileReceipt, ShardReceipt
from belt_tasks.report import score_report
from belt_tasks.score_corpus import score_corpus
from belt_tasks.specs import ChunkSpec, ScoreSpec

STRICT = ScoreSpec(device="cpu", chunks=ChunkSpec(chunk_size=30, stride=30), max_rejected_share=0.2)
LENIENT = STRICT.model_copy(update={"max_rejected_share": 0.5})


@pytest.fixture
def corpus(tmp_path) -> str:
    """Three of ten rows are broken."""
    texts = [None if i in (2, 5) else f"the fox number {i}" for i in range(10)]
    ids = ["a" if i == 7 else f"{'abcdefghij'[i]}" for i in range(10)]
    (tmp_path / "corpus").mkdir()
    pl.DataFrame({"doc_id": ids, "text": texts}).write_parquet(tmp_path / "corpus" / "part.parquet")
    return str(tmp_path / "corpus")


def test_a_refused_run_shows_the_rows_that_it_was_refused_for(corpus, tiny_checkpoint, output):
    with pytest.raises(RejectedError) as refused:
        score_corpus(corpus, tiny_checkpoint, output, spec=STRICT)

    page = storage.read_bytes(refused.value.quality_uri).decode()
    assert refused.value.quality_uri in str(refused.value)
    assert (
        "The run was refused: 3 of 10 rows (30.0%) were rejected, more than max_rejected_share allows (20.0%): "
        "doc_id_duplicate 1, text_null 2; nothing was published." in page
    )
    for row in (2, 5, 7):
        assert f'<td class="number">{row}</td>' in page
    assert "index.html" not in page


def test_a_run_that_is_allowed_more_has_the_page_that_every_run_has(corpus, tiny_checkpoint, output):
    with pytest.raises(RejectedError) as refused:
        score_corpus(corpus, tiny_checkpoint, output, spec=STRICT)

    manifest = score_corpus(corpus, tiny_checkpoint, output, spec=LENIENT)
    done = score_report(RunRef(output_uri=output, run_id=manifest.run["run_id"]), manifest)

    assert done.quality_uri == refused.value.quality_uri
    page = storage.read_bytes(done.quality_uri).decode()
    assert "refused" not in page
    assert 'href="index.html"' in page


def receipt_of(run: RunRef, key: str, *, num_rejected: int) -> ShardReceipt:
    """Of a part of a run that put rows aside."""
    path = Path(run.output_uri, run.path_of("rejected", key))
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {
        "source_uri": key,
        "row_index": 0,
        "doc_id": None,
        "reason": "doc_id_null",
        "detail": "",
        "run_id": run.run_id,
    }
    rows = pl.DataFrame([row] * num_rejected, schema_overrides={"doc_id": pl.String})
    rows.with_columns(row_index=pl.int_range(pl.len())).write_parquet(path)
    return ShardReceipt(
        shard_key=key,
        files=(FileReceipt(table="rejected", path=run.path_of("rejected", key), num_rows=num_rejected),),
        counts=Counts(num_rejected=num_rejected, rejected_by_reason={"doc_id_null": num_rejected}),
    )


def test_rows_of_the_plan_and_of_all_shards_count_together(tmp_path):
    run = RunRef(output_uri=str(tmp_path), run_id="0123456789abcdef")
    receipts = [receipt_of(run, key, num_rejected=number) for key, number in (("plan", 1), ("s1", 2), ("s2", 1))]

    refusal.check_rejected_share(run, receipts, num_rows=20, limit=0.2)
    assert not Path(run.quality_uri).exists()
    with pytest.raises(RejectedError, match=r"4 of 19 rows \(21\.1%\)"):
        refusal.check_rejected_share(run, receipts, num_rows=19, limit=0.2)

    page = Path(run.quality_uri).read_text(encoding="utf-8")
    assert all(f"<bdi>{key}</bdi>" in page for key in ("plan", "s1", "s2"))


def test_without_rows_there_is_nothing_to_refuse(tmp_path):
    run = RunRef(output_uri=str(tmp_path), run_id="0123456789abcdef")

    refusal.check_rejected_share(run, [], num_rows=0, limit=0.0)

    assert refusal.refusal(run, Counts(), num_rows=0, limit=0.0) is None
    assert publishing.find_complete(run) is None


def test_what_refused_a_run_crosses_processes():
    error = pickle.loads(pickle.dumps(RejectedError("too many", quality_uri="s3://here/rejected.html")))  # noqa: S301 - its own

    assert (str(error), error.quality_uri) == ("too many", "s3://here/rejected.html")
