"""The lake: published tables in Delta Lake. A run changes a table by one commit: readers see all of it or nothing.

A table is sorted by its key, and the key ranges of its files do not overlap: a lookup opens one file. A run rewrites
only the files whose keys it touches (copy on write), a range at a time, so memory depends on no table's size.

A commit names the run, and a plan that has been committed is not committed again. A commit happens only on the version
of the table that the run was planned on: of two runs at once, one wins and the other is told.

A table that was made under an earlier contract gains the contract's new columns by the commit of the next run, which
then rewrites every file. Where its rows could not satisfy the contract, nothing is written and a person is told.
"""

import json
import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.exceptions import CommitFailedError
from deltalake.schema import Schema
from deltalake.transaction import AddAction, RemoveAction, create_table_with_add_actions

import data_contracts
from belt_tasks import delta_tables, sorted_files, storage
from belt_tasks.delta_tables import TableRef
from belt_tasks.errors import ConfigError, ConflictError, TransientError
from belt_tasks.sorted_files import SortedFile

FILE_ROWS = 250_000
"""Rows of a file, about; some 20 MB of predictions."""
REMOVED_AT = "removed_at"
MOST_CHARACTERS = 128  # longer strings are no use as bounds; the key's are always whole

TABLE_PROPERTIES = {
    "delta.logRetentionDuration": "interval 3650 days",  # the history says which run made what
    "delta.deletedFileRetentionDuration": "interval 30 days",  # and what can be gone back to
}


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a run does to a table: all rows of the keys that it names give way to its own."""

    new_uris: tuple[str, ...] = ()
    """Parquet files of the table's columns, each sorted by the key."""
    removed_uris: tuple[str, ...] = ()
    """Parquet files with a column of keys, each sorted by it: rows of these keys go where no new ones come."""
    dropped_uris: tuple[str, ...] = ()
    """The same; rows of these keys go also where those of removed keys are marked."""
    replaces_all: bool = False
    """Whether all rows of other keys go too."""
    marked_at: datetime | None = None
    """Rows of removed keys stay, and their column `removed_at` says this."""


@dataclass(frozen=True, kw_only=True)
class Committed:
    """The outcome of a commit."""

    version: int
    num_rows: int
    """Of the whole table, after it."""
    num_files_written: int
    reused: bool
    """Whether an earlier attempt at this run had done it."""


def commit(table: TableRef, change: Change, *, run_id: str, base_version: int | None) -> Committed:
    """Change a table by one commit, unless this run did so since that version, or is what the table shows.

    Args:
        table: what to change; it is made where it is not there.
        change: what to do.
        run_id: who does it.
        base_version: the version that the run was planned on; None where there was no table.

    Raises:
        ConflictError: the table is no longer at that version; nothing was changed.
        ConfigError: it cannot be written there, or its columns are not those of the contract.
        TransientError: the store did not answer; whether it was changed is found out by the next attempt.
    """
    delta = table.load()
    if delta is not None and _is_committed(delta, run_id, base_version):
        return Committed(
            version=delta.version(), num_rows=delta_tables.num_rows(delta), num_files_written=0, reused=True
        )
    version = None if delta is None else delta.version()
    if version != base_version:
        raise ConflictError(_conflict(table, base_version, version))
    schema = data_contracts.arrow_schema(table.name)
    widens = delta is not None and not data_contracts.is_stored_so(delta_tables.checked(table, delta), table.name)
    old = [] if delta is None else _files(delta, table)
    new = [SortedFile.read(uri, table.key) for uri in change.new_uris]
    removed = [SortedFile.read(uri, table.key) for uri in change.removed_uris]
    dropped = [SortedFile.read(uri, table.key) for uri in change.dropped_uris]
    marked, gone = ([], [*removed, *dropped]) if change.marked_at is None else (removed, dropped)
    adds: list[AddAction] = []
    removes: list[RemoveAction] = []
    if change.replaces_all:
        removes, old = [file.remove_action() for file in old], []
    for group in _groups(old, table.uri):
        keys = _Keys(new=group.own(new), gone=group.own(gone), marked=group.own(marked), marked_at=change.marked_at)
        if not widens and not keys.new and not group.may_hold([*keys.gone, *keys.marked]):
            continue
        adds += _rewrite(table, schema, group, keys, run_id)
        removes += [file.remove_action() for file in group.files]
    _commit(table, delta, schema, adds, None if widens else removes, run_id)
    after = table.load()
    if after is None or not _is_committed(after, run_id, base_version):
        raise TransientError(f"cannot see what was committed to {table.uri}")
    return Committed(
        version=after.version(), num_rows=delta_tables.num_rows(after), num_files_written=len(adds), reused=False
    )


