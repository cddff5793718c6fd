"""Score tables: what a reader of the lake sees after runs that succeed, race, are killed halfway, or come back."""

import shutil
from datetime import UTC, datetime

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from polars.testing import assert_frame_equal

import data_contracts
from belt_tasks import corpus as corpora
from belt_tasks import delta_tables, lake, run_list, score_planning, score_tables, scoring, storage
from belt_tasks.errors import ConfigError, ConflictError, RejectedError, TransientError
from belt_tasks.score_corpus import complete, score_corpus, score_shards
from belt_tasks.specs import ChunkSpec, CorpusSpec, ScoreSpec
from tests.conftest import other_contract, save_tiny_checkpoint
from tests.delta_readers import by_delta_lake

SPEC = ScoreSpec(chunks=ChunkSpec(chunk_size=30, stride=30), max_rejected_share=0.1)
OTHER = ScoreSpec(chunks=ChunkSpec(chunk_size=20, stride=20), max_rejected_share=0.1)


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
    return by_delta_lake(score_tables.table_at(output, name).uri, version)


def runs_of(output: str) -> list[str]:
    return read(output, "predictions")["run_id"].unique().to_list()


def test_the_tables_are_those_of_the_run(corpus, tiny_checkpoint, output):
    manifest = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)

    predictions = read(output, "predictions")
    assert predictions["doc_id"].to_list() == [f"doc-{i:02}" for i in range(20) if i not in (3, 13)]
    of_shards = pl.concat(pl.read_parquet(storage.read_bytes(uri)) for uri in manifest.uris(output, "predictions"))
    assert_frame_equal(predictions, of_shards.sort("doc_id"))
    assert_frame_equal(score_tables.read_table(output, "predictions"), predictions)
    rejected = read(output, "rejected")
    assert rejected.select("row_index", "reason").rows() == [(3, "text_null"), (3, "doc_id_duplicate")]
    assert rejected["detail"].to_list() == ["column 'text' is null", "column 'doc_id' is that of an earlier row"]
    assert read(output, "runs")["run_id"].to_list() == [manifest.run["run_id"]]
    told = read(output, "runs").select("num_documents", "num_rejected", "num_new", "num_unchanged", "num_removed")
    assert told.rows() == [(18, 2, 18, 0, 0)]
    for name in score_tables.SORTED_BY:
        stored = score_tables.table_at(output, name).load().schema().to_arrow()
        assert data_contracts.is_stored_so(pa.schema(stored), name), name


def test_a_night_without_change_does_nothing(corpus, tiny_checkpoint, output, monkeypatch):
    manifest = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "encode_windows", lambda *_, **__: pytest.fail("encoded"))
        patch.setattr(corpora, "read_documents", lambda *_, **__: pytest.fail("read"))
        assert score_corpus(corpus, tiny_checkpoint, output, spec=SPEC) == manifest

    for name in ("predictions", "rejected", "runs"):
        assert score_tables.table_at(output, name).load().version() == 0


def test_only_what_changed_is_read_and_scored(corpus, tiny_checkpoint, output, tmp_path, monkeypatch):
    first = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)
    before = read(output, "predictions")
    path = tmp_path / "corpus" / "part-1.parquet"
    rows = pl.read_parquet(path).with_columns(
        text=pl.when(pl.col("doc_id") == "doc-15").then(pl.lit("another text now")).otherwise("text")
    )
    pl.concat([rows, pl.DataFrame({"doc_id": ["new"], "text": ["the lazy dog"]})]).slice(1).write_parquet(path)
    reads, read_documents = [], corpora.read_documents

    def recorded(shard, *arguments, **options):
        reads.append(shard.uri)
        return read_documents(shard, *arguments, **options)

    monkeypatch.setattr(corpora, "read_documents", recorded)

    second = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)

    assert set(reads) == {str(path)}
    after = read(output, "predictions")
    assert set(after.filter(pl.col("run_id") == second.run["run_id"])["doc_id"]) == {"doc-15", "new"}
    same = pl.col("doc_id").is_in(["doc-10", "doc-15", "new"]).not_()
    assert_frame_equal(after.filter(same), before.filter(same))
    told = {
        name: second.run[name] for name in ("base_run_id", "num_new", "num_changed", "num_unchanged", "num_removed")
    }
    assert told == {
        "base_run_id": first.run["run_id"],
        "num_new": 1,
        "num_changed": 1,
        "num_unchanged": 16,
        "num_removed": 1,
    }
    assert (second.run["num_documents"], second.run["num_rejected"]) == (2, 1)
    assert len(read(output, "rejected")) == 2
    assert set(read(output, "runs")["run_id"]) == {first.run["run_id"], second.run["run_id"]}
    assert_frame_equal(read(output, "predictions", version=0), before)  # last night is still there


