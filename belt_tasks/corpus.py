"""The corpus: Parquet files to shards, shards to documents. Streamed; bad rows are put aside with a reason.

A shard is some row groups of one file, keyed by that file's path and version, so that neither the number of workers
nor their order changes what a shard is. Reading never holds more than one batch of rows.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from belt_tasks import columns, storage
from belt_tasks.errors import ConfigError, ShardError, TransientError
from belt_tasks.specs import CorpusSpec, Spec

SHARD_BYTES = 128 * 2**20
# a batch is the smaller of the two, though never less than one row
BATCH_ROWS = 1024
BATCH_BYTES = 2**20
NUM_PROBLEMS = 10

LabelRole = Literal["none", "label", "labels", "target"]


class ShardRef(Spec):
    """Where one unit of work lies."""

    uri: str
    """The file."""
    row_groups: tuple[int, int]
    """Half-open range of its row groups."""
    first_row: int
    """Position in the file of the shard's first row."""
    num_rows: int
    """Rows, good and bad, of every split."""
    key: str
    """16 hex digits, a hash of the file's path and version and of the row groups: the shard's name in outputs."""


@dataclass(frozen=True, kw_only=True)
class Documents:
    """A batch of a shard's rows, those fit for use and those put aside."""

    good: pl.DataFrame
    """doc_id, text and, where asked for, label, labels or target; row_index is the position in the file."""
    rejected: pl.DataFrame
    """source_uri, row_index, doc_id, reason, detail."""


def plan_shards(
    corpus_uri: str, spec: CorpusSpec, *, label_role: LabelRole = "none", split_choice: str | None = None
) -> list[ShardRef]:
    """List the shards of a corpus, and check every file's columns before any work starts.

    Args:
        corpus_uri: a Parquet file, a directory of them (hive partitions included) or a glob; any fsspec URL.
        spec: names of the columns.
        label_role: how the label column will be read; "none" does not look at it.
        split_choice: where the split was named, for a message; None is the spec's own place.

    Raises:
        ConfigError: nothing is there, no row is, or files are unreadable, lack columns or have them in wrong types;
            one message names all such files.
    """
    files = storage.list_files(corpus_uri, suffix=".parquet")
    shards, problems = [], []
    for file in files:
        try:
            shards += _shards_of_file(file, spec, label_role)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(first_problems(problems))
    if sum(shard.num_rows for shard in shards) == 0:
        raise ConfigError(f"{corpus_uri}: no rows in its {len(files)} files")
    if spec.split_column is not None and not any(_has_rows(shard, spec) for shard in shards):
        raise ConfigError(no_rows_of_split(corpus_uri, spec, split_choice))
    return shards


def first_problems(problems: list[str]) -> str:
    """What is wrong with files, a line each, and how many more there are."""
    more = [f"... and {len(problems) - NUM_PROBLEMS} more files"] if len(problems) > NUM_PROBLEMS else []
    return "\n".join([*problems[:NUM_PROBLEMS], *more])


def no_rows_of_split(corpus_uri: str, spec: CorpusSpec, choice: str | None = None) -> str:
    """What is wrong with a corpus that has rows, but none of the wanted split; `choice` says where that was named."""
    choice = choice or columns.words_for("--split")
    return f"{corpus_uri}: no row has {spec.split!r} in column {spec.split_column!r} (choose with {choice})"


def whole_file(file: storage.StoredFile, spec: CorpusSpec) -> ShardRef:
    """A file as one shard, its columns checked.

    Raises:
        ConfigError: it is unreadable, lacks columns or has them in wrong types.
    """
    with storage.open_parquet(file.uri) as parquet:
        columns.check_columns(_schema(parquet, file.uri), spec, label_role="none", uri=file.uri)
        span = (0, parquet.num_row_groups)
        num_rows = parquet.metadata.num_rows
    return ShardRef(uri=file.uri, row_groups=span, first_row=0, num_rows=num_rows, key=_key(file, span))


def shards_with_rows(
    file: storage.StoredFile, rows: npt.NDArray[np.int64]
) -> list[tuple[ShardRef, npt.NDArray[np.int64]]]:
    """Shards of a file that hold some of its rows, each with those; row groups without any are left out.

    Args:
        file: the file, whose columns were checked.
        rows: positions in the file, ascending.

    Raises:
        ConfigError: it is unreadable.
        ShardError: it has changed since it was listed.
    """
    with storage.open_parquet(file.uri) as parquet:
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
    span = (0, len(groups))
    _check_unchanged(file.uri, span, _key(file, span))
    stop_G = np.cumsum([group.num_rows for group in groups])
    wanted_G = np.diff(np.searchsorted(rows, stop_G), prepend=0) > 0
    shards = []
    for shard in _cut(file, groups, wanted_G):
        first, last = np.searchsorted(rows, [shard.first_row, shard.first_row + shard.num_rows])
        shards.append((shard, rows[first:last]))
    return shards