def file_uris(table: TableRef, version: int) -> list[str]:
    """The files of a version, in the order of their keys."""
    delta = table.load(version)
    files = [] if delta is None else _files(delta, table)
    return [file.uri for file in sorted(files, key=lambda file: (file.first or "", file.path))]


def _is_committed(delta: DeltaTable, run_id: str, base_version: int | None) -> bool:
    """Whether a run has changed the table since a version, or is what it shows."""
    with delta_tables.delta_errors(f"read {delta.table_uri}"):
        made = delta.transaction_version(_app_id(run_id))
    return made is not None and (made > _number(base_version) or delta_tables.shown_run(delta) == run_id)


def _number(version: int | None) -> int:
    return -1 if version is None else version


@dataclass(frozen=True, kw_only=True)
class _TableFile:
    """A file of the present version."""

    path: str
    uri: str
    num_bytes: int
    first: str | None
    last: str | None
    """Bounds of its keys; None where the log does not say."""

    def may_hold(self, key: str) -> bool:
        return (self.first is None or self.first <= key) and (self.last is None or key <= self.last)

    def remove_action(self) -> RemoveAction:
        return RemoveAction(
            path=self.path,
            data_change=True,
            deletion_timestamp=int(datetime.now(UTC).timestamp() * 1000),
            partition_values={},
            size=self.num_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Files whose ranges overlap, usually one, and the range of keys that they own: [lower, upper)."""

    files: tuple[_TableFile, ...]
    lower: str | None
    upper: str | None

    def own(self, files: Sequence[SortedFile]) -> list[SortedFile]:
        """The parts of some files whose keys the group owns."""
        return [part for each in files if (part := each.within(self.lower, self.upper)).row_groups]

    def may_hold(self, keys: Sequence[SortedFile]) -> bool:
        """Whether some of the keys, all of which the group owns, may have rows in its files."""
        schema = pa.schema([(each.key, pa.string()) for each in keys[:1]])
        found = (each.rows(self.lower, self.upper, schema)[each.key] for each in keys)
        return any(file.may_hold(key) for column in found for key in column.to_pylist() for file in self.files)


def _files(delta: DeltaTable, table: TableRef) -> list[_TableFile]:
    frame = pl.DataFrame(delta_tables.add_actions(delta))
    bounds = [f"min.{table.key}", f"max.{table.key}"]
    frame = frame.with_columns(pl.lit(None, pl.String).alias(name) for name in bounds if name not in frame.columns)
    return [
        _TableFile(path=path, uri=storage.join(table.uri, path), num_bytes=num_bytes, first=first, last=last)
        for path, num_bytes, first, last in frame.select("path", "size_bytes", *bounds).iter_rows()
    ]


def _groups(files: Sequence[_TableFile], where: str) -> list[_Group]:
    """Every key is owned by one group."""
    unknown = [file for file in files if file.first is None or file.last is None]
    if unknown:
        raise ConfigError(f"{where}: {unknown[0].path} has no bounds of its keys; it was not written by belt")
    runs: list[list[_TableFile]] = []
    last = None
    for file in sorted(files, key=lambda file: (file.first or "", file.path)):
        if runs and last is not None and file.first is not None and file.first <= last:
            runs[-1].append(file)
        else:
            runs.append([file])
        last = file.last if last is None else max(last, file.last or "")
    lowers = [None, *(run[0].first for run in runs[1:])]
    return [
        _Group(files=tuple(run), lower=lower, upper=upper)
        for run, lower, upper in zip(runs or [[]], lowers, [*lowers[1:], None], strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class _Keys:
    """What a run says of keys that a group owns."""

    new: Sequence[SortedFile]
    """Their rows."""
    gone: Sequence[SortedFile]
    marked: Sequence[SortedFile]
    marked_at: datetime | None


def _rewrite(table: TableRef, schema: pa.Schema, group: _Group, keys: _Keys, run_id: str) -> list[AddAction]:
    """Write a group's rows with a run's change, range by range."""
    old = [SortedFile.read(file.uri, table.key) for file in group.files]
    sizes = [size for each in (*old, *keys.new) for size in each.row_groups]
    only_key = pa.schema([schema.field(table.key)])
    adds = []
    for lower, upper in sorted_files.ranges(sizes, group.lower, group.upper, num_rows=FILE_ROWS):
        fresh, kept = (_rows(files, lower, upper, schema) for files in (keys.new, old))
        gone, marked = (_rows(files, lower, upper, only_key)[table.key] for files in (keys.gone, keys.marked))
        kept = kept.filter(pc.invert(_is_in(kept[table.key], fresh[table.key])))
        kept = kept.filter(pc.invert(_is_in(kept[table.key], gone)))
        if keys.marked_at is not None:
            kept = _marked(kept, _is_in(kept[table.key], marked), keys.marked_at)
        rows = pa.concat_tables([kept, fresh])
        rows = rows.sort_by([(name, "ascending") for name in (table.key, *table.order)])
        adds += [_write(table, part, run_id) for part in sorted_files.parts(rows, table.key, num_rows=FILE_ROWS)]
    return adds


def _rows(files: Sequence[SortedFile], lower: str | None, upper: str | None, schema: pa.Schema) -> pa.Table:
    return pa.concat_tables([schema.empty_table(), *(each.rows(lower, upper, schema) for each in files)])


def _is_in(keys: pa.ChunkedArray, others: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.is_in(keys, others.combine_chunks())


def _marked(rows: pa.Table, is_gone: pa.ChunkedArray, moment: datetime) -> pa.Table:
    """Rows with a moment in `removed_at` where they are gone and were not before."""
    i = rows.schema.names.index(REMOVED_AT)
    now = pa.scalar(moment, rows.schema.field(i).type)
    marks = pc.if_else(pc.and_(is_gone, pc.is_null(rows[i])), now, rows[i])
    return rows.set_column(i, rows.schema.field(i), marks)


def _write(table: TableRef, rows: pa.Table, run_id: str) -> AddAction:
    path = f"{run_id}-{uuid.uuid4().hex}.parquet"  # never written twice, not even by two attempts at one run
    uri = storage.join(table.uri, path)
    sorted_files.put_sorted(uri, rows, by=[table.key, *table.order])
    return AddAction(
        path=path,
        size=storage.num_bytes(uri),
        partition_values={},
        modification_time=int(datetime.now(UTC).timestamp() * 1000),
        data_change=True,
        stats=json.dumps(_statistics(rows, table.key)),
    )


def _statistics(rows: pa.Table, key: str) -> dict[str, Any]:
    """Delta's statistics of a file: what readers skip it by."""
    least, most, nulls = {}, {}, {}
    for name in rows.schema.names:
        column = rows[name]
        if pa.types.is_nested(column.type):
            continue
        nulls[name] = column.null_count
        if pa.types.is_floating(column.type) and pc.any(pc.is_nan(column)).as_py():
            continue
        bounds = pc.min_max(column)
        low, high = bounds["min"].as_py(), bounds["max"].as_py()
        if low is None:
            continue
        if isinstance(low, datetime):  # to the millisecond, outwards
            low, high = low.isoformat(timespec="milliseconds"), _next_millisecond(high)
        if isinstance(low, str) and name != key and max(len(low), len(high)) > MOST_CHARACTERS:
            continue
        least[name], most[name] = low, high
    return {"numRecords": len(rows), "minValues": least, "maxValues": most, "nullCount": nulls}


def _next_millisecond(moment: datetime) -> str:
    rounded = moment.timestamp() * 1000
    return datetime.fromtimestamp(math.ceil(rounded) / 1000, UTC).isoformat(timespec="milliseconds")


def _commit(
    table: TableRef,
    delta: DeltaTable | None,
    schema: pa.Schema,
    adds: list[AddAction],
    removes: list[RemoveAction] | None,
    run_id: str,
) -> None:
    """Add and remove files; without a list, all files go and the table gets the schema."""
    base = None if delta is None else delta.version()
    properties = CommitProperties(
        custom_metadata={delta_tables.RUN_ID: run_id},
        max_commit_retries=0,
        app_transactions=[Transaction(_app_id(run_id), _number(base) + 1)],
    )
    try:
        with delta_tables.delta_errors(f"write {table.uri}"):
            if delta is None:
                create_table_with_add_actions(
                    table.uri,
                    Schema.from_arrow(schema),
                    adds,
                    mode="error",
                    partition_by=[],
                    name=table.name,
                    description=data_contracts.purpose(table.name),
                    configuration=TABLE_PROPERTIES,
                    storage_options=storage.delta_options(table.uri),
                    commit_properties=properties,
                )
            else:
                # only "overwrite" changes the schema, and it removes all files of the version that was loaded
                actions: list[AddAction | RemoveAction] = [*adds, *(removes or ())]
                mode = "append" if removes is not None else "overwrite"
                delta.create_write_transaction(actions, mode, Schema.from_arrow(schema), commit_properties=properties)
    except CommitFailedError as error:
        now = table.load()
        if now is not None and _is_committed(now, run_id, base):  # another attempt at this run was quicker
            return
        raise ConflictError(_conflict(table, base, None if now is None else now.version())) from error


def _conflict(table: TableRef, base: int | None, now: int | None) -> str:
    was, has = ("not there" if version is None else f"at version {version}" for version in (base, now))
    return (
        f"{table.uri}: another run changed the table meanwhile: it was {was} when this run was planned and {has} now; "
        "nothing of this run was published; run again"
    )


def _app_id(run_id: str) -> str:
    return f"belt/{run_id}"
