"""Inventories: of every row of a source file its doc_id and the fingerprint of its text, or why it is put aside.

    OUTPUT/inventory/KEY.parquet    one per version of a file; never changed

A file is read for its inventory once. What is new, changed or gone is found by comparing inventories, so that a file
that did not change is not read at all, and nobody compares texts.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import pyarrow as pa

import data_contracts
from belt_tasks import corpus, prepare, progress, publishing, storage
from belt_tasks.errors import ConfigError, ShardError
from belt_tasks.specs import CorpusSpec, Spec
from belt_tasks.storage import StoredFile
from belt_tasks.threads import Threads

FORMAT = 1  # another one where the same file is to be read anew, since belt finds other rows good or bad
BATCH_ROWS = 16_384
NUM_THREADS = 8  # a thread reads and hashes without Python's lock, or waits for the store


class SourceRef(Spec):
    """A file of the corpus, as the run that scored it found it: a row of the sources contract."""

    source_uri: str
    version: str
    num_bytes: int
    num_rows: int
    num_documents: int
    inventory_key: str
    scoring_fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Inventories:
    """Where the inventories of an output lie."""

    root_uri: str
    scratch_uri: str | None = None
    """Where missing ones are made instead, for someone who only wants to look."""
    scratched: set[str] = field(default_factory=set)
    """Keys of those that were."""

    def uri(self, key: str) -> str:
        """Where an inventory lies."""
        root = self.scratch_uri if key in self.scratched and self.scratch_uri else self.root_uri
        return storage.join(root, f"{key}.parquet")

    def exists(self, key: str) -> bool:
        """Whether an inventory was made."""
        return storage.exists(self.uri(key))

    def read(self, key: str, columns: list[str]) -> pl.DataFrame:
        """Some columns of an inventory.

        Raises:
            ConfigError: it is not there.
        """
        return pl.DataFrame(storage.read_parquet(self.uri(key), columns=columns))


def key_of(file: StoredFile, spec: CorpusSpec) -> str:
    """The name of a file's inventory, 32 hex digits: a hash of its path and version and of how it is read."""
    content = [FORMAT, file.uri, file.version, file.num_bytes, spec.model_dump(exclude={"label_column"})]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def take(files: Sequence[StoredFile], spec: CorpusSpec, inventories: Inventories) -> dict[str, tuple[int, int]]:
    """Take the inventory of files that have none.

    Returns:
        By key, the number of rows and how many of them are fit for use.

    Raises:
        ConfigError: files are unreadable, lack columns or have them in wrong types; one message names all such files.
    """
    progress.advance("compare", 0, num_more=len(files))
    problems: list[str] = []
    counts = {}
    with Threads(NUM_THREADS) as threads:
        for file, found in zip(files, threads.map(lambda file: _attempt(file, spec, inventories), files), strict=True):
            progress.advance("compare", 1)
            if isinstance(found, str):
                problems.append(found)
            else:
                counts[key_of(file, spec)] = found
    if problems:
        raise ConfigError(corpus.first_problems(problems))
    return counts


def duplicate_rows(sources: Sequence[SourceRef], inventories: Inventories) -> pl.DataFrame:
    """Rows whose doc_id an earlier row of the corpus has, in the order of files and rows: the first one stays.

    Memory is some 24 bytes a row: hashes first, then the ids of those rows alone whose hashes are equal.

    Returns:
        source_uri, row_index, doc_id, reason and detail (those of the inventory), one row per later duplicate.
    """
    hashes = read_all(sources, inventories, ["doc_id"], lambda frame: frame["doc_id"].drop_nulls().hash().to_frame("h"))
    together = pl.concat([frame["h"] for frame in hashes])
    suspicious = together.filter(together.is_duplicated()).unique()
    holders = [
        source for source, frame in zip(sources, hashes, strict=True) if frame["h"].is_in(suspicious.implode()).any()
    ]
    del hashes, together
    wanted = suspicious.implode()
    columns = ["doc_id", "row_index", "reason", "detail"]
    found = read_all(holders, inventories, columns, lambda frame: frame.filter(pl.col("doc_id").hash().is_in(wanted)))
    frames = [
        frame.drop_nulls("doc_id").with_columns(source_uri=pl.lit(source.source_uri))
        for source, frame in zip(holders, found, strict=True)
    ]
    names = ["source_uri", "row_index", "doc_id", "reason", "detail"]
    if not frames:
        return pl.DataFrame(schema={name: pl.Int64 if name == "row_index" else pl.String for name in names})
    return pl.concat(frames).filter(pl.col("doc_id").is_first_distinct().not_()).select(names)


def read_all(
    sources: Iterable[SourceRef],
    inventories: Inventories,
    columns: list[str],
    reduce: Callable[[pl.DataFrame], pl.DataFrame],
) -> list[pl.DataFrame]:
    """What `reduce` makes of some columns of each file's inventory, in their order; several are read at once."""
    with Threads(NUM_THREADS) as threads:
        return list(threads.map(lambda source: reduce(inventories.read(source.inventory_key, columns)), list(sources)))


def _attempt(file: StoredFile, spec: CorpusSpec, inventories: Inventories) -> tuple[int, int] | str:
    try:
        return _take(file, spec, inventories)
    except (ConfigError, ShardError) as error:
        return str(error)


def _take(file: StoredFile, spec: CorpusSpec, inventories: Inventories) -> tuple[int, int]:
    key = key_of(file, spec)
    if inventories.exists(key):
        reasons = inventories.read(key, ["reason"])["reason"]
        return len(reasons), reasons.null_count()
    schema = data_contracts.arrow_schema("inventory")
    num_rows = num_documents = 0
    if inventories.scratch_uri is not None:
        inventories.scratched.add(key)
    with storage.parquet_writer(inventories.uri(key), schema) as writer:
        shard = corpus.whole_file(file, spec)
        rows = corpus.read_documents(shard, spec, duplicates=np.empty(0, np.int64), batch_rows=BATCH_ROWS)
        for batch in rows:
            table = _rows(batch, schema)
            publishing.check(table, "inventory", file.uri)
            writer.write_table(table)
            num_rows += table.num_rows
            num_documents += len(batch.good)
    return num_rows, num_documents


def _rows(batch: corpus.Documents, schema: pa.Schema) -> pa.Table:
    good = batch.good.select(
        "row_index",
        "doc_id",
        prepare.content_fingerprints(batch.good["text"]).alias("content_fingerprint"),
        pl.col("text").str.len_bytes().cast(pl.Int64).alias("num_bytes"),
        pl.lit(None, pl.String).alias("reason"),
        pl.lit(None, pl.String).alias("detail"),
    )
    bad = batch.rejected.select(
        "row_index",
        "doc_id",
        pl.lit(None, pl.String).alias("content_fingerprint"),
        pl.lit(0, pl.Int64).alias("num_bytes"),
        "reason",
        "detail",
    )
    return pl.concat([good, bad]).sort("row_index").to_arrow().cast(schema)