def test_the_same_rows_in_another_file_cost_no_model_work(corpus, tiny_checkpoint, output, tmp_path, monkeypatch):
    score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)
    before = read(output, "predictions")
    path = tmp_path / "corpus" / "part-1.parquet"
    pl.read_parquet(path).reverse().write_parquet(tmp_path / "corpus" / "part-2.parquet")
    path.unlink()
    monkeypatch.setattr(scoring, "encode_windows", lambda *_, **__: pytest.fail("encoded"))

    manifest = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)

    assert_frame_equal(read(output, "predictions"), before)
    assert read(output, "rejected")["source_uri"].str.slice(-14).to_list() == ["part-0.parquet", "part-2.parquet"]
    assert manifest.run["num_documents"] == 0
    assert score_corpus(corpus, tiny_checkpoint, output, spec=SPEC) == manifest


def test_other_rules_score_everything_and_full_does_so_on_demand(corpus, tiny_checkpoint, output):
    names = [
        score_corpus(corpus, tiny_checkpoint, output, spec=spec).run["run_id"]
        for spec in (SPEC, OTHER, SPEC, SPEC.model_copy(update={"full": True}))
    ]

    assert len(set(names)) == 4
    assert runs_of(output) == [names[-1]]
    assert len(read(output, "runs")) == 4


def test_a_new_checkpoint_may_be_published_as_it_goes(corpus, tiny_checkpoint, output):
    first = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC).run
    before = read(output, "predictions")

    last = score_corpus(corpus, tiny_checkpoint, output, spec=OTHER.model_copy(update={"publish_every": 5})).run

    steps = [read(output, "predictions", version=version) for version in (0, 1, 2)]
    assert [step["run_id"].n_unique() for step in steps] == [1, 2, 2]
    assert all(step["doc_id"].equals(before["doc_id"]) for step in steps)
    assert first["scoring_fingerprint"] not in set(steps[2]["scoring_fingerprint"])
    assert last["run_id"] in set(steps[2]["run_id"])
    assert score_corpus(corpus, tiny_checkpoint, output, spec=OTHER).run == last


def test_documents_that_are_gone_may_stay_marked(corpus, tiny_checkpoint, output, tmp_path):
    marks = SPEC.model_copy(update={"removed": "mark"})
    score_corpus(corpus, tiny_checkpoint, output, spec=marks)
    (tmp_path / "corpus" / "part-1.parquet").unlink()

    score_corpus(corpus, tiny_checkpoint, output, spec=marks)

    table = read(output, "predictions")
    gone = table.filter(pl.col("removed_at").is_not_null())
    assert gone["doc_id"].to_list() == [f"doc-{i}" for i in range(10, 20) if i != 13]
    assert gone["removed_at"].n_unique() == 1
    deleted = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)  # when the policy is to delete
    assert deleted.run["num_removed"] == len(gone)
    assert read(output, "predictions")["doc_id"].to_list() == [f"doc-0{i}" for i in range(10) if i != 3]


def test_an_output_whose_state_was_lost_is_scored_again(corpus, tiny_checkpoint, tmp_path):
    output = str(tmp_path / "out")
    score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)
    before = read(output, "predictions").drop("scored_at", "run_id")
    for path in (tmp_path / "out" / "inventory").iterdir():
        path.unlink()
    (tmp_path / "corpus" / "part-1.parquet").touch()
    with pytest.raises(ConfigError, match="no such file"):
        score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)

    manifest = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC.model_copy(update={"full": True}))

    assert runs_of(output) == [manifest.run["run_id"]]
    assert_frame_equal(read(output, "predictions").drop("scored_at", "run_id"), before)
    next((tmp_path / "out" / "runs" / manifest.run["run_id"]).glob("sources.parquet")).unlink()
    again = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)
    assert runs_of(output) == [again.run["run_id"]]


