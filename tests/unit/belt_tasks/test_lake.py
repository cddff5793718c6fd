"""The lake: after any sequence of commits a table holds what a dictionary would, whoever reads it."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import deltalake
import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pytest
from dataframely.random import Generator
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

import data_contracts
from belt_tasks import delta_tables, lake, sorted_files, storage
from belt_tasks.delta_tables import TableRef
from belt_tasks.errors import ConfigError, ConflictError, TransientError
from belt_tasks.lake import Change
from tests.conftest import other_contract
from tests.delta_readers import by_delta_lake, by_polars

ROOT = Path(__file__).parents[3]
SCHEMA = data_contracts.arrow_schema("rejected")
NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    """An empty place to publish to."""
    return str(tmp_path / "lake") if request.param == "local" else request.getfixturevalue("s3_root")


@pytest.fixture
def small_files(monkeypatch):
    """A few rows a file and a row group, so that a small table has many."""
    monkeypatch.setattr(lake, "FILE_ROWS", 8)
    monkeypatch.setattr(sorted_files, "ROW_GROUP_ROWS", 3)


def table_at(root) -> TableRef:
    return TableRef(
        uri=storage.join(root, "tables", "rejected"), name="rejected", key="source_uri", order=("row_index",)
    )


def rows(content: Mapping[str, int], run_id: str) -> pa.Table:
    """A key has as many rows as `content` says."""
    values = [
        {
            "run_id": run_id,
            "source_uri": key,
            "row_index": i,
            "doc_id": None,
            "reason": "text_null",
            "detail": f"{key} of {run_id}",
        }
        for key, number in sorted(content.items())
        for i in range(number)
    ]
    return pa.Table.from_pylist(values, schema=SCHEMA)


def write(root, content: Mapping[str, int], run_id: str, *, num_files=1) -> tuple[str, ...]:
    uris = []
    for i in range(num_files):
        part = {key: number for j, (key, number) in enumerate(sorted(content.items())) if j % num_files == i}
        uri = storage.join(root, "runs", run_id, f"{i}.parquet")
        with storage.parquet_writer(uri, SCHEMA) as writer:
            writer.write_table(rows(part, run_id), row_group_size=3)
        uris.append(uri)
    return tuple(uris)


def read(table: TableRef, version=None) -> list[tuple]:
    delta = table.load(version)
    found = pl.concat(pl.DataFrame(storage.read_parquet(storage.join(table.uri, path))) for path in paths(delta))
    return sorted(found.select("source_uri", "row_index", "run_id").iter_rows())


def paths(delta):
    return pa.table(delta.get_add_actions(flatten=True))["path"].to_pylist()


def expected(content: Mapping[str, tuple[int, str]]) -> list[tuple]:
    return sorted((key, i, run_id) for key, (number, run_id) in content.items() for i in range(number))


def keys(root: str, names: Collection[str], run_id: str) -> tuple[str, ...]:
    """Keys as a file that a change names."""
    uri = storage.join(root, "gone", f"{run_id}.parquet")
    storage.write_parquet(uri, pa.table({"source_uri": pa.array(sorted(names), pa.string())}))
    return (uri,)


KEYS = st.text(st.sampled_from("ab/é𝄞 "), min_size=1, max_size=4)
CHANGES = st.lists(
    st.tuples(
        st.dictionaries(KEYS, st.integers(1, 5), max_size=12), st.frozensets(KEYS, max_size=6), st.integers(1, 3)
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.usefixtures("small_files")
@given(changes=CHANGES)
@settings(deadline=None)
def test_a_table_holds_what_a_dictionary_would(tmp_path_factory, changes):
    root = str(tmp_path_factory.mktemp("law"))
    table, content, version = table_at(root), {}, None
    for i, (new, removed, num_files) in enumerate(changes):
        run_id = f"run{i}"
        gone = removed - new.keys()
        change = Change(new_uris=write(root, new, run_id, num_files=num_files), removed_uris=keys(root, gone, run_id))

        committed = lake.commit(table, change, run_id=run_id, base_version=version)

        content = {key: its for key, its in content.items() if key not in gone}
        content |= {key: (number, run_id) for key, number in new.items()}
        version = committed.version
        assert (version, committed.reused) == (i, False)
        assert committed.num_rows == len(expected(content))
        if content:
            assert read(table) == expected(content)
        again = lake.commit(table, change, run_id=run_id, base_version=version)
        assert (again.version, again.reused, again.num_files_written) == (version, True, 0)
    check_order(table)


def check_order(table: TableRef) -> None:
    """Files are sorted, do not overlap, and say so."""
    delta = table.load()
    files = []
    for file in pa.table(delta.get_add_actions(flatten=True)).to_pylist():
        frame = pl.DataFrame(storage.read_parquet(storage.join(table.uri, file["path"])))
        assert len(frame) == file["num_records"]
        assert frame["source_uri"][0] == file["min.source_uri"]
        assert frame["source_uri"][-1] == file["max.source_uri"]
        assert frame.select("source_uri", "row_index").equals(frame.select("source_uri", "row_index").sort(pl.all()))
        files.append((file["min.source_uri"], file["max.source_uri"]))
    assert all(before[1] < after[0] for before, after in pairwise(sorted(files)))


@pytest.mark.usefixtures("small_files")
def test_a_run_rewrites_only_files_whose_keys_it_touches(tmp_path):
    table = table_at(str(tmp_path))
    content = {f"k{i:03}": 1 for i in range(100)}
    lake.commit(
        table, Change(new_uris=write(str(tmp_path), content, "one", num_files=3)), run_id="one", base_version=None
    )
    before = set(paths(table.load()))
    assert len(before) > 8

    change = Change(
        new_uris=write(str(tmp_path), {"k050": 1}, "two"),
        removed_uris=keys(str(tmp_path), {"k051", "not there"}, "two"),
    )
    committed = lake.commit(table, change, run_id="two", base_version=0)

    after = set(paths(table.load()))
    assert len(before - after) <= 2
    assert committed.num_files_written == len(after - before) <= 2
    assert committed.num_rows == 99


@pytest.mark.usefixtures("small_files")
def test_every_reader_finds_the_same(root):
    table = table_at(root)
    lake.commit(
        table, Change(new_uris=write(root, {f"k{i}": 2 for i in range(30)}, "one")), run_id="one", base_version=None
    )
    lake.commit(table, Change(new_uris=write(root, {"k7": 1}, "two")), run_id="two", base_version=0)
    options = storage.delta_options(table.uri)

    frames = [
        by_polars(table.uri),
        by_delta_lake(table.uri),
        pl.from_pandas(deltalake.DeltaTable(table.uri, storage_options=options).to_pandas()),
    ]

    for frame in frames:
        assert sorted(frame.select("source_uri", "row_index", "run_id").iter_rows()) == read(table)
        assert len(frame) == 59
    assert len(by_polars(table.uri, 0)) == 60


READERS = {
    "belt": "delta_tables.scan(TableRef(uri=uri, name='rejected', key='source_uri')).collect()",
    "polars": "pl.read_delta(uri, storage_options=storage.delta_options(uri))",
}


@pytest.mark.parametrize("reader", READERS)
def test_belt_leaves_nothing_behind_that_reads_the_environment_where_polars_does(s3_root, reader):
    """What polars leaves tells of itself where it is asked to, ten times a second."""
    table = table_at(s3_root)
    lake.commit(table, Change(new_uris=write(s3_root, {"a": 1}, "one")), run_id="one", base_version=None)
    code = f"""
