import json
import random
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from importlib import resources
from pathlib import Path
from typing import Any

import duckdb
import jsonschema
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from dataframely.random import Generator
from hypothesis import given, settings
from hypothesis import strategies as st
from open_data_contract_standard.model import SchemaObject, SchemaProperty

import data_contracts
from data_contracts import TABLES, Violation, arrow_schema, contract, message, rules, violations

PACKAGE = Path(data_contracts.__file__).parent
NUM_ROWS = 24
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
STANDARD = json.loads(resources.files("open_data_contract_standard").joinpath("schema.json").read_text())
DIGEST = "0123456789abcdef" * 4
each_table = pytest.mark.parametrize("name", TABLES)

# --- rows that satisfy a contract -----------------------------------------------------------------


def _chunks(draw: random.Random, num_rows: int) -> dict[str, list[Any]]:
    starts = [draw.randrange(0, 2000) for _ in range(num_rows)]
    lengths = [draw.randrange(0, 9) for _ in range(num_rows)]
    return {
        "doc_id": [f"d{row // 3}" for row in range(num_rows)],
        "chunk_index": [row % 3 for row in range(num_rows)],
        "start": starts,
        "stop": [start + length for start, length in zip(starts, lengths, strict=True)],
        "input_ids": [[draw.randrange(0, 2**31) for _ in range(length)] for length in lengths],
        "num_tokens": lengths,
    }


def _tokens(draw: random.Random, num_rows: int) -> dict[str, list[Any]]:
    lengths = [draw.randrange(0, 9) for _ in range(num_rows)]
    return {
        "input_ids": [[draw.randrange(0, 2**31) for _ in range(length)] for length in lengths],
        "num_tokens": lengths,
        "target": [draw.choice([None, draw.gauss()]) for _ in range(num_rows)],
        "weight": [draw.choice([None, draw.random()]) for _ in range(num_rows)],
    }


def _predictions(draw: random.Random, num_rows: int) -> dict[str, list[Any]]:
    num_labels = [draw.randrange(1, 5) for _ in range(num_rows)]
    num_tokens = [draw.randrange(0, 5000) for _ in range(num_rows)]
    num_chars = [draw.randrange(0, 5000) for _ in range(num_rows)]
    return {
        "scores": [[{"label": f"l{at}", "score": draw.random()} for at in range(num)] for num in num_labels],
        "logits": [[draw.uniform(-9, 9) for _ in range(draw.choice([1, num]))] for num in num_labels],
        "num_tokens": num_tokens,
        "num_tokens_scored": [draw.randrange(0, num + 1) for num in num_tokens],
        "top_chunk": [
            {"chunk_index": draw.randrange(0, 99), "start_char": draw.randrange(0, num + 1), "stop_char": num}
            for num in num_chars
        ],
    }


def _evidence(draw: random.Random, num_rows: int) -> dict[str, list[Any]]:
    starts = {what: [draw.randrange(0, 2000) for _ in range(num_rows)] for what in ("token", "char")}
    stops = {f"stop_{what}": [start + draw.randrange(0, 9) for start in begun] for what, begun in starts.items()}
    return {**{f"start_{what}": begun for what, begun in starts.items()}, **stops}


def _rejected(draw: random.Random, num_rows: int) -> dict[str, list[Any]]:
    return {"reason": [draw.choice(_enum("rejected", "reason")) for _ in range(num_rows)]}


def _runs(draw: random.Random, num_rows: int) -> dict[str, list[Any]]:
    num_tokens = [draw.randrange(0, 10**12) for _ in range(num_rows)]
    starts = [NOON + timedelta(microseconds=draw.randrange(0, 10**12)) for _ in range(num_rows)]
    return {
        "flow": [draw.choice(_enum("runs", "flow")) for _ in range(num_rows)],
        "precision": [draw.choice([None, *_enum("runs", "precision")]) for _ in range(num_rows)],
        "num_tokens": num_tokens,
        "num_tokens_scored": [draw.randrange(0, num + 1) for num in num_tokens],
        "started_at": starts,
        "finished_at": [start + timedelta(microseconds=draw.randrange(0, 10**12)) for start in starts],
    }