def label_column_type(corpus_uri: str, spec: CorpusSpec) -> pa.DataType:
    """The type of the label column in the corpus's first file.

    Raises:
        ConfigError: there is no such file or column.
    """
    first = storage.list_files(corpus_uri, suffix=".parquet")[0]
    with storage.open_parquet(first.uri) as parquet:
        schema = _schema(parquet, first.uri)
    return columns.field_of(schema, spec.label_column, option="--label-column", uri=first.uri).type


def read_documents(
    shard: ShardRef,
    spec: CorpusSpec,
    *,
    duplicates: npt.NDArray[np.int64],
    label_role: LabelRole = "none",
    with_text: bool = True,
    vocabulary: frozenset[str] | None = None,
    rows: npt.NDArray[np.int64] | None = None,
    batch_rows: int | None = None,
) -> Iterator[Documents]:
    """Read a shard batch by batch.

    Args:
        shard: what to read.
        spec: columns, and the split whose rows are wanted.
        duplicates: positions in the file of rows whose doc_id came before; see `duplicate_rows`.
        label_role: how to read the label column: class names, lists of names, numbers, or not at all.
        with_text: False leaves the text unread and every `text` empty.
        vocabulary: allowed class names; None allows all.
        rows: positions in the file of the rows that are wanted; None wants all.
        batch_rows: most rows of a batch; None is BATCH_ROWS.

    Raises:
        ShardError: the file became unreadable after planning.
    """
    reader = columns.RowReader(spec, label_role=label_role, vocabulary=vocabulary, with_text=with_text)
    for row_index, batch in _batches(shard, spec, reader.names, batch_rows):
        if rows is not None:
            is_wanted = np.isin(row_index, rows)
            row_index, batch = row_index[is_wanted], batch.filter(pa.array(is_wanted))  # noqa: PLW2901 - narrowed
        yield Documents(**reader.split(batch, row_index, uri=shard.uri, duplicates=duplicates))


def duplicate_rows(
    shards: Sequence[ShardRef], spec: CorpusSpec, *, earlier: Sequence[tuple[ShardRef, CorpusSpec]] = ()
) -> pa.Table:
    """Rows whose doc_id an earlier row has, in the order of files and rows: the first one stays.

    Memory is some 24 bytes a row: hashes first, then the ids of those rows alone whose hashes are equal.

    Args:
        shards: the corpus.
        spec: its columns, and the split whose rows are wanted.
        earlier: shards, and how to read them, whose rows come before and are not told of.

    Returns:
        source_uri: string and row_index: int64, one row per later duplicate.
    """
    readings = [*earlier, *((shard, spec) for shard in shards)]
    hashes = [_hashed_ids(*reading) for reading in readings]
    all_hashes = pl.concat([frame["hash"] for frame in hashes])
    suspicious = all_hashes.filter(all_hashes.is_duplicated()).unique()
    candidates = []
    for number, (reading, frame) in enumerate(zip(readings, hashes, strict=True)):
        rows = frame.filter(pl.col("hash").is_in(suspicious.implode()))["row_index"]
        if len(rows):
            found = _ids(*reading).filter(pl.col("row_index").is_in(rows.implode()))
            candidates.append(found.with_columns(is_told=pl.lit(number >= len(earlier))))
    if not candidates:
        return pa.table({"source_uri": pa.array([], pa.string()), "row_index": pa.array([], pa.int64())})
    frame = pl.concat(candidates).filter(pl.col("doc_id").is_first_distinct().not_() & pl.col("is_told"))
    return (
        frame.select("source_uri", "row_index")
        .to_arrow()
        .cast(pa.schema([("source_uri", pa.string()), ("row_index", pa.int64())]))
    )


def _shards_of_file(file: storage.StoredFile, spec: CorpusSpec, label_role: LabelRole) -> list[ShardRef]:
    with storage.open_parquet(file.uri) as parquet:
        columns.check_columns(_schema(parquet, file.uri), spec, label_role=label_role, uri=file.uri)
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
    return list(_cut(file, groups, np.ones(len(groups), dtype=bool)))


def _cut(
    file: storage.StoredFile, groups: list[pq.RowGroupMetaData], wanted_G: npt.NDArray[np.bool_]
) -> Iterator[ShardRef]:
    """Shards of neighbouring row groups that are wanted."""
    first_group = first_row = num_rows = num_bytes = 0
    for i, group in enumerate(groups):
        if not wanted_G[i]:
            first_group, first_row = i + 1, first_row + num_rows + group.num_rows
            num_rows = num_bytes = 0
            continue
        num_rows += group.num_rows
        num_bytes += group.total_byte_size
        if num_bytes >= SHARD_BYTES or i + 1 == len(groups) or not wanted_G[i + 1]:
            span = (first_group, i + 1)
            key = _key(file, span)
            yield ShardRef(uri=file.uri, row_groups=span, first_row=first_row, num_rows=num_rows, key=key)
            first_group, first_row, num_rows, num_bytes = i + 1, first_row + num_rows, 0, 0


def _key(file: storage.StoredFile, span: tuple[int, int]) -> str:
    return hashlib.sha256(f"{file.uri}\0{file.version}\0{span}".encode()).hexdigest()[:16]