import sys, time
import polars as pl
from belt_tasks import delta_tables, storage
from belt_tasks.delta_tables import TableRef
uri = {table.uri!r}
assert len({READERS[reader]}) == 1
print("read", file=sys.stderr, flush=True)
time.sleep(0.5)
"""
    environment = os.environ | {"POLARS_LOG_CONCURRENCY": "1"}

    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    _, _, afterwards = done.stderr.partition("read\n")
    assert (afterwards == "") == (reader == "belt"), done.stderr


def test_statistics_are_bounds_of_what_is_there():
    schema = data_contracts.arrow_schema("runs")
    values = {field.name: None for field in schema} | {
        "run_id": "b" * 500,
        "flow": "x" * 500,
        "elapsed_s": 1.5,
        "started_at": NOW,
        "num_tokens": 7,
    }
    table = pa.Table.from_pylist([values], schema=pa.schema([field.with_nullable(True) for field in schema]))

    found = lake._statistics(table, "run_id")

    assert found["numRecords"] == 1
    assert found["minValues"]["run_id"] == "b" * 500
    assert "flow" not in found["minValues"]
    assert found["minValues"]["num_tokens"] == found["maxValues"]["num_tokens"] == 7
    assert datetime.fromisoformat(found["minValues"]["started_at"]) <= NOW
    assert NOW <= datetime.fromisoformat(found["maxValues"]["started_at"]) <= NOW + timedelta(milliseconds=1)
    assert found["nullCount"]["flow"] == 0
    assert found["nullCount"]["corpus_uri"] == 1
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("rounds", [8])
def test_of_runs_at_once_one_wins_and_the_others_are_told(root, rounds):
    table = table_at(root)
    content = {f"k{i}": 1 for i in range(5)}
    lake.commit(table, Change(new_uris=write(root, content, "first")), run_id="first", base_version=None)
    held = dict.fromkeys(content, (1, "first"))
    for version in range(rounds):
        names = [f"run{version}-{i}" for i in range(3)]
        uris = {name: write(root, {"k1": 2, name: 1}, name) for name in names}
        barrier = threading.Barrier(len(names))

        def race(name, uris=uris, barrier=barrier, version=version):
            barrier.wait()
            try:
                return lake.commit(table, Change(new_uris=uris[name]), run_id=name, base_version=version)
            except ConflictError as error:
                return str(error)

        with ThreadPoolExecutor(len(names)) as pool:
            outcomes = dict(zip(names, pool.map(race, names), strict=True))

        winners = [name for name, outcome in outcomes.items() if isinstance(outcome, lake.Committed)]
        assert len(winners) == 1, outcomes
        held |= {"k1": (2, winners[0]), winners[0]: (1, winners[0])}
        assert read(table) == expected(held)
        assert all("nothing of this run was published; run again" in o for n, o in outcomes.items() if n not in winners)


def test_of_runs_that_make_a_table_one_wins(root):
    table = table_at(root)
    uris = {name: write(root, {name: 1}, name) for name in "abc"}
    barrier = threading.Barrier(3)

    def race(name):
        barrier.wait()
        try:
            return lake.commit(table, Change(new_uris=uris[name]), run_id=name, base_version=None)
        except ConflictError:
            return None

    with ThreadPoolExecutor(3) as pool:
        outcomes = dict(zip("abc", pool.map(race, "abc"), strict=True))

    (winner,) = [name for name, outcome in outcomes.items() if outcome is not None]
    assert read(table) == [(winner, 0, winner)]
    assert table.load().version() == 0


def test_two_attempts_at_one_run_are_one_commit(root):
    table = table_at(root)
    uris = write(root, {"a": 1, "b": 2}, "one")
    barrier = threading.Barrier(3)

    def race(_):
        barrier.wait()
        return lake.commit(table, Change(new_uris=uris), run_id="one", base_version=None)

    with ThreadPoolExecutor(3) as pool:
        outcomes = list(pool.map(race, range(3)))

    assert {outcome.version for outcome in outcomes} == {0}
    assert read(table) == [("a", 0, "one"), ("b", 0, "one"), ("b", 1, "one")]


def test_a_run_planned_on_another_version_changes_nothing(tmp_path):
    table = table_at(str(tmp_path))
    lake.commit(table, Change(new_uris=write(str(tmp_path), {"a": 1}, "one")), run_id="one", base_version=None)

    for base in (None, 3):
        with pytest.raises(ConflictError, match=r"at version 0 now; nothing of this run was published"):
            lake.commit(table, Change(new_uris=write(str(tmp_path), {"b": 1}, "two")), run_id="two", base_version=base)

    assert read(table) == [("a", 0, "one")]


@pytest.mark.usefixtures("small_files")
def test_a_run_may_come_back_after_another(tmp_path):
    """An older checkpoint is put back: its run is complete, the table shows another's."""
    table, root = table_at(str(tmp_path)), str(tmp_path)
    contents = {"one": {f"k{i}": 1 for i in range(30)}, "two": {f"k{i}": 2 for i in range(20, 40)}}
    for version, name in enumerate(("one", "two", "one", "two")):
        change = Change(new_uris=write(root, contents[name], name), replaces_all=True)
        base = version - 1 if version else None

        assert lake.commit(table, change, run_id=name, base_version=base).version == version
        assert lake.commit(table, change, run_id=name, base_version=base).reused  # the plan again
        assert lake.commit(table, change, run_id=name, base_version=version).reused  # planned again, and shown
        assert read(table) == expected({key: (number, name) for key, number in contents[name].items()})
        assert delta_tables.shown_run(table.load()) == name