def _inventory(draw: random.Random, num_rows: int) -> dict[str, list[Any]]:
    is_good = [draw.random() < 0.5 for _ in range(num_rows)]
    return {
        "content_fingerprint": [f"{draw.getrandbits(256):064x}" if good else None for good in is_good],
        "reason": [None if good else draw.choice(_enum("rejected", "reason")) for good in is_good],
    }


def _sources(draw: random.Random, num_rows: int) -> dict[str, list[Any]]:
    num_of_files = [draw.randrange(0, 10**12) for _ in range(num_rows)]
    return {"num_rows": num_of_files, "num_documents": [draw.randrange(0, num + 1) for num in num_of_files]}


# what laws across columns and enums allow; dataframely draws the other columns
DRAWN = {
    "inventory": _inventory,
    "sources": _sources,
    "tokens": _tokens,
    "chunks": _chunks,
    "predictions": _predictions,
    "evidence": _evidence,
    "rejected": _rejected,
    "runs": _runs,
}


def sample(name: str, seed: int, num_rows: int = NUM_ROWS) -> pa.Table:
    drawn = DRAWN[name](random.Random(seed), num_rows) if name in DRAWN else None  # noqa: S311
    frame = rules(name).sample(num_rows, overrides=drawn, generator=Generator(seed))
    return frame.to_arrow().cast(arrow_schema(name))


def put(table: pa.Table, column: str, values: dict[int, Any]) -> pa.Table:
    """Replace values of a column by row; the type stays, and a null is allowed in."""
    replaced = [values.get(row, value) for row, value in enumerate(table[column].to_pylist())]
    index = table.schema.get_field_index(column)
    arrow_type = table.schema.field(index).type
    return table.set_column(index, pa.field(column, arrow_type), pa.array(replaced, arrow_type))


def retype(table: pa.Table, column: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(column), column, values)


def _enum(name: str, column: str) -> list[str]:
    (found,) = [each for each in _columns(name) if each.name == column]
    return [choice.value for choice in found.enum or []]


# --- the files ------------------------------------------------------------------------------------


def _table(name: str) -> SchemaObject:
    (table,) = contract(name).schema_ or []
    return table


def _columns(name: str) -> list[SchemaProperty]:
    return _table(name).properties or []


def _walk(columns: list[SchemaProperty]) -> Iterator[SchemaProperty]:
    for column in columns:
        yield column
        yield from _walk(column.properties or [])
        yield from _walk([column.items] if column.items is not None else [])


def test_every_file_is_a_table() -> None:
    assert sorted(path.name for path in PACKAGE.glob("*.yaml")) == sorted(f"{t}.odcs.yaml" for t in TABLES)


@each_table
def test_file_satisfies_the_standard(name: str) -> None:
    document = yaml.safe_load((PACKAGE / f"{name}.odcs.yaml").read_text(encoding="utf-8"))

    jsonschema.validate(document, STANDARD)

    assert (document["kind"], document["status"]) == ("DataContract", "active")
    assert (document["id"], document["name"]) == (f"belt.{name}", name)
    assert [table["name"] for table in document["schema"]] == [name]
    assert document["description"].keys() == {"purpose", "usage", "limitations"}


@each_table
def test_everything_is_described(name: str) -> None:
    table = _table(name)
    described = [table, *_walk(_columns(name)), *(table.quality or [])]
    described += [choice for column in _walk(_columns(name)) for choice in column.enum or []]

    bare = [each for each in described if not (each.description or "").strip().endswith(".")]

    assert bare == []


@each_table
def test_no_law_is_stated_in_a_keyword_that_is_not_read(name: str) -> None:
    read = {"name", "description", "logicalType", "physicalType", "items", "properties", "required"}
    read |= {"primaryKey", "primaryKeyPosition", "enum", "logicalTypeOptions", "customProperties"}
    for column in _walk(_columns(name)):
        assert column.model_fields_set <= read, column.name
        assert {extra.property for extra in column.customProperties or []} <= {"finite"}, column.name
        assert (column.logicalTypeOptions or {}).get("minLength", 1) == 1, "lengths are counted in bytes"
        assert column.enum is None or column.physicalType == "string", column.name
    for law in _table(name).quality or []:
        assert (law.type, law.engine) == ("custom", "polars-sql")