def test_of_two_runs_that_were_planned_at_once_the_second_is_told_and_loses_nothing(corpus, tiny_checkpoint, output):
    late = score_planning.plan_scoring(corpus, tiny_checkpoint, output, CorpusSpec(), OTHER)
    receipts = score_shards(late, CorpusSpec())
    of_late = complete(late, receipts, corpus_uri=corpus, started_at=datetime.now(UTC))
    first = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)
    assert late.base_version is None

    with pytest.raises(ConflictError, match="it was not there when this run was planned and at version 0 now"):
        score_tables.publish_tables(late.run, of_late, base_version=late.base_version)

    assert runs_of(output) == [first.run["run_id"]]
    second = score_corpus(corpus, tiny_checkpoint, output, spec=OTHER)
    assert runs_of(output) == [second.run["run_id"]]


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
    slow_run = score_tables.shown(output).run
    quick = score_corpus(corpus, tiny_checkpoint, output, spec=OTHER)

    change = lake.Change(new_uris=tuple(slow.uris(output, "rejected")), replaces_all=True)
    done = score_tables._follow(slow_run, score_tables.table_at(output, "rejected"), change)

    assert done is None
    assert read(output, "rejected")["run_id"].unique().to_list() == [quick.run["run_id"]]


def test_a_run_that_is_overtaken_between_two_commits_changes_no_table(corpus, tiny_checkpoint, output, monkeypatch):
    """The next run is shown at the last moment: after the slow one saw that predictions are its own."""
    really, later = delta_tables.shown_run, []

    def overtaken(delta):
        run_id = really(delta)
        monkeypatch.setattr(delta_tables, "shown_run", really)
        later.append(score_corpus(corpus, tiny_checkpoint, output, spec=OTHER).run["run_id"])
        return run_id

    slow = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)
    slow_run = score_tables.shown(output).run
    change = lake.Change(new_uris=tuple(slow.uris(output, "rejected")), replaces_all=True)

    monkeypatch.setattr(delta_tables, "shown_run", overtaken)
    assert score_tables._follow(slow_run, score_tables.table_at(output, "rejected"), change) is None

    assert read(output, "rejected")["run_id"].unique().to_list() == later


def test_a_run_is_planned_on_one_whose_tables_are_complete(corpus, tiny_checkpoint, output, tmp_path, monkeypatch):
    """A second run is shown while the third is planned, and is killed before its other tables follow."""
    first = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC).run["run_id"]
    (tmp_path / "corpus" / "part-1.parquet").rename(tmp_path / "part-1.parquet")
    really, finish = lake.commit, score_tables.finish

    def end(table, change, **options):
        if table.name == "runs" and options["run_id"] != first:
            raise TransientError("the line is cut")
        return really(table, change, **options)

    def finish_late(output_uri):
        now = finish(output_uri)
        with monkeypatch.context() as patch:
            patch.setattr(score_tables, "finish", finish)
            patch.setattr(lake, "commit", end)
            with pytest.raises(TransientError):
                score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)
        return now

    with monkeypatch.context() as patch:
        patch.setattr(score_tables, "finish", finish_late)
        with pytest.raises(ConflictError, match="at version 0 when this run was planned and at version 1 now"):
            score_corpus(corpus, tiny_checkpoint, output, spec=OTHER)

    last = score_corpus(corpus, tiny_checkpoint, output, spec=OTHER)
    assert len(read(output, "runs")) == 3
    assert last.run["base_run_id"] in set(read(output, "runs")["run_id"])


def test_an_output_that_cannot_hold_tables_is_refused_before_work_starts(corpus, tiny_checkpoint):
    with pytest.raises(ConfigError, match="tables are published to local paths and to abfs, gs, s3"):
        score_planning.plan_scoring(corpus, tiny_checkpoint, "memory://out", CorpusSpec(), SPEC)


def test_an_output_in_the_corpus_or_in_a_model_is_refused(corpus, tiny_checkpoint, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    for output in (corpus, f"{corpus}/out", f"{corpus}/."):
        with pytest.raises(ConfigError, match="the output must not lie in the corpus"):
            score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)
    with pytest.raises(ConfigError, match="holds a model; choose another output"):
        score_corpus(corpus, tiny_checkpoint, tiny_checkpoint, spec=SPEC)
    assert sorted(tmp_path.rglob("*")) == before
    score_corpus(f"{corpus}/*.parquet", tiny_checkpoint, f"{corpus}-out", spec=SPEC)


