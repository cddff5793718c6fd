"""Publishes the tables of a small real run: `python -m tests.contracts.publish_sample FOLDER`.

Two nights of a corpus with good rows, empty texts, a repeated id, nulls and broken bytes are scored with a random
encoder. What each published table shows is copied to the DuckDB database FOLDER/published.duckdb, for tools that do not
read Delta Lake, and its contract to FOLDER/NAME.odcs.yaml, with a server that says where that is. FOLDER/broken has the
same, but a row of each table breaks its contract: who finds nothing there has not looked.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from deltalake import DeltaTable

from belt_tasks import score_tables
from belt_tasks.score_corpus import score_corpus
from belt_tasks.specs import ScoreSpec
from tests.conftest import save_tiny_checkpoint, save_tiny_encoder, words
from tests.contracts.release import IN_WORK, SUFFIX


def publish(folder: Path) -> None:
    """Publish the tables below a folder, with what tools need to test them against their contracts."""
    encoder = save_tiny_encoder(folder / "encoder", "bert")
    checkpoint = save_tiny_checkpoint(folder / "checkpoint", encoder, ("ham", "other", "spam"))
    corpus, output = folder / "corpus", folder / "output"
    corpus.mkdir()
    texts = [words(num_words, seed=num_words) for num_words in range(40)]  # the first is empty
    ids = [f"doc-{i:02}" for i in range(len(texts))]
    _write(corpus / "good.parquet", ids, texts)
    _write(
        corpus / "mixed.parquet",
        ["doc-01", None, "null", "broken", "empty", "good"],
        ["an id that came before", "no id", None, b"\xff\xfe", "", "A document."],
    )
    spec = ScoreSpec(max_rejected_share=0.7, removed="mark")
    score_corpus(str(corpus), checkpoint, str(output), spec=spec)
    _write(corpus / "good.parquet", ids[1:], ["another text", *texts[2:]])  # the first document is gone
    score_corpus(str(corpus), checkpoint, str(output), spec=spec)
    copy_tables(str(output), folder)
    copy_tables(str(output), folder / "broken", breaking=BREAKING)


BREAKING = {
    "predictions": "SET num_tokens_scored = num_tokens + 1 WHERE doc_id = 'doc-07'",
    "evidence": "SET start_char = stop_char + 1 WHERE doc_id = 'doc-07' AND rank = 1",
    "rejected": "SET reason = 'unknown' WHERE row_index = 1",
    "runs": "SET device = '' WHERE num_removed = 1",
}


def copy_tables(output: str, folder: Path, *, breaking: Mapping[str, str] = {}) -> None:
    """Copy what published tables show to a database, and their contracts to files that name it."""
    folder.mkdir(exist_ok=True)
    database = folder / "published.duckdb"
    with duckdb.connect() as connection:
        # an older DuckDB may read it
        connection.sql(f"ATTACH '{database}' AS published (STORAGE_VERSION 'v1.0.0')")
        for name in score_tables.SORTED_BY:
            connection.register("shown", DeltaTable(score_tables.table_at(output, name).uri).to_pyarrow_dataset())
            connection.sql(f"CREATE TABLE published.{name} AS FROM shown")
            if name in breaking:
                connection.sql(f"UPDATE published.{name} {breaking[name]}")
            contract = yaml.safe_load((IN_WORK / f"{name}{SUFFIX}").read_text(encoding="utf-8"))
            contract["servers"] = [
                {"server": "sample", "type": "duckdb", "database": str(database), "schema": "main"},
            ]
            for law in contract["schema"][0].get("quality", []):
                # the same law, as other tools know it
                query = f"SELECT count(*) FROM {name} WHERE NOT coalesce({law.pop('implementation')}, FALSE)"  # noqa: S608
                del law["engine"]
                law.update(type="sql", query=query, mustBe=0)
            text = yaml.safe_dump(contract, sort_keys=False)
            (folder / f"{name}{SUFFIX}").write_text(text, encoding="utf-8")


def _write(path: Path, ids: list[str | None], texts: list[Any]) -> None:
    data = [text.encode() if isinstance(text, str) else text for text in texts]
    # bytes that are called text, as a writer that checks nothing leaves them
    column = pa.array(data, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"doc_id": pa.array(ids, pa.string()), "text": column}), path)


if __name__ == "__main__":
    publish(Path(sys.argv[1]).absolute())
