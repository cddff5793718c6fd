"""Sorted files: Parquet sorted by a key, read and cut by ranges of it, so that any number of rows fits in memory."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from belt_tasks import storage

ROW_GROUP_ROWS = 16_384
RowGroup = tuple[int, str, str, int]
"""Index, first key, last key, number of rows."""


@dataclass(frozen=True, kw_only=True)
class SortedFile:
    """A Parquet file sorted by a key, as the ranges of its row groups: what of it to read for a range of keys."""

    uri: str
    key: str
    row_groups: tuple[RowGroup, ...]

    @classmethod
    def read(cls, uri: str, key: str) -> Self:
        """Of a file's footer."""
        with storage.errors_of(f"read {uri}"), storage.open_parquet(uri) as parquet:
            metadata = parquet.metadata
            column = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(key)
            groups = []
            for i in range(metadata.num_row_groups):
                group = metadata.row_group(i)
                statistics = group.column(column).statistics
                if group.num_rows and statistics is not None and statistics.has_min_max:
                    groups.append((i, str(statistics.min), str(statistics.max), group.num_rows))
                elif group.num_rows:
                    bounds = pc.min_max(parquet.read_row_group(i, columns=[key])[key])
                    groups.append((i, bounds["min"].as_py(), bounds["max"].as_py(), group.num_rows))
        return cls(uri=uri, key=key, row_groups=tuple(groups))

    def within(self, lower: str | None, upper: str | None) -> Self:
        """Those row groups that may hold keys in [lower, upper)."""
        kept = tuple(
            group
            for group in self.row_groups
            if (upper is None or group[1] < upper) and (lower is None or group[2] >= lower)
        )
        return type(self)(uri=self.uri, key=self.key, row_groups=kept)

    def rows(self, lower: str | None, upper: str | None, schema: pa.Schema) -> pa.Table:
        """Rows whose keys lie in [lower, upper), in the given schema; columns that the file lacks are null."""
        wanted = [group[0] for group in self.within(lower, upper).row_groups]
        if not wanted:
            return schema.empty_table()
        with storage.errors_of(f"read {self.uri}"), storage.open_parquet(self.uri) as parquet:
            stored = [name for name in schema.names if name in parquet.schema_arrow.names]
            table = parquet.read_row_groups(wanted, columns=stored)
        for name in schema.names:
            if name not in stored:
                table = table.append_column(name, pa.nulls(len(table), schema.field(name).type))
        table = table.select(schema.names).cast(schema)
        keys = table[self.key]
        if lower is not None:
            table = table.filter(pc.greater_equal(keys, lower))
        return table if upper is None else table.filter(pc.less(table[self.key], upper))


@contextmanager
def sorted_writer(uri: str, schema: pa.Schema, *, by: Sequence[str]) -> Iterator[pq.ParquetWriter]:
    """A writer of rows in any order; the object has them sorted, and appears when the block ends well.

    The rows are in memory once, at the end: for what a shard gives.
    """
    with storage.scratch_writer(schema) as (writer, unsorted):
        yield writer
        writer.close()
        rows = pq.read_table(unsorted, schema=schema)
        put_sorted(uri, rows.sort_by([(name, "ascending") for name in by]), by=by)


def put_sorted(uri: str, rows: pa.Table, *, by: Sequence[str]) -> None:
    """Put rows, which are sorted by these columns, as one object whose row groups a reader can skip by key."""
    sorting = [pq.SortingColumn(rows.schema.names.index(name)) for name in by]
    with storage.parquet_writer(uri, rows.schema, sorting=sorting) as writer:
        writer.write_table(rows, row_group_size=ROW_GROUP_ROWS)


def ranges(
    row_groups: Sequence[RowGroup], lower: str | None, upper: str | None, *, num_rows: int
) -> Iterator[tuple[str | None, str | None]]:
    """Cut a range of keys so that of each part about `num_rows` rows are to be read.

    Args:
        row_groups: of all files that will be read.
        lower: first key; None is the first of all.
        upper: key behind the last; None where there is no last.
        num_rows: of a part. One key's rows are never parted, so that there may be more.

    Returns:
        Half-open ranges that cover [lower, upper), in order.
    """
    read = 0
    for _, first, _, size in sorted(row_groups, key=lambda group: group[1]):
        if read + size > num_rows and read and (lower is None or first > lower):
            yield lower, first
            lower, read = first, 0
        read += size
    yield lower, upper


def parts(rows: pa.Table, key: str, *, num_rows: int) -> Iterator[pa.Table]:
    """Cut sorted rows into parts of about `num_rows`, at most half as many again; all rows of a key are in one."""
    num_parts = max(1, math.ceil(len(rows) / (1.5 * num_rows)))
    start = 0
    for i in range(1, num_parts + 1):
        stop = len(rows) * i // num_parts
        while 0 < stop < len(rows) and rows[key][stop].as_py() == rows[key][stop - 1].as_py():
            stop += 1
        if stop > start:
            yield rows.slice(start, stop - start)
        start = max(start, stop)