def test_shards_are_sorted_and_say_so(corpus, tiny_checkpoint, tmp_path):
    manifest = score_corpus(corpus, tiny_checkpoint, str(tmp_path / "out"), spec=SPEC)

    for uri in manifest.uris(str(tmp_path / "out"), "predictions"):
        column = pq.ParquetFile(uri).metadata.row_group(0).sorting_columns[0].column_index
        assert pq.read_schema(uri).names[column] == "doc_id"


def test_too_many_rejected_rows_stop_the_run_before_anything_is_scored(corpus, tiny_checkpoint, output, monkeypatch):
    before = score_corpus(corpus, tiny_checkpoint, output, spec=OTHER)

    words = (
        r"2 of 20 rows \(10\.0%\) were rejected, more than max_rejected_share allows \(5\.0%\): doc_id_duplicate 1, "
        r"text_null 1; nothing was published\. They are shown in .*/report/rejected\.html, and all .*; mend the corpus"
    )
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "encode_windows", lambda *_, **__: pytest.fail("encoded"))
        for _ in range(2):
            with pytest.raises(RejectedError, match=words):
                score_corpus(corpus, tiny_checkpoint, output, spec=SPEC.model_copy(update={"max_rejected_share": 0.05}))
    assert runs_of(output) == [before.run["run_id"]]

    after = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)
    assert runs_of(output) == [after.run["run_id"]]


def test_a_bad_delivery_is_not_hidden_by_a_large_corpus(corpus, tiny_checkpoint, output, tmp_path):
    before = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)
    pl.DataFrame({"doc_id": ["x", "y"], "text": ["fox", None]}).write_parquet(tmp_path / "corpus" / "part-2.parquet")

    with pytest.raises(RejectedError, match=r"1 of 2 rows \(50\.0%\) were rejected"):
        score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)

    assert runs_of(output) == [before.run["run_id"]]


# --- tables that were published under another contract ----------------------------------------------


def publish_under(change: dict[str, list[str]], run, manifest) -> None:
    """Let tables be as a belt whose contracts had less columns published them; the rows are those of the run."""
    for name, columns in change.items():
        table = score_tables.table_at(run.output_uri, name)
        uris = tuple(manifest.uris(run.output_uri, name)) or (storage.join(run.uri, "run.parquet"),)
        shutil.rmtree(table.uri)
        with other_contract(name, lambda contract, columns=columns: [contract.pop(column) for column in columns]):
            lake.commit(table, lake.Change(new_uris=uris), run_id=run.run_id, base_version=None)


def change_text(corpus: str, doc_id: str) -> None:
    path = f"{corpus}/part-1.parquet"
    text = pl.when(pl.col("doc_id") == doc_id).then(pl.lit("another text now")).otherwise("text")
    pl.read_parquet(path).with_columns(text=text).write_parquet(path)


OLDER = {"predictions": ["removed_at"], "rejected": ["doc_id"], "runs": ["num_removed", "peak_share"]}


def test_tables_of_an_earlier_contract_gain_its_columns_with_the_next_run(corpus, tiny_checkpoint, tmp_path):
    output = str(tmp_path / "out")
    first = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)
    before = {name: read(output, name) for name in OLDER}
    publish_under(OLDER, score_tables.shown(output).run, first)
    assert not {"removed_at", "doc_id", "num_removed"} & {
        *read(output, "predictions").drop("doc_id").columns,
        *read(output, "rejected").columns,
        *read(output, "runs").columns,
    }
    assert score_tables.read_table(output, "predictions")["removed_at"].null_count() == 18  # read, though not there yet
    assert score_corpus(corpus, tiny_checkpoint, output, spec=SPEC) == first  # a night without change writes nothing
    assert score_tables.table_at(output, "predictions").load().version() == 0

    change_text(corpus, "doc-15")
    second = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)

    ids = [first.run["run_id"], second.run["run_id"]]
    predictions = read(output, "predictions")
    same = pl.col("doc_id") != "doc-15"
    assert_frame_equal(predictions.filter(same), before["predictions"].filter(same))
    assert predictions.filter(~same)["run_id"].to_list() == ids[1:]
    told = read(output, "runs").select("run_id", "num_removed").sort(pl.col("run_id") == ids[1])
    assert told.rows() == [(ids[0], None), (ids[1], 0)]
    assert read(output, "rejected").columns == before["rejected"].columns
    versions = delta_tables.versions_by_run(score_tables.table_at(output, "predictions"))
    assert versions == {ids[1]: 1, ids[0]: 0}
    assert [run.state for run in run_list.list_runs(output)] == ["shown", "complete"]