def test_unknown_table() -> None:
    with pytest.raises(ValueError, match=r"must be one of documents, inventory, .*, got 'document'$"):
        contract("document")


def test_unknown_option_is_not_ignored() -> None:
    column = SchemaProperty(name="n", physicalType="int32", logicalTypeOptions={"multipleOf": 2})

    with pytest.raises(KeyError, match="multipleOf"):
        data_contracts.loader._column(column, keys=True)


def test_contracts_are_read_from_an_archive(tmp_path: Path) -> None:
    archive = tmp_path / "belt.whl"
    with zipfile.ZipFile(archive, "w") as file:
        for path in [*PACKAGE.glob("*.py"), *PACKAGE.glob("*.yaml")]:
            file.write(path, f"data_contracts/{path.name}")
    code = "import data_contracts as d; print(d.__file__); print(*map(d.arrow_schema, d.TABLES))"

    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(archive)!r}); {code}"],
        capture_output=True,
        check=True,
        cwd=tmp_path,
        text=True,
    )

    assert done.stdout.startswith(str(archive))


# --- Arrow schemas --------------------------------------------------------------------------------

ITEM = "element"
TIME = pa.timestamp("us", tz="UTC")
STRINGS = pa.list_(pa.field(ITEM, pa.string(), nullable=False))
SCORE = pa.struct([pa.field("label", pa.string(), nullable=False), pa.field("score", pa.float64(), nullable=False)])
SPAN = pa.struct([pa.field(part, pa.int32(), nullable=False) for part in ("chunk_index", "start_char", "stop_char")])
# a name that ends in ? is nullable
EXPECTED: dict[str, dict[str, pa.DataType]] = {
    "documents": {
        "doc_id": pa.string(),
        "text": pa.string(),
        "label?": pa.string(),
        "labels?": STRINGS,
        "target?": pa.float64(),
    },
    "inventory": {
        "row_index": pa.int64(),
        "doc_id?": pa.string(),
        "content_fingerprint?": pa.string(),
        "num_bytes": pa.int64(),
        "reason?": pa.string(),
        "detail?": pa.string(),
    },
    "sources": {
        "source_uri": pa.string(),
        "version": pa.string(),
        **{f"num_{what}": pa.int64() for what in ("bytes", "rows", "documents")},
        "inventory_key": pa.string(),
        "scoring_fingerprint": pa.string(),
    },
    "tokens": {
        "doc_id": pa.string(),
        "input_ids": pa.list_(pa.field(ITEM, pa.int32(), nullable=False)),
        "num_tokens": pa.int32(),
        "content_fingerprint": pa.string(),
        "label?": pa.string(),
        "labels?": STRINGS,
        "target?": pa.float64(),
        "weight?": pa.float64(),
    },
    "chunks": {
        "doc_id": pa.string(),
        "chunk_index": pa.int32(),
        "start": pa.int32(),
        "stop": pa.int32(),
        "input_ids": pa.list_(pa.field(ITEM, pa.int32(), nullable=False)),
        "num_tokens": pa.int32(),
    },
    "predictions": {
        "doc_id": pa.string(),
        "label?": pa.string(),
        "labels": STRINGS,
        "score": pa.float64(),
        "scores": pa.list_(pa.field(ITEM, SCORE, nullable=False)),
        "logits": pa.list_(pa.field(ITEM, pa.float32(), nullable=False)),
        "num_tokens": pa.int32(),
        "num_tokens_scored": pa.int32(),
        "num_chunks": pa.int32(),
        "top_chunk": SPAN,
        "content_fingerprint": pa.string(),
        "checkpoint_digest": pa.string(),
        "scoring_fingerprint": pa.string(),
        "run_id": pa.string(),
        "scored_at": TIME,
        "removed_at?": TIME,
    },
    "evidence": {
        "doc_id": pa.string(),
        **{name: pa.int32() for name in ("chunk_index", "rank")},
        "label": pa.string(),
        "score": pa.float64(),
        "contribution": pa.float64(),
        **{name: pa.int32() for name in ("start_token", "stop_token", "start_char", "stop_char")},
        "text?": pa.string(),
        "run_id": pa.string(),
    },
    "rejected": {
        "source_uri": pa.string(),
        "row_index": pa.int64(),
        "doc_id?": pa.string(),
        "reason": pa.string(),
        "detail": pa.string(),
        "run_id": pa.string(),
    },
    "runs": {
        "run_id": pa.string(),
        "flow": pa.string(),
        "corpus_uri": pa.string(),
        "output_uri": pa.string(),
        "checkpoint_uri?": pa.string(),
        "checkpoint_digest?": pa.string(),
        "scoring_fingerprint?": pa.string(),
        "num_shards": pa.int32(),
        "base_run_id?": pa.string(),
        **{f"num_{what}?": pa.int64() for what in ("new", "changed", "unchanged", "removed")},
        **{f"num_{what}": pa.int64() for what in ("documents", "rejected", "chunks", "tokens")},
        "num_unknown_tokens?": pa.int64(),
        "num_tokens_scored": pa.int64(),
        "num_documents_reused": pa.int64(),
        **{f"{what}_s": pa.float64() for what in ("elapsed", "read", "tokenize", "encode", "write")},
        **{f"{what}?": pa.float64() for what in ("tokens_per_s", "padding_share", "redundant_chunk_share")},
        **{f"{what}?": pa.float64() for what in ("flops_per_s", "peak_share")},
        "precision?": pa.string(),
        "device?": pa.string(),
        "belt_version": pa.string(),
        "torch_version": pa.string(),
        "transformers_version": pa.string(),
        "started_at": TIME,
        "finished_at": TIME,
        "spec": pa.string(),
    },
}