def test_an_error_before_the_commit_leaves_the_table_and_the_next_attempt_does_it(tmp_path, monkeypatch):
    table = table_at(str(tmp_path))
    lake.commit(table, Change(new_uris=write(str(tmp_path), {"a": 1, "b": 1}, "one")), run_id="one", base_version=None)
    change = Change(new_uris=write(str(tmp_path), {"b": 2, "c": 1}, "two"))

    with monkeypatch.context() as patch:
        patch.setattr(lake, "_commit", lambda *_: (_ for _ in ()).throw(TransientError("the line is cut")))
        with pytest.raises(TransientError):
            lake.commit(table, change, run_id="two", base_version=0)
    assert read(table) == [("a", 0, "one"), ("b", 0, "one")]

    lake.commit(table, change, run_id="two", base_version=0)
    assert read(table) == [("a", 0, "one"), ("b", 0, "two"), ("b", 1, "two"), ("c", 0, "two")]


def test_an_answer_that_is_lost_is_found_out(tmp_path, monkeypatch):
    """The commit is there, its confirmation is not: the next attempt sees it and adds nothing."""
    table = table_at(str(tmp_path))
    change = Change(new_uris=write(str(tmp_path), {"a": 1}, "one"))
    really = lake._commit

    def lose(*arguments):
        really(*arguments)
        raise TransientError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(lake, "_commit", lose)
        with pytest.raises(TransientError):
            lake.commit(table, change, run_id="one", base_version=None)

    assert lake.commit(table, change, run_id="one", base_version=None).reused
    assert read(table) == [("a", 0, "one")]