def test_a_rollback_across_the_change_of_a_contract_and_back(corpus, tiny_checkpoint, tmp_path):
    output = str(tmp_path / "out")
    first = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)
    publish_under(OLDER, score_tables.shown(output).run, first)
    change_text(corpus, "doc-15")
    second = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)
    of_second = read(output, "predictions")

    run_list.roll_back(output)
    assert "removed_at" not in read(output, "predictions").columns
    assert runs_of(output) == [first.run["run_id"]]
    assert score_tables.read_table(output, "predictions").columns == of_second.columns

    assert score_corpus(corpus, tiny_checkpoint, output, spec=SPEC).run["run_id"] == second.run["run_id"]
    assert_frame_equal(read(output, "predictions"), of_second)


def test_an_attempt_killed_between_the_commits_that_add_columns_is_completed(
    corpus, tiny_checkpoint, tmp_path, monkeypatch
):
    output, really = str(tmp_path / "out"), lake.commit
    first = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)
    publish_under(OLDER, score_tables.shown(output).run, first)
    change_text(corpus, "doc-15")

    def end(table, change, **options):
        if table.name == "runs" and options["run_id"] != first.run["run_id"]:
            raise TransientError("the line is cut")
        return really(table, change, **options)

    with monkeypatch.context() as patch:
        patch.setattr(lake, "commit", end)
        with pytest.raises(TransientError):
            score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)
    assert "removed_at" in read(output, "predictions").columns
    assert "num_removed" not in read(output, "runs").columns

    second = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)

    assert runs_of(output) != [first.run["run_id"]]
    assert set(read(output, "runs")["run_id"]) == {first.run["run_id"], second.run["run_id"]}
    assert score_tables.table_at(output, "predictions").load().version() == 1


@pytest.mark.parametrize("name", ["predictions", "rejected", "runs"])
def test_tables_that_break_their_contract_stop_the_run_before_work_starts(
    corpus, tiny_checkpoint, tmp_path, monkeypatch, name
):
    output = str(tmp_path / "out")
    first = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)
    column = "belt_version" if name == "runs" else "run_id"
    publish_under({name: [column]}, score_tables.shown(output).run, first)
    change_text(corpus, "doc-15")
    files = sorted((tmp_path / "out").rglob("*"))
    monkeypatch.setattr(scoring, "encode_windows", lambda *_, **__: pytest.fail("encoded"))
    words = rf"{name} v\d, .*/tables/{name}: missing column {column} \(string\), which is required; use the version of"

    with pytest.raises(ConfigError, match=words):
        score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)
    with pytest.raises(ConfigError, match=words):
        score_tables.read_table(output, name)

    assert sorted((tmp_path / "out").rglob("*")) == files


def test_a_checkpoint_with_one_more_class_scores_into_the_same_table(corpus, tiny_encoder, output, tmp_path):
    classes = {"three": ("ham", "other", "spam"), "four": ("ham", "letter", "other", "spam")}
    for version, (name, labels) in enumerate(classes.items()):
        folder = save_tiny_checkpoint(tmp_path / name, tiny_encoder, labels)

        score_corpus(corpus, folder, output, spec=SPEC)

        predictions = read(output, "predictions")
        of_rows = predictions["scores"].list.eval(pl.element().struct.field("label")).to_list()
        assert of_rows == [list(labels)] * 18
        assert predictions["logits"].list.len().unique().to_list() == [len(labels)]
        assert score_tables.table_at(output, "predictions").load().version() == version
    assert read(output, "predictions", version=0)["scores"].list.len().unique().to_list() == [3]
    dataset = score_tables.table_at(output, "predictions").load().to_pyarrow_dataset()  # noqa: F841 - DuckDB finds it by name
    assert duckdb.sql("SELECT DISTINCT len(scores) FROM dataset").fetchall() == [(4,)]