@each_table
def test_arrow_schema(name: str) -> None:
    expected = [
        pa.field(column.removesuffix("?"), arrow_type, nullable=column.endswith("?"))
        for column, arrow_type in EXPECTED[name].items()
    ]

    assert arrow_schema(name).remove_metadata() == pa.schema(expected)
    # equality of types overlooks the names of list items
    assert [str(each) for each in arrow_schema(name).types] == [str(field.type) for field in expected]


@each_table
def test_arrow_schema_explains_itself(name: str) -> None:
    schema = arrow_schema(name)

    assert schema.metadata == {
        b"contract_id": f"belt.{name}".encode(),
        b"contract_version": str(contract(name).version).encode(),
    }
    described = {field.name: field.metadata[b"comment"].decode() for field in schema}
    assert described == {column.name: column.description for column in _columns(name)}


def test_fields_within_a_column_explain_themselves() -> None:
    span = arrow_schema("predictions").field("top_chunk").type

    assert span.field("start_char").metadata == {b"comment": b"First character of the chunk, counted from 0."}


@each_table
def test_parquet_keeps_the_schema(name: str, tmp_path: Path) -> None:
    table, path = sample(name, seed=1), str(tmp_path / "written.parquet")
    pq.write_table(table, path)

    back = pq.read_table(path)
    frame = pl.read_parquet(path)
    frame.write_parquet(tmp_path / "polars.parquet")
    duckdb.sql(f"copy (from '{path}') to '{tmp_path}/duckdb.parquet'")

    assert back.schema.equals(arrow_schema(name), check_metadata=True)
    assert back.equals(table)
    assert violations(back, name) == []
    assert frame.schema == {column: each.dtype for column, each in rules(name).columns().items()}
    for writer in ("polars", "duckdb"):
        assert pq.read_table(tmp_path / f"{writer}.parquet").cast(arrow_schema(name)).equals(table), writer


def test_duckdb_reads_the_types_an_analyst_expects(tmp_path: Path) -> None:
    path = str(tmp_path / "predictions.parquet")
    pq.write_table(sample("predictions", seed=2), path)

    read = duckdb.sql(f"from '{path}'")

    types = dict(zip(read.columns, map(str, read.types), strict=True))
    assert types["scores"] == 'STRUCT("label" VARCHAR, score DOUBLE)[]'
    assert types["top_chunk"] == "STRUCT(chunk_index INTEGER, start_char INTEGER, stop_char INTEGER)"
    assert types["scored_at"] == "TIMESTAMP WITH TIME ZONE"
    assert (types["logits"], types["num_tokens"], types["doc_id"]) == ("FLOAT[]", "INTEGER", "VARCHAR")


# --- rows that satisfy the contract pass ----------------------------------------------------------


