"""Score tables: what a reader of the lake sees after runs that succeed, race, are killed halfway, or come back."""

import polars as pl
import pyarrow.parquet as pq
import pytest
from polars.testing import assert_frame_equal

from belt_tasks import lake, planning, publishing, score_tables, scoring, storage
from belt_tasks.errors import ConfigError, ConflictError, RejectedError, TransientError
from belt_tasks.score_corpus import score_corpus
from belt_tasks.specs import ChunkSpec, CorpusSpec, ScoreSpec

SPEC = ScoreSpec(chunks=ChunkSpec(chunk_size=30, stride=30), max_rejected_share=0.1)
OTHER = ScoreSpec(chunks=ChunkSpec(chunk_size=20, stride=20), max_rejected_share=0.1)


@pytest.fixture(params=["local", "s3"])
def output(request, tmp_path) -> str:
    """An empty place to publish to."""
    return str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("s3_root")


@pytest.fixture
def corpus(tmp_path) -> str:
    """Two files of ten documents; one has no text, one an id that came before."""
    texts = [f"the quick brown fox number {i} sleeps" for i in range(20)]
    rows = pl.DataFrame({"doc_id": [f"doc-{i:02}" for i in range(20)], "text": texts})
    rows = rows.with_columns(text=pl.when(pl.col("doc_id") == "doc-03").then(None).otherwise("text"))
    rows = rows.with_columns(doc_id=pl.col("doc_id").replace({"doc-13": "doc-01"}))
    write(tmp_path / "corpus", rows)
    return str(tmp_path / "corpus")


def write(folder, rows: pl.DataFrame) -> None:
    folder.mkdir(exist_ok=True)
    for i in range(2):
        rows.slice(10 * i, 10).write_parquet(folder / f"part-{i}.parquet")


def read(output: str, name: str, version: int | None = None) -> pl.DataFrame:
    """A published table, as anybody reads it."""
    table = score_tables.table_at(output, name)
    return pl.read_delta(table.uri, version=version, storage_options=storage.delta_options(table.uri))


def test_the_tables_are_those_of_the_run(corpus, tiny_checkpoint, output):
    manifest = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)

    predictions = read(output, "predictions")
    assert predictions["doc_id"].to_list() == [f"doc-{i:02}" for i in range(20) if i not in (3, 13)]
    of_shards = publishing.read_table(output, "predictions").sort("doc_id")
    assert_frame_equal(predictions, of_shards)
    rejected = read(output, "rejected")
    assert rejected.select("row_index", "reason").rows() == [(3, "text_null"), (3, "doc_id_duplicate")]
    assert read(output, "runs")["run_id"].to_list() == [manifest.run["run_id"]]
    assert read(output, "runs")["num_documents"].to_list() == [18]


def test_a_run_again_changes_nothing(corpus, tiny_checkpoint, output):
    score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)
    plan = planning.plan_scoring(corpus, tiny_checkpoint, output, CorpusSpec(), SPEC)
    manifest = publishing.republish(plan.run)

    again = score_tables.publish_tables(plan.run, manifest, base_version=plan.base_version)

    assert (again.version, again.reused) == (0, True)
    for name in ("predictions", "rejected", "runs"):
        assert score_tables.table_at(output, name).load().version() == 0


def test_documents_that_are_gone_are_gone_and_runs_are_all_there(corpus, tiny_checkpoint, output, tmp_path):
    first = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)
    rows = pl.DataFrame({"doc_id": ["doc-00", "new"], "text": ["another text now", "the lazy dog"]})
    (tmp_path / "corpus" / "part-1.parquet").unlink()
    rows.write_parquet(tmp_path / "corpus" / "part-0.parquet")

    second = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)

    assert read(output, "predictions")["doc_id"].to_list() == ["doc-00", "new"]
    assert read(output, "predictions")["run_id"].unique().to_list() == [second.run["run_id"]]
    assert len(read(output, "rejected")) == 0
    assert set(read(output, "runs")["run_id"]) == {first.run["run_id"], second.run["run_id"]}
    assert len(read(output, "predictions", version=0)) == 18  # last night is still there