def test_a_place_that_delta_lake_cannot_write_is_named():
    with pytest.raises(ConfigError, match="tables are published to local paths and to abfs, gs, s3, got memory://"):
        table_at("memory://somewhere").load()


def test_history_says_which_run_made_what(tmp_path):
    table = table_at(str(tmp_path))
    for i, name in enumerate(("one", "two")):
        uris = write(str(tmp_path), {name: 1}, name)
        lake.commit(table, Change(new_uris=uris), run_id=name, base_version=i - 1 if i else None)

    assert [entry["belt.run_id"] for entry in table.load().history()] == ["two", "one"]
    assert read(table, version=0) == [("one", 0, "one")]


# --- tables that were made under another contract ---------------------------------------------------


def without(*names: str):
    """A change of a contract: it has no such columns."""
    return lambda columns: [columns.pop(name) for name in names]


def retyped(name: str, physical: str, logical: str):
    return lambda columns: columns[name].update(physicalType=physical, logicalType=logical)


def with_lang(columns) -> None:
    """A change of a contract: it has one more column."""
    columns["lang"] = {"name": "lang", "description": "New.", "physicalType": "string", "logicalType": "string"}


ONE_SCORE = {
    "scores": [[{"label": "a", "score": 0.5}]] * 3,
    "logits": [[1.0]] * 3,
    "num_tokens": [3] * 3,
    "num_tokens_scored": [2] * 3,
    "top_chunk": [{"chunk_index": 0, "start_char": 1, "stop_char": 9 + i} for i in range(3)],
}


