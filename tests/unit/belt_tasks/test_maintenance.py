"""Published tables are looked through, and whatever breaks their contracts is told, file by file."""

from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from belt_tasks import lake
from belt_tasks.errors import ConfigError, ContractError
from belt_tasks.maintenance import check_tables
from belt_tasks.score_corpus import score_corpus
from belt_tasks.score_tables import SORTED_BY, read_table, table_at
from belt_tasks.specs import ChunkSpec, ScoreSpec
from tests.conftest import words

SPEC = ScoreSpec(device="cpu", chunks=ChunkSpec(chunk_size=20, stride=20), max_rejected_share=1.0)


@pytest.fixture
def output(tiny_checkpoint, tmp_path, monkeypatch) -> str:
    """Tables of several files."""
    monkeypatch.setattr(lake, "FILE_ROWS", 5)
    (tmp_path / "corpus").mkdir()
    rows = {"doc_id": [f"doc-{i:02}" for i in range(30)], "text": [None, *(words(i, seed=i) for i in range(1, 30))]}
    pl.DataFrame(rows).write_parquet(tmp_path / "corpus" / "a.parquet")
    score_corpus(str(tmp_path / "corpus"), tiny_checkpoint, str(tmp_path / "out"), spec=SPEC)
    return str(tmp_path / "out")


def files(output: str, name: str) -> list[str]:
    table = table_at(output, name)
    return lake.file_uris(table, table.load().version())


def replace(uri: str, column: str, values: list) -> None:
    """As if someone else had written another column into a file of a table."""
    rows = pq.read_table(uri)
    i = rows.schema.names.index(column)
    pq.write_table(rows.set_column(i, rows.schema.field(i), pa.array(values, rows.schema.field(i).type)), uri)


def test_sound_tables_are_counted(output):
    found = {check.table: (check.num_files, check.num_rows) for check in check_tables(output)}

    assert found == {name: (len(files(output, name)), len(read_table(output, name))) for name in SORTED_BY}
    assert found["predictions"][0] > 2
    assert found["rejected"] == (1, 1)


def test_all_that_is_wrong_is_told_at_once(output):
    first, second, *_ = files(output, "predictions")
    number = pq.read_metadata(first).num_rows
    replace(first, "num_tokens_scored", [-1] * number)
    replace(second, "doc_id", ["doc-00"] * pq.read_metadata(second).num_rows)

    with pytest.raises(ContractError) as raised:
        check_tables(output)

    lines = str(raised.value).split("\n")
    assert lines[0].startswith(f"predictions v1, {first}: {number} num_tokens_scored below 0")
    assert lines[1].startswith(f"predictions v1, {second}: ")
    assert "duplicate doc_id" in lines[1]
    assert lines[2] == f"predictions, {second}: begins with doc_id 'doc-00', but 'doc-07' came before"
    assert len(lines) == 3


def test_a_file_that_is_gone_is_named(output):
    Path(files(output, "evidence")[0]).unlink()

    with pytest.raises(ConfigError, match=r"cannot read .*/tables/evidence/.*: no such file"):
        check_tables(output)


def test_a_place_without_tables_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing was published there by `belt score`"):
        check_tables(str(tmp_path))