def test_going_back_shows_the_old_run_again(corpus, tiny_checkpoint, output):
    first = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)
    before = read(output, "predictions")
    score_corpus(corpus, tiny_checkpoint, output, spec=OTHER)
    assert read(output, "predictions")["run_id"].unique().to_list() != [first.run["run_id"]]

    plan = planning.plan_scoring(corpus, tiny_checkpoint, output, CorpusSpec(), SPEC)
    manifest = publishing.republish(plan.run)
    score_tables.publish_tables(plan.run, manifest, base_version=plan.base_version)

    assert_frame_equal(read(output, "predictions"), before)
    assert len(read(output, "runs")) == 2


def test_of_two_runs_that_were_planned_at_once_the_second_is_told_and_loses_nothing(corpus, tiny_checkpoint, output):
    late = planning.plan_scoring(corpus, tiny_checkpoint, output, CorpusSpec(), OTHER)
    first = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)
    assert late.base_version is None

    with pytest.raises(ConflictError, match="it was not there when this run was planned and at version 0 now"):
        score_tables.publish_tables(late.run, first, base_version=late.base_version)

    assert read(output, "predictions")["run_id"].unique().to_list() == [first.run["run_id"]]
    second = score_corpus(corpus, tiny_checkpoint, output, spec=OTHER)
    assert read(output, "predictions")["run_id"].unique().to_list() == [second.run["run_id"]]


@pytest.mark.parametrize("broken", ["predictions", "runs", "rejected"])
def test_an_attempt_that_ends_between_two_commits_is_completed(corpus, tiny_checkpoint, output, monkeypatch, broken):
    really = lake.commit

    def end(table, change, **options):
        if table.name == broken:
            raise TransientError("the line is cut")
        return really(table, change, **options)

    with monkeypatch.context() as patch:
        patch.setattr(lake, "commit", end)
        with pytest.raises(TransientError):
            score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)

    score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)

    assert [len(read(output, name)) for name in ("predictions", "rejected", "runs")] == [18, 2, 1]
    assert score_tables.table_at(output, "predictions").load().version() == 0


def test_what_is_shown_by_now_is_not_overtaken_by_a_slow_run(corpus, tiny_checkpoint, output):
    slow = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)
    slow_run = planning.plan_scoring(corpus, tiny_checkpoint, output, CorpusSpec(), SPEC).run
    quick = score_corpus(corpus, tiny_checkpoint, output, spec=OTHER)

    change = lake.Change(new_uris=tuple(slow.uris(output, "rejected")), replaces_all=True)
    done = score_tables._follow(slow_run, score_tables.table_at(output, "rejected"), change)

    assert done is None
    assert read(output, "rejected")["run_id"].unique().to_list() == [quick.run["run_id"]]


def test_an_output_that_cannot_hold_tables_is_refused_before_work_starts(corpus, tiny_checkpoint):
    with pytest.raises(ConfigError, match="tables are published to local paths and to abfs, gs, s3"):
        planning.plan_scoring(corpus, tiny_checkpoint, "memory://out", CorpusSpec(), SPEC)


def test_shards_are_sorted_and_say_so(corpus, tiny_checkpoint, tmp_path):
    manifest = score_corpus(corpus, tiny_checkpoint, str(tmp_path / "out"), spec=SPEC)

    for uri in manifest.uris(str(tmp_path / "out"), "predictions"):
        column = pq.ParquetFile(uri).metadata.row_group(0).sorting_columns[0].column_index
        assert pq.read_schema(uri).names[column] == "doc_id"


def test_too_many_rejected_rows_stop_the_run_before_anything_is_published(corpus, tiny_checkpoint, output, monkeypatch):
    before = score_corpus(corpus, tiny_checkpoint, output, spec=OTHER)

    words = (
        r"2 of 20 rows \(10\.0%\) were rejected, more than max_rejected_share allows \(5\.0%\): doc_id_duplicate 1, "
        r"text_null 1; nothing was published\. They are in .*/rejected; mend the corpus"
    )
    with pytest.raises(RejectedError, match=words):
        score_corpus(corpus, tiny_checkpoint, output, spec=SPEC.model_copy(update={"max_rejected_share": 0.05}))
    assert publishing.read_manifest(output) == before
    assert set(read(output, "predictions")["run_id"]) == {before.run["run_id"]}

    with monkeypatch.context() as patch:  # allowed, the same shards are published
        patch.setattr(scoring, "encode_windows", lambda *_, **__: pytest.fail("encoded again"))
        after = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)
    assert set(read(output, "predictions")["run_id"]) == {after.run["run_id"]}