@each_table
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_rows=st.integers(1, 9))
def test_lawful_rows_pass(name: str, seed: int, num_rows: int) -> None:
    table = sample(name, seed, num_rows)

    assert violations(table, name) == []
    assert violations(pa.concat_tables([table.slice(num_rows // 2), table.slice(0, num_rows // 2)]), name) == []
    assert violations(table.select(table.column_names[::-1]), name) == []


@each_table
def test_no_rows_pass(name: str) -> None:
    assert violations(arrow_schema(name).empty_table(), name) == []


def test_what_may_be_empty_or_null_passes() -> None:
    documents = put(sample("documents", 3), "text", {0: ""})
    for column in ("label", "labels", "target"):
        documents = put(documents, column, {0: None})
    chunks = sample("chunks", 3)
    for column, value in {"start": 0, "stop": 0, "num_tokens": 0, "input_ids": []}.items():
        chunks = put(chunks, column, {0: value})
    predictions = sample("predictions", 3)
    for column, value in {"label": None, "labels": [], "num_tokens": 0, "num_tokens_scored": 0}.items():
        predictions = put(predictions, column, {0: value})
    predictions = put(predictions, "top_chunk", {0: {"chunk_index": 0, "start_char": 0, "stop_char": 0}})

    assert violations(put(documents, "labels", {1: []}), "documents") == []
    assert violations(chunks, "chunks") == []
    assert violations(predictions, "predictions") == []


def test_checking_100_000_predictions_takes_well_under_a_second() -> None:
    table = pa.concat_tables([sample("predictions", 4, 100)] * 1000)
    table = retype(table, "doc_id", pa.array(map(str, range(table.num_rows))))
    assert violations(table.slice(0, 1), "predictions") == []

    start = time.perf_counter()
    found = violations(table, "predictions")

    assert found == []
    assert time.perf_counter() - start < 1


# --- each law, broken once, fails with its message ------------------------------------------------

BAD_SCORES: dict[str, list[Any]] = {
    "3 null scores[] (rows 0, 1, 2)": [None],
    "3 null scores[].label (rows 0, 1, 2)": [{"label": None, "score": 0.5}],
    "3 null scores[].score (rows 0, 1, 2)": [{"label": "a", "score": None}],
    "3 infinite scores[].score (rows 0, 1, 2)": [{"label": "a", "score": float("inf")}],
    "3 NaN scores[].score (rows 0, 1, 2)": [{"label": "a", "score": float("nan")}],
}
LATER = NOON + timedelta(microseconds=1)

BROKEN_ROWS: list[tuple[str, dict[str, dict[int, Any]], str]] = [
    ("documents", {"doc_id": {7: None, 19: None, 20: None}}, "3 null doc_id (rows 7, 19, 20)"),
    ("documents", {"doc_id": dict.fromkeys(range(2, 9))}, "7 null doc_id (first rows 2, 3, 4)"),
    ("documents", {"doc_id": {3: "a-17", 9: "a-17"}}, "2 duplicate doc_id (rows 3, 9: 'a-17', 'a-17')"),
    (
        "documents",
        {"doc_id": {3: "x" * 50, 9: "x" * 50}},
        f"2 duplicate doc_id (rows 3, 9: '{'x' * 36}..., '{'x' * 36}...)",
    ),
    ("documents", {"text": {0: None}}, "1 null text (row 0)"),
    ("documents", {"labels": {2: ["a", None]}}, "1 null labels[] (row 2)"),
    ("documents", {"target": {2: float("nan")}}, "1 NaN target (row 2)"),
    ("documents", {"target": {2: float("-inf")}}, "1 infinite target (row 2)"),
    (
        "chunks",
        {"doc_id": {1: "same", 5: "same"}, "chunk_index": {1: 7, 5: 7}},
        "2 duplicate (doc_id, chunk_index) (rows 1, 5: ('same', 7), ('same', 7))",
    ),
    ("chunks", {"chunk_index": {4: -1, 9: -3}}, "2 chunk_index below 0 (rows 4, 9: -1, -3)"),
    (
        "chunks",
        {"start": {6: -2}, "stop": {6: -1}, "num_tokens": {6: 1}, "input_ids": {6: [1]}},
        "1 start below 0 (row 6: -2); 1 stop below 0 (row 6: -1)",
    ),
    (
        "chunks",
        {"start": {6: 5}, "stop": {6: 3}, "num_tokens": {6: 0}, "input_ids": {6: []}},
        (
            "1 row breaks span_is_ordered: stop >= start (row 6); "
            "1 row breaks num_tokens_is_span: num_tokens = stop - start (row 6)"
        ),
    ),
    (
        "chunks",
        {"start": {6: 5}, "stop": {6: 4}, "num_tokens": {6: -1}, "input_ids": {6: []}},
        (
            "1 num_tokens below 0 (row 6: -1); 1 row breaks span_is_ordered: stop >= start (row 6); "
            "1 row breaks num_tokens_is_num_ids: ARRAY_LENGTH(input_ids) = num_tokens (row 6)"
        ),
    ),
    (
        "chunks",
        {"input_ids": {row: [1] * 20 for row in range(5)}},
        "5 rows break num_tokens_is_num_ids: ARRAY_LENGTH(input_ids) = num_tokens (first rows 0, 1, 2)",
    ),
    (
        "chunks",
        {"start": {6: 5}, "stop": {6: 6}, "num_tokens": {6: 1}, "input_ids": {6: [-7]}},
        "1 input_ids[] below 0 (row 6)",
    ),
    (
        "chunks",
        {"start": {6: 5}, "stop": {6: 6}, "num_tokens": {6: 1}, "input_ids": {6: [None]}},
        "1 null input_ids[] (row 6)",
    ),
    ("chunks", {"input_ids": {6: None}}, "1 null input_ids (row 6)"),
    (
        "tokens",
        {"input_ids": {1: [1, 2, 3]}, "num_tokens": {1: 2}},
        "1 row breaks num_tokens_is_length: ARRAY_LENGTH(input_ids) = num_tokens (row 1)",
    ),
    *[
        (
            "predictions",
            {"scores": dict.fromkeys(range(3), bad), "logits": {row: [0.0] for row in range(3)}},
            text,
        )
        for text, bad in BAD_SCORES.items()
    ],
    (
        "predictions",
        {"scores": {1: []}, "logits": {1: [0.0]}},
        "1 scores shorter than 1 (row 1)",
    ),
    ("predictions", {"labels": {1: None}}, "1 null labels (row 1)"),
    ("predictions", {"labels": {1: [None]}}, "1 null labels[] (row 1)"),
    ("predictions", {"score": {1: float("nan")}}, "1 NaN score (row 1)"),
    ("predictions", {"score": {1: None}}, "1 null score (row 1)"),
    ("predictions", {"logits": {1: [float("-inf")]}}, "1 infinite logits[] (row 1)"),
    ("predictions", {"logits": {1: [float("nan")]}}, "1 NaN logits[] (row 1)"),
    (
        "predictions",
        {"logits": {1: []}},
        (
            "1 logits shorter than 1 (row 1); 1 row breaks one_logit_or_one_per_score: "
            "ARRAY_LENGTH(logits) = 1 OR ARRAY_LENGTH(logits) = ARRAY_LENGTH(scores) (row 1)"
        ),
    ),
    (
        "predictions",
        {"logits": {1: [0.0] * 9}},
        (
            "1 row breaks one_logit_or_one_per_score: "
            "ARRAY_LENGTH(logits) = 1 OR ARRAY_LENGTH(logits) = ARRAY_LENGTH(scores) (row 1)"
        ),
    ),
    ("predictions", {"num_chunks": {4: 0}}, "1 num_chunks below 1 (row 4: 0)"),
    (
        "predictions",
        {"num_tokens": {2: 9, 3: 0}, "num_tokens_scored": {2: 10, 3: 1}},
        "2 rows break scored_within_document: num_tokens_scored <= num_tokens (rows 2, 3)",
    ),
    ("predictions", {"top_chunk": {2: None}}, "1 null top_chunk (row 2)"),
    (
        "predictions",
        {"top_chunk": {2: {"chunk_index": -1, "start_char": None, "stop_char": 5}}},
        "1 top_chunk.chunk_index below 0 (row 2); 1 null top_chunk.start_char (row 2)",
    ),
    (
        "predictions",
        {"top_chunk": {2: {"chunk_index": 0, "start_char": 6, "stop_char": 5}}},
        "1 row breaks top_chunk_is_ordered: top_chunk.start_char <= top_chunk.stop_char (row 2)",
    ),
    (
        "predictions",
        {"checkpoint_digest": {2: "ABC", 3: DIGEST + "0"}},
        ("2 checkpoint_digest not like ^[0-9a-f]{64}$ (rows 2, 3: 'ABC', '0123456789abcdef0123456789abcdef0123...)"),
    ),
    (
        "predictions",
        {"content_fingerprint": {2: DIGEST + "\n"}},
        ("1 content_fingerprint not like ^[0-9a-f]{64}$ (row 2: '0123456789abcdef0123456789abcdef0123...)"),
    ),
    ("predictions", {"run_id": {2: ""}}, "1 run_id shorter than 1 (row 2: '')"),
    ("predictions", {"scored_at": {2: None}}, "1 null scored_at (row 2)"),
    (
        "rejected",
        {"reason": {2: "text_empty"}},
        (
            "1 reason not one of doc_id_null, doc_id_invalid_utf8, doc_id_duplicate, text_null, "
            "text_invalid_utf8, label_null, label_invalid_utf8, label_unknown, target_not_finite, "
            "weight_null, weight_not_positive, output_not_finite (row 2: 'text_empty')"
        ),
    ),
    ("rejected", {"row_index": {2: -1}}, "1 row_index below 0 (row 2: -1)"),
    ("rejected", {"detail": {2: "", 5: None}}, "1 null detail (row 5); 1 detail shorter than 1 (row 2: '')"),
    (
        "runs",
        {"flow": {0: "train"}},
        "1 flow not one of chunk, fine-tune, score (row 0: 'train')",
    ),
    ("runs", {"num_rejected": {0: -1}}, "1 num_rejected below 0 (row 0: -1)"),
    ("runs", {"encode_s": {0: -0.5}}, "1 encode_s below 0 (row 0: -0.5)"),
    ("runs", {"tokens_per_s": {0: float("inf")}}, "1 infinite tokens_per_s (row 0)"),
    ("runs", {"checkpoint_digest": {0: "x"}}, "1 checkpoint_digest not like ^[0-9a-f]{64}$ (row 0: 'x')"),
    (
        "runs",
        {"started_at": {3: LATER}, "finished_at": {3: NOON}},
        "1 row breaks finishes_after_start: finished_at >= started_at (row 3)",
    ),
    (
        "runs",
        {"num_tokens": {3: 0}, "num_tokens_scored": {3: 1}},
        "1 row breaks scored_within_documents: num_tokens_scored <= num_tokens (row 3)",
    ),
    (
        "runs",
        {"num_tokens": {3: 1}, "num_tokens_scored": {3: 1}, "num_unknown_tokens": {2: None, 3: 2}},
        "1 row breaks unknown_within_documents: num_unknown_tokens IS NULL OR num_unknown_tokens <= num_tokens (row 3)",
    ),
]


@pytest.mark.parametrize(("name", "changes", "expected"), BROKEN_ROWS, ids=[case[2][:50] for case in BROKEN_ROWS])
def test_broken_rows(name: str, changes: dict[str, dict[int, Any]], expected: str) -> None:
    table = sample(name, seed=5)
    assert violations(table, name) == []

    for column, values in changes.items():
        table = put(table, column, values)

    version = 2 if name == "rejected" else 1
    assert message(violations(table, name), name, "shard 00042") == f"{name} v{version}, shard 00042: {expected}"


def _nth(index: int, values: pa.Array) -> Callable[[pa.Table], pa.Table]:
    return lambda table: retype(table, table.column_names[index], values)


INVALID_UTF8 = pa.Array.from_buffers(pa.string(), NUM_ROWS, pa.array([b"\xff"] * NUM_ROWS).buffers())
BROKEN_COLUMNS: list[tuple[str, Callable[[pa.Table], pa.Table], str]] = [
    (
        "documents",
        lambda table: table.drop_columns(["doc_id", "labels"]),
        "missing column doc_id (string); missing column labels (list<item: string>)",
    ),
    (
        "documents",
        lambda table: table.append_column("lang", pa.nulls(NUM_ROWS, pa.int8())),
        "extra column lang (int8)",
    ),
    (
        "documents",
        lambda table: put(table, "text", {0: None}).append_column("lang", pa.nulls(NUM_ROWS, pa.int8())),
        "extra column lang (int8); 1 null text (row 0)",
    ),
    (
        "documents",
        lambda table: put(table, "text", {0: None}).rename_columns({"label": "class"}),
        "missing column label (string); extra column class (string)",
    ),
    (
        "documents",
        lambda table: table.append_column("text", table["text"]),
        "2 columns named text",
    ),
    (
        "documents",
        _nth(1, INVALID_UTF8),
        "malformed column text: In chunk 0: Invalid: Invalid UTF8 sequence at string index 0",
    ),
    (
        "documents",
        lambda table: retype(table, "text", table["text"].cast(pa.large_string())),
        "column text is large_string, not string",
    ),
    (
        "chunks",
        lambda table: retype(table, "start", table["start"].cast(pa.int64())),
        "column start is int64, not int32",
    ),
    (
        "chunks",
        lambda table: retype(table, "input_ids", pa.nulls(NUM_ROWS, pa.list_(pa.int64()))),
        "column input_ids is list<item: int64>, not list<item: int32>",
    ),
    (
        "predictions",
        lambda table: retype(table, "scored_at", table["scored_at"].cast(pa.timestamp("us"))),
        "column scored_at is timestamp[us], not timestamp[us, tz=UTC]",
    ),
    (
        "predictions",
        lambda table: retype(table, "top_chunk", pa.nulls(NUM_ROWS, pa.struct({"chunk_index": pa.int32()}))),
        (
            "column top_chunk is struct<chunk_index: int32>, "
            "not struct<chunk_index: int32, start_char: int32, stop_char: int32>"
        ),
    ),
]


@pytest.mark.parametrize(("name", "change", "expected"), BROKEN_COLUMNS, ids=[case[2] for case in BROKEN_COLUMNS])
def test_broken_columns(name: str, change: Callable[[pa.Table], pa.Table], expected: str) -> None:
    found = violations(change(sample(name, seed=6)), name)

    assert message(found, name, "shard 00042") == f"{name} v1, shard 00042: {expected}"


def test_nullability_that_a_table_declares_does_not_matter() -> None:
    table = sample("predictions", seed=7)
    nullable = data_contracts._nullable(pa.struct(table.schema))
    loose = pa.Table.from_struct_array(pa.array(table.to_pylist(), nullable))

    assert loose.schema != table.schema
    assert violations(loose, "predictions") == []


def test_a_violation_says_what_and_where() -> None:
    table = put(sample("documents", seed=8), "doc_id", dict.fromkeys([7, 19, 20, 21]))

    assert violations(table, "documents") == [
        Violation(
            name="doc_id",
            rule="null",
            count=4,
            examples=(7, 19, 20),
            message="4 null doc_id (first rows 7, 19, 20)",
        )
    ]


def test_all_violations_are_reported_at_once() -> None:
    table = put(sample("predictions", seed=9), "num_chunks", {1: 0})
    table = put(table, "doc_id", {2: "twice", 3: "twice", 4: None, 5: None})
    table = put(table, "top_chunk", {6: None})

    assert message(violations(table, "predictions"), "predictions", "part-7") == (
        "predictions v1, part-7: 2 duplicate doc_id (rows 2, 3: 'twice', 'twice'); "
        "2 null doc_id (rows 4, 5); 1 num_chunks below 1 (row 1: 0); 1 null top_chunk (row 6)"
    )


def test_a_batch_is_not_asked_for_unique_keys() -> None:
    table = put(sample("documents", seed=10), "doc_id", {3: "twice", 9: "twice", 10: None})

    assert [each.rule for each in violations(table, "documents")] == ["key", "null"]
    assert [each.rule for each in violations(table, "documents", keys=False)] == ["null"]
    assert (rules("chunks").primary_key(), rules("chunks", keys=False).primary_key()) == (
        ["doc_id", "chunk_index"],
        [],
    )


@each_table
def test_every_rule_has_its_words(name: str) -> None:
    assert data_contracts._phrases(name).keys() == rules(name)._validation_rules(with_cast=False).keys()
