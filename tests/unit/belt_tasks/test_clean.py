"""Cleaning up removes what nobody needs, and nothing that a table, a rollback or a run under way does."""

import os
from datetime import timedelta
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from polars.testing import assert_frame_equal

from belt_tasks import delta_tables, local_files, score_planning, score_tables, storage
from belt_tasks.clean import clean_up
from belt_tasks.errors import ConfigError
from belt_tasks.run_list import list_runs, roll_back
from belt_tasks.score_corpus import score_corpus, score_shards
from belt_tasks.specs import ChunkSpec, CorpusSpec, ScoreSpec

NOW = timedelta(0)


def spec(size: int = 30) -> ScoreSpec:
    return ScoreSpec(device="cpu", chunks=ChunkSpec(chunk_size=size, stride=size))


def write(corpus, name: str, text: str) -> None:
    corpus.mkdir(exist_ok=True)
    pl.DataFrame({"doc_id": [f"{name}-{i}" for i in range(3)], "text": [text] * 3}).write_parquet(
        corpus / f"{name}.parquet"
    )


@pytest.fixture
def corpus(tmp_path):
    write(tmp_path / "corpus", "a", "the quick brown fox")
    write(tmp_path / "corpus", "b", "the lazy dog")
    return tmp_path / "corpus"


def files(output: str) -> dict[str, int]:
    found = storage.list_files(output, suffix="", hidden=True)
    return {file.uri.removeprefix(output): file.num_bytes for file in found}


def tables(output: str) -> dict[str, pl.DataFrame]:
    return {name: score_tables.read_table(output, name) for name in score_tables.SORTED_BY}


def test_what_nobody_needs_goes_and_all_else_stays(corpus, tiny_checkpoint, output):
    first = score_corpus(str(corpus), tiny_checkpoint, output, spec=spec()).run["run_id"]
    storage.write_bytes(storage.join(output, "runs", first, "evaluation", "metrics.json"), b"{}")
    before = tables(output)
    write(corpus, "b", "another text")
    second = score_corpus(str(corpus), tiny_checkpoint, output, spec=spec()).run["run_id"]
    now = tables(output)
    write(corpus, "c", "never finished")
    plan = score_planning.plan_scoring(str(corpus), tiny_checkpoint, output, CorpusSpec(), spec())
    score_shards(plan, CorpusSpec())
    (corpus / "c.parquet").unlink()
    orphan = storage.join(output, "tables", "predictions", "of-a-commit-that-never-was.parquet")
    storage.write_parquet(orphan, pa.table({"doc_id": ["x"]}))
    everything = files(output)

    assert clean_up(output, older_than=timedelta(days=1)).num_files == 0
    told = clean_up(output, older_than=NOW, dry_run=True)
    assert files(output) == everything
    done = clean_up(output, older_than=NOW)

    assert done == told
    left = files(output)
    gone = {name: size for name, size in everything.items() if name not in left}
    assert (done.num_unfinished_runs, done.num_files, done.num_bytes) == (1, len(gone), sum(gone.values()))
    assert [part.what for part in done.parts] == [
        f"run {plan.run.run_id}, never shown",
        f"run {first}, what the tables have taken in",
        "inventories that no run knows",
    ]
    assert [run.run_id for run in list_runs(output)] == [second, first]
    assert not [name for name in left if plan.run.run_id in name or "/c.parquet" in name]
    assert len([name for name in left if name.startswith("/inventory/")]) == 3  # of a, and of b twice
    assert {name.rpartition("/")[2] for name in left if f"/runs/{first}/" in name} == {
        "manifest.json",
        "sources.parquet",
        "duplicates.parquet",
        "metrics.json",
        "run.parquet",
    }
    for name, table in tables(output).items():
        assert_frame_equal(table, now[name])
    assert clean_up(output, older_than=NOW).num_files == 0

    roll_back(output)  # and what was shown can still be gone back to
    assert_frame_equal(tables(output)["predictions"], before["predictions"])
    night = score_corpus(str(corpus), tiny_checkpoint, output, spec=spec())
    assert night.run["run_id"] == second
    assert_frame_equal(tables(output)["predictions"].drop("scored_at"), now["predictions"].drop("scored_at"))


def test_files_of_a_commit_that_failed_go_when_they_are_old(corpus, tiny_checkpoint, tmp_path, monkeypatch):
    output = str(tmp_path / "out")
    score_corpus(str(corpus), tiny_checkpoint, output, spec=spec())
    orphan = storage.join(output, "tables", "predictions", "of-a-commit-that-never-was.parquet")
    storage.write_parquet(orphan, pa.table({"doc_id": ["x"]}))
    monkeypatch.setattr(delta_tables, "expired_files", lambda table: [orphan] if table.name == "predictions" else [])

    assert clean_up(output, older_than=timedelta(days=1)).num_files == 0
    assert clean_up(output, older_than=NOW).num_files == 1
    assert not storage.exists(orphan)


def test_what_a_killed_process_had_half_written_goes(corpus, tiny_checkpoint, tmp_path):
    """And nobody else's files that are named much like it."""
    output = tmp_path / "out"
    run_id = score_corpus(str(corpus), tiny_checkpoint, str(output), spec=spec()).run["run_id"]
    folders = ["tables/predictions", "tables/evidence", "export/predictions", f"runs/{run_id}", "inventory"]
    half = []
    for folder in folders:
        with local_files.temporary_beside(output / folder / "a.parquet") as temporary:
            half.append(temporary)
        temporary.write_bytes(b"half")
    (output / "tables" / "predictions" / ".notes.tmp").write_bytes(b"mine")
    others = files(str(output)).keys() - {str(path).removeprefix(str(output)) for path in half}

    assert clean_up(str(output), older_than=timedelta(days=1)).num_files == 0
    done = clean_up(str(output), older_than=NOW)

    assert done.num_files == len(folders)
    assert "temporary files of processes that were killed" in {part.what for part in done.parts}
    assert files(str(output)).keys() == others


def test_a_run_that_is_taken_up_again_is_under_way_however_old_it_is(corpus, tiny_checkpoint, tmp_path):
    output = str(tmp_path / "out")
    score_corpus(str(corpus), tiny_checkpoint, output, spec=spec())
    write(corpus, "c", "a third text")
    arguments = (str(corpus), tiny_checkpoint, output, CorpusSpec(), spec())
    left = score_planning.plan_scoring(*arguments)
    for path in Path(left.run.uri).rglob("*"):
        os.utime(path, times=(86_400, 86_400))

    again = score_planning.plan_scoring(*arguments)
    clean_up(output, older_than=timedelta(days=7))

    assert again == left
    assert [receipt.counts.num_documents for receipt in score_shards(again, CorpusSpec())] == [3]


def test_a_place_without_published_tables_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing was published there by `belt score`"):
        clean_up(str(tmp_path), older_than=NOW)