def _schema(parquet: pq.ParquetFile, uri: str) -> pa.Schema:
    """The file's columns, and those that its directories stand for where the file has none of that name."""
    schema = parquet.schema_arrow
    for name in storage.hive_partitions(uri):
        if name not in schema.names:
            schema = schema.append(pa.field(name, pa.string()))
    return schema


def _has_rows(shard: ShardRef, spec: CorpusSpec) -> bool:
    """Whether a row of the wanted split is there; reads that column alone, and no further than the first such row."""
    return any(len(row_index) > 0 for row_index, _ in _batches(shard, spec, []))


def _batches(
    shard: ShardRef, spec: CorpusSpec, names: list[str], batch_rows: int | None = None
) -> Iterator[tuple[npt.NDArray[np.int64], pa.RecordBatch]]:
    """Batches of the wanted columns and split, with the position in the file of each row."""
    where = f"{shard.uri} (row groups {shard.row_groups})"
    wanted = [*names, spec.split_column] if spec.split_column and spec.split_column not in names else names
    position = shard.first_row
    try:
        with storage.open_parquet(shard.uri) as parquet:
            for batch in _stored_batches(parquet, shard, wanted, batch_rows or BATCH_ROWS):
                row_index = np.arange(position, position + batch.num_rows)
                position += batch.num_rows
                if spec.split_column is not None:
                    in_split = _in_split(batch.column(spec.split_column), spec)
                    row_index, batch = row_index[in_split], batch.filter(pa.array(in_split))  # noqa: PLW2901 - narrowed
                yield row_index, batch.select(names)
    except (ConnectionError, TimeoutError) as error:
        raise TransientError(f"{shard.uri}: {str(error) or type(error).__name__}") from error
    except (ConfigError, pa.ArrowException, OSError) as error:
        raise ShardError(f"{where}: cannot be read: {error}") from error
    if position != shard.first_row + shard.num_rows:
        raise ShardError(
            f"{where}: changed since it was planned: {shard.num_rows} rows then, {position - shard.first_row} now"
        )
    _check_unchanged(shard.uri, shard.row_groups, shard.key)


def _check_unchanged(uri: str, row_groups: tuple[int, int], key: str) -> None:
    """See that a file is still the version that was listed: what was read from it is of no other.

    Raises:
        ShardError: it is another.
        TransientError: the store did not answer.
    """
    now = storage.stored_file(uri)
    if now is not None and _key(now, row_groups) != key:
        raise ShardError(
            f"{uri}: changed since it was planned, and nothing of it is used; run again when it is complete"
        )


def _stored_batches(
    parquet: pq.ParquetFile, shard: ShardRef, wanted: list[str], most_rows: int
) -> Iterator[pa.RecordBatch]:
    """The wanted columns in the order in which they are stored, hive partitions filled in."""
    stored = parquet.schema_arrow.names
    partitions = storage.hive_partitions(shard.uri)
    missing = [name for name in wanted if name not in stored and name not in partitions]
    groups = range(*shard.row_groups)
    if missing or groups.stop > parquet.num_row_groups:
        raise ShardError(
            f"{shard.uri}: changed since it was planned: "
            f"has columns {stored} and {parquet.num_row_groups} row groups, wanted {wanted} of {shard.row_groups}"
        )
    from_file = [name for name in wanted if name in stored]
    num_bytes = sum(parquet.metadata.row_group(i).total_byte_size for i in groups)
    batch_rows = _batch_rows(num_bytes, shard.num_rows, most_rows)
    for batch in parquet.iter_batches(batch_size=batch_rows, row_groups=list(groups), columns=from_file):
        arrays = [
            batch.column(name)
            if name in from_file
            else pa.repeat(pa.scalar(partitions[name], pa.string()), batch.num_rows)
            for name in wanted
        ]
        yield pa.RecordBatch.from_arrays(arrays, wanted)


def _batch_rows(num_bytes: int, num_rows: int, most_rows: int) -> int:
    """Rows of average size that fill a batch."""
    return max(1, min(most_rows, BATCH_BYTES * num_rows // max(num_bytes, 1)))


def _in_split(column: pa.Array, spec: CorpusSpec) -> npt.NDArray[np.bool_]:
    values, _ = columns.strings(column)
    return np.asarray(pc.fill_null(pc.equal(values, pa.scalar(spec.split, values.type)), False))


def _ids(shard: ShardRef, spec: CorpusSpec) -> pl.DataFrame:
    frames = [
        pl.DataFrame({"doc_id": pl.Series(columns.strings(batch.column(0))[0]), "row_index": row_index})
        for row_index, batch in _batches(shard, spec, [spec.id_column])
    ]
    frame = pl.concat(frames) if frames else pl.DataFrame(schema={"doc_id": pl.String, "row_index": pl.Int64})
    return frame.filter(pl.col("doc_id").is_not_null()).with_columns(source_uri=pl.lit(shard.uri))


def _hashed_ids(shard: ShardRef, spec: CorpusSpec) -> pl.DataFrame:
    """The hash lives in this process only, so it may differ between versions."""
    return _ids(shard, spec).select(pl.col("doc_id").hash().alias("hash"), "row_index")