def made_under(change, root, content: Mapping[str, int]) -> TableRef:
    """A table that belt wrote under another contract, by run `one`; its rows have a doc_id where there is one."""
    table = table_at(root)
    with other_contract("rejected", change):
        uris = write(root, content, "one")
        lake.commit(table, Change(new_uris=uris), run_id="one", base_version=None)
    return table


def with_ids(root, content: Mapping[str, int], run_id: str) -> tuple[str, ...]:
    uri = storage.join(root, "runs", run_id, "ids.parquet")
    found = rows(content, run_id)
    i = found.schema.get_field_index("doc_id")
    storage.write_parquet(uri, found.set_column(i, SCHEMA.field(i), pa.array(["known"] * len(found))))
    return (uri,)


def commits(table: TableRef) -> list[tuple[int, str | None]]:
    return [(entry["version"], entry.get("belt.run_id")) for entry in table.load().history()]


@pytest.mark.usefixtures("small_files")
def test_a_table_gains_a_column_of_the_contract_by_the_commit_of_the_next_run(root):
    table = made_under(without("doc_id"), root, {f"k{i:02}": 1 for i in range(30)})
    before = table.load()
    assert "doc_id" not in pa.schema(before.schema().to_arrow()).names
    assert len(paths(before)) > 1

    committed = lake.commit(table, Change(new_uris=with_ids(root, {"k07": 2}, "two")), run_id="two", base_version=0)

    assert (committed.version, committed.num_rows) == (1, 31)
    assert commits(table) == [(1, "two"), (0, "one")]
    after = table.load()
    assert pa.schema(after.schema().to_arrow()).equals(SCHEMA)
    assert (after.metadata().id, after.metadata().name) == (before.metadata().id, "rejected")
    assert after.metadata().configuration == lake.TABLE_PROPERTIES
    check_order(table)
    options = storage.delta_options(table.uri)
    dataset = deltalake.DeltaTable(table.uri, storage_options=options).to_pyarrow_dataset()
    by_reader = {
        "polars": by_polars(table.uri),
        "pyarrow": pl.DataFrame(dataset.to_table()),
        "duckdb": duckdb.sql("FROM dataset").pl(),
    }
    old = {(f"k{i:02}", 0): None for i in range(30) if i != 7}
    for reader, frame in by_reader.items():
        found = {(key, index): doc_id for key, index, doc_id in frame["source_uri", "row_index", "doc_id"].iter_rows()}
        assert found == old | {("k07", 0): "known", ("k07", 1): "known"}, reader
    assert "doc_id" not in by_polars(table.uri, 0).columns


def test_an_empty_table_gains_a_column_too(root):
    table = made_under(without("doc_id"), root, {})

    lake.commit(table, Change(new_uris=with_ids(root, {"a": 1}, "two")), run_id="two", base_version=0)

    assert pl.DataFrame(table.load().to_pyarrow_dataset().to_table())["doc_id"].to_list() == ["known"]


def test_nothing_to_change_but_the_columns(root):
    table = made_under(without("doc_id"), root, {"a": 1})

    committed = lake.commit(table, Change(), run_id="two", base_version=0)

    assert (committed.version, committed.num_rows) == (1, 1)
    assert pa.schema(table.load().schema().to_arrow()).equals(SCHEMA)


