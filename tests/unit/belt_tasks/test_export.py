"""The export holds what the table shows, for tools that read nothing but Parquet."""

import json

import duckdb
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from belt_tasks import lake, score_tables, storage
from belt_tasks.errors import ConfigError
from belt_tasks.export import export_predictions
from belt_tasks.run_list import roll_back
from belt_tasks.score_corpus import score_corpus
from belt_tasks.specs import ChunkSpec, ScoreSpec
from tests.conftest import words

SPEC = ScoreSpec(device="cpu", chunks=ChunkSpec(chunk_size=30, stride=30), export=True)


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "corpus").mkdir()
    for i in range(3):
        rows = {"doc_id": [f"{i}-{j}" for j in range(10)], "text": [words(20, seed=10 * i + j) for j in range(10)]}
        pl.DataFrame(rows).write_parquet(tmp_path / "corpus" / f"{i}.parquet")
    return tmp_path / "corpus"


def check(output: str) -> None:
    manifest = json.loads(storage.read_bytes(f"{output}/export/manifest.json"))
    frames = [pl.read_parquet(storage.read_bytes(f"{output}/{file}")) for file in manifest["files"]]
    table = score_tables.read_table(output, "predictions")
    assert_frame_equal(pl.concat(frames), table)
    assert manifest["num_rows"] == len(table)
    assert manifest["run_id"] == score_tables.shown(output).run_id


def test_every_night_is_exported_whole(corpus, tiny_checkpoint, s3_root, monkeypatch):
    monkeypatch.setattr(lake, "FILE_ROWS", 4)
    for night in range(3):
        pl.DataFrame({"doc_id": [f"new-{night}"], "text": ["fox"]}).write_parquet(corpus / f"new-{night}.parquet")
        score_corpus(str(corpus), tiny_checkpoint, s3_root, spec=SPEC)
        check(s3_root)
    files = storage.list_files(f"{s3_root}/export", suffix=".parquet")
    assert len({file.uri.rpartition("/")[0] for file in files}) == 2  # this night's and the last one's

    before = [file.version for file in storage.list_files(f"{s3_root}/export", suffix="")]
    score_corpus(str(corpus), tiny_checkpoint, s3_root, spec=SPEC)
    assert [file.version for file in storage.list_files(f"{s3_root}/export", suffix="")] == before

    roll_back(s3_root)
    check(s3_root)


def test_an_export_that_was_interrupted_is_made_again(corpus, tiny_checkpoint, tmp_path, monkeypatch):
    output = str(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", _fails_at(f"{output}/export/manifest.json", storage.write_bytes))
        with pytest.raises(OSError, match="no more"):
            score_corpus(str(corpus), tiny_checkpoint, output, spec=SPEC)

    score_corpus(str(corpus), tiny_checkpoint, output, spec=SPEC)

    check(output)
    pattern = json.loads((tmp_path / "out" / "export" / "manifest.json").read_text())["glob"]
    assert duckdb.execute(f"SELECT count(*) FROM '{output}/{pattern}'").fetchall() == [(30,)]  # noqa: S608 - a test's


def _fails_at(uri: str, write):
    def fail(where: str, data: bytes) -> None:
        if where == uri:
            raise OSError("no more")
        write(where, data)

    return fail


def test_there_is_nothing_to_export_where_nothing_was_published(tmp_path):
    with pytest.raises(ConfigError, match="nothing is published there"):
        export_predictions(str(tmp_path))
