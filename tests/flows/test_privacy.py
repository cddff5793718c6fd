"""Texts stay in the corpus: no log, error, artifact or table of `belt` quotes one, even where rows or files are bad."""

import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from belt_tasks import score_tables

MARKED = "xylophone quartz"
TEXTS = [
    f"{MARKED} the lazy dog".encode(),
    b"the quick brown fox " * 40 + MARKED.encode(),
    f"{MARKED}\x00 in between {MARKED}".encode(),
    f"{MARKED} repeated id".encode(),
    MARKED.encode() + b" \xff\xfe " + MARKED.encode(),
    None,
]
IDS = ["a", "b", "c", "a", "d", "e"]


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = pc.cast(pa.array(TEXTS, pa.binary()), pa.string(), safe=False)
    pq.write_table(pa.table({"doc_id": IDS, "text": texts}), folder / "good.parquet")
    return folder


def belt(tmp_path: Path, *arguments: str | Path) -> tuple[int, str]:
    """Exit code and all that a command says, as loud as it can."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "--verbose", *map(str, arguments)],
        env=own | {"PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_LOGGING_LEVEL": "DEBUG"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def kept(folder: Path) -> bytes:
    """All bytes of the files below a folder but Parquet's, which are compressed."""
    return b"".join(
        path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".parquet"
    )


def test_what_belt_says_and_keeps_quotes_no_text(corpus, tiny_checkpoint, tmp_path):
    output = tmp_path / "out"
    arguments = ["score", corpus, "--checkpoint", tiny_checkpoint, "--output", output, "--max-rejected-share", "0.9"]

    code, said = belt(tmp_path, *arguments)

    assert code == 0, said
    assert "Task run 'score-" in said  # the log is there
    assert "text_invalid_utf8 1" in said
    in_tables = strings(output)
    assert "not valid UTF-8" in in_tables

    (corpus / "bad.parquet").write_bytes(garbled((corpus / "good.parquet").read_bytes()))
    code, complaint = belt(tmp_path, *arguments)

    assert code == 1
    assert "bad.parquet" in complaint
    kept_by_prefect, kept_by_belt = kept(tmp_path / "prefect"), kept(output)
    assert b"score-summary" in kept_by_prefect
    for word in MARKED.split():
        assert word not in said + complaint + in_tables
        assert word.encode() not in kept_by_prefect + kept_by_belt


def strings(output: Path) -> str:
    """All strings of the published tables, whatever column they are in."""
    tables = [score_tables.read_table(str(output), name) for name in ("predictions", "evidence", "rejected", "runs")]
    return "\n".join(
        value for table in tables for column in table.select(pl.col(pl.String)) for value in column.drop_nulls()
    )


def garbled(data: bytes) -> bytes:
    """A Parquet file whose footer is whole and whose pages are not."""
    middle = len(data) // 2
    return data[:8] + bytes(255 - byte for byte in data[8:middle]) + data[middle:]