@pytest.mark.usefixtures("small_files")
def test_a_run_that_replaces_all_rows_changes_the_columns_as_well(tmp_path):
    root = str(tmp_path)
    table = made_under(without("doc_id"), root, {f"k{i:02}": 1 for i in range(30)})

    change = Change(new_uris=with_ids(root, {"new": 1}, "two"), replaces_all=True)
    committed = lake.commit(table, change, run_id="two", base_version=0)

    assert committed.num_rows == 1
    assert delta_tables.scan(table).select("source_uri", "doc_id").collect().rows() == [("new", "known")]


@pytest.mark.usefixtures("small_files")
def test_of_runs_at_once_that_add_a_column_one_wins(root):
    table = made_under(without("doc_id"), root, {f"k{i:02}": 1 for i in range(10)})
    names = ["two", "three", "four"]
    uris = {name: with_ids(root, {name: 1}, name) for name in names}
    barrier = threading.Barrier(len(names))

    def race(name):
        barrier.wait()
        try:
            return lake.commit(table, Change(new_uris=uris[name]), run_id=name, base_version=0)
        except ConflictError:
            return None

    with ThreadPoolExecutor(len(names)) as pool:
        outcomes = dict(zip(names, pool.map(race, names), strict=True))

    (winner,) = [name for name, outcome in outcomes.items() if outcome is not None]
    assert commits(table) == [(1, winner), (0, "one")]
    assert {key for key, _, _ in read(table)} == {f"k{i:02}" for i in range(10)} | {winner}


def test_killed_before_the_commit_the_table_has_its_old_columns(tmp_path, monkeypatch):
    root = str(tmp_path)
    table = made_under(without("doc_id"), root, {"a": 1})
    change = Change(new_uris=with_ids(root, {"b": 1}, "two"))

    with monkeypatch.context() as patch:
        patch.setattr(lake, "_commit", lambda *_: (_ for _ in ()).throw(TransientError("the line is cut")))
        with pytest.raises(TransientError):
            lake.commit(table, change, run_id="two", base_version=0)
    assert commits(table) == [(0, "one")]
    assert "doc_id" not in table.load().to_pyarrow_dataset().schema.names

    assert lake.commit(table, change, run_id="two", base_version=0).version == 1
    assert lake.commit(table, change, run_id="two", base_version=0).reused


def test_a_version_without_the_column_is_restored_read_and_changed_again(root):
    table = made_under(without("doc_id"), root, {"a": 1})
    lake.commit(table, Change(new_uris=with_ids(root, {"b": 1}, "two")), run_id="two", base_version=0)

    assert delta_tables.restore(table, 0, run_id="one") == 2
    assert delta_tables.versions_by_run(table) == {"one": 2, "two": 1}
    assert delta_tables.scan(table).select("source_uri", "doc_id").collect().rows() == [("a", None)]

    lake.commit(table, Change(new_uris=with_ids(root, {"c": 1}, "three")), run_id="three", base_version=2)
    found = delta_tables.scan(table).select("source_uri", "doc_id").sort("source_uri").collect()
    assert found.rows() == [("a", None), ("c", "known")]
    assert delta_tables.restore(table, 1, run_id="two") == 4
    assert delta_tables.scan(table).select("source_uri").sort("source_uri").collect().rows() == [("a",), ("b",)]


