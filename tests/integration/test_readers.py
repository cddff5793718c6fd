"""The published tables as others read them: polars, DuckDB's delta_scan, pyarrow and pandas, and the README's SQL."""

import re
from importlib import resources
from pathlib import Path

import duckdb
import polars as pl
import pytest
from deltalake import DeltaTable

import data_contracts
from belt_tasks import lake, score_tables
from belt_tasks.score_corpus import score_corpus
from belt_tasks.specs import ChunkSpec, ScoreSpec
from data_contracts import loader
from tests.conftest import words

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
TABLES = sorted(score_tables.SORTED_BY)
SQL = re.findall(r"^```sql\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def output(tiny_checkpoint, tmp_path_factory) -> str:
    """Three nights of a corpus, in many small files; the last one marks what is gone."""
    root = tmp_path_factory.mktemp("readers")
    (root / "corpus").mkdir()
    spec = ScoreSpec(device="cpu", chunks=ChunkSpec(chunk_size=20, stride=10), removed="mark", max_rejected_share=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lake, "FILE_ROWS", 5)
        for night in range(3):
            rows = {f"doc-{i:02}": words(4 * i, seed=i) for i in range(night, 30 + night)}
            rows |= {"doc-07": None, f"doc-{9 + night:02}": "another text"}
            frame = pl.DataFrame({"doc_id": list(rows), "text": list(rows.values())})
            frame.write_parquet(root / "corpus" / "a.parquet")
            score_corpus(str(root / "corpus"), tiny_checkpoint, str(root / "out"), spec=spec)
    return str(root / "out")


@pytest.fixture(scope="module")
def database():
    """DuckDB with its Delta extension."""
    (extension,) = resources.files("duckdb_extension_delta").glob("extensions/*/delta.duckdb_extension")
    connection = duckdb.connect()
    connection.load_extension(str(extension))
    return connection


@pytest.mark.parametrize("name", TABLES)
def test_every_reader_finds_the_same_rows(output, database, name):
    expected = score_tables.read_table(output, name)
    uri, keys = f"{output}/tables/{name}", list(score_tables.SORTED_BY[name])

    assert len(expected) > 0
    assert pl.read_delta(uri).sort(keys).equals(expected)
    assert pl.DataFrame(DeltaTable(uri).to_pyarrow_table()).sort(keys).equals(expected)
    pandas = DeltaTable(uri).to_pandas().sort_values(keys)
    assert pandas[keys].to_numpy().tolist() == [list(row) for row in expected.select(keys).rows()]
    flat = [column for column, kind in expected.schema.items() if not kind.is_nested() and kind != pl.Datetime]
    rows = database.execute(f"SELECT {', '.join(flat)} FROM delta_scan('{uri}') ORDER BY {', '.join(keys)}").fetchall()  # noqa: S608 - a test's
    assert rows == expected.select(flat).rows()


@pytest.mark.parametrize("name", TABLES)
def test_tables_and_columns_say_what_they_are(output, name):
    table = DeltaTable(f"{output}/tables/{name}")

    assert table.metadata().description == data_contracts.purpose(name)
    comments = {field.name: field.metadata["comment"] for field in table.schema().fields}  # as Spark names them
    assert comments == {column.name: column.description for column in loader.columns(name)}


def test_a_lookup_by_doc_id_opens_one_file(output, database):
    query = f"EXPLAIN ANALYZE SELECT * FROM delta_scan('{output}/tables/predictions') WHERE doc_id = 'doc-15'"  # noqa: S608 - a test's

    plan = database.execute(query).fetchall()[0][1]

    read, number = map(int, re.search(r"Scanning Files: (\d+)/(\d+)", plan).groups())
    assert read == 1
    assert number >= 4


def test_the_readme_has_a_query_for_each_question():
    questions = ["label counts by day", "drift of the mean score", "of which least was read", "why these documents got"]
    assert len(SQL) == len(questions)
    assert all(question in query for question, query in zip(questions, SQL, strict=True))


@pytest.mark.parametrize("query", SQL)
def test_the_readme_s_queries_answer_their_question(output, database, query):
    found = database.execute(query.replace(".belt/demo/predictions", output)).pl()
    table = score_tables.read_table(output, "predictions")
    present = table.filter(pl.col("removed_at").is_null())

    assert len(found) > 0
    if "documents" in found.columns:
        assert found["documents"].sum() == len(present)
    elif "drift" in found.columns:
        assert found["mean_score"][0] == pytest.approx(present["score"].mean())
    elif "coverage" in found.columns:
        assert found["coverage"].is_sorted()
    else:
        best = score_tables.read_table(output, "evidence").filter(pl.col("rank") == 1)
        joined = found.join(best, on="doc_id", suffix="_best")
        assert len(joined) == len(found)
        assert joined["contribution"].equals(joined["contribution_best"], check_names=False)