def test_fields_within_a_column_are_gained_too(tmp_path):
    """A struct, and a list of structs, in the predictions of one run."""
    page = {"name": "page", "description": "New.", "physicalType": "int32", "logicalType": "integer"}

    def paged(columns):
        columns["top_chunk"]["properties"].append(page)
        columns["scores"]["items"]["properties"].insert(0, page)

    table = TableRef(uri=f"{tmp_path}/predictions", name="predictions", key="doc_id")
    values = data_contracts.rules("predictions").sample(3, generator=Generator(1), overrides=ONE_SCORE)
    storage.write_parquet(
        f"{tmp_path}/1.parquet", values.sort("doc_id").to_arrow().cast(data_contracts.arrow_schema("predictions"))
    )
    lake.commit(table, Change(new_uris=(f"{tmp_path}/1.parquet",)), run_id="one", base_version=None)

    with other_contract("predictions", paged):
        of_scan = delta_tables.scan(table).collect()
        lake.commit(table, Change(), run_id="two", base_version=0)
        stored = pl.read_delta(table.uri)

    assert stored["top_chunk"].struct.field("page").null_count() == 3
    assert stored["scores"].explode().struct.field("page").null_count() == 3
    assert_frame_equal(stored.select(values.columns), of_scan)
    assert (
        stored["top_chunk"]
        .struct.field("stop_char")
        .equals(values.sort("doc_id")["top_chunk"].struct.field("stop_char"))
    )


def test_a_contract_that_comes_to_allow_nulls(tmp_path):
    def required(columns):
        columns["doc_id"]["required"] = True

    table = table_at(str(tmp_path))
    with other_contract("rejected", required):
        lake.commit(table, Change(new_uris=with_ids(str(tmp_path), {"a": 1}, "one")), run_id="one", base_version=None)
    assert not pa.schema(table.load().schema().to_arrow()).field("doc_id").nullable

    lake.commit(table, Change(new_uris=write(str(tmp_path), {"b": 1}, "two")), run_id="two", base_version=0)

    assert pa.schema(table.load().schema().to_arrow()).field("doc_id").nullable
    found = pl.DataFrame(table.load().to_pyarrow_dataset().to_table())
    assert sorted(found.select("source_uri", "doc_id").iter_rows()) == [("a", "known"), ("b", None)]


UNFIT = [
    (retyped("row_index", "int32", "integer"), "row_index is int32, not int64"),
    (without("detail"), r"missing column detail \(string\), which is required"),
    (lambda columns: columns["run_id"].pop("required"), "run_id may be null, which the contract forbids"),
    (
        with_lang,
        r"extra column lang \(string\)",
    ),
    (
        lambda columns: [retyped("row_index", "double", "number")(columns), columns.pop("reason")],
        r"row_index is double, not int64; missing column reason \(string\), which is required",
    ),
]


@pytest.mark.parametrize(("change", "expected"), UNFIT, ids=[case[1] for case in UNFIT])
@pytest.mark.parametrize("replaces_all", [False, True])
def test_a_table_whose_rows_cannot_satisfy_the_contract_is_left_alone(tmp_path, change, expected, replaces_all):
    table, root = table_at(str(tmp_path)), str(tmp_path)
    with other_contract("rejected", change):
        storage.write_parquet(f"{root}/one.parquet", data_contracts.arrow_schema("rejected").empty_table())
        lake.commit(table, Change(new_uris=(f"{root}/one.parquet",)), run_id="one", base_version=None)
    uris, before = write(root, {"a": 1}, "two"), sorted(Path(table.uri).rglob("*"))
    words = rf"^rejected v2, .*/tables/rejected: {expected}; use the version of belt that wrote this table, or choose"

    with pytest.raises(ConfigError, match=words):
        lake.commit(table, Change(new_uris=uris, replaces_all=replaces_all), run_id="two", base_version=0)
    with pytest.raises(ConfigError, match=words):
        delta_tables.check(table)

    assert sorted(Path(table.uri).rglob("*")) == before
    assert table.load().version() == 0


def test_readers_are_told_of_other_types_and_do_not_mind_columns_of_a_later_contract(tmp_path):
    kept = made_under(
        with_lang,
        str(tmp_path / "later"),
        {"a": 1},
    )
    broken = made_under(retyped("row_index", "int32", "integer"), str(tmp_path / "other"), {"a": 1})

    assert delta_tables.scan(kept).collect().columns == SCHEMA.names
    with pytest.raises(ConfigError, match="row_index is int32, not int64"):
        delta_tables.scan(broken)
