"""Publishing: immutable shard objects with deterministic names, then the run's manifest, which completes the run.

    OUTPUT/runs/RUN_ID/TABLE/SHARD_KEY.parquet    one object per shard and table
    OUTPUT/runs/RUN_ID/receipts/SHARD_KEY.json    written after a shard's tables: the shard is finished
    OUTPUT/runs/RUN_ID/manifest.json              written after all shards: the run is complete
    OUTPUT/published.json                         a copy of the last complete run's manifest; not of scoring runs,
                                                  whose tables are changed by one commit, see `score_tables`

A run's id is a hash of what goes in, so a run that was killed finds its finished shards when it is started again, and
a complete one has nothing left to do. Readers take file names from a manifest and never see half a run.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Self

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

import data_contracts
from belt_tasks import milestones, sorted_files, storage
from belt_tasks.corpus import ShardRef
from belt_tasks.cost import peak_flops
from belt_tasks.errors import ConfigError, ContractError
from belt_tasks.receipts import Counts, FileReceipt, ShardReceipt, total
from belt_tasks.specs import Spec
from belt_tasks.stored import read_json

OBJECTS_SORTED_BY = {"predictions": ["doc_id"], "evidence": ["doc_id", "rank"]}
"""Tables whose objects are sorted, since a run's are merged into a published table."""


class RunRef(Spec):
    """Where a run writes."""

    output_uri: str
    run_id: str
    """16 hex digits, a hash of everything that decides the run's result."""

    @property
    def uri(self) -> str:
        """The run's own folder."""
        return storage.join(self.output_uri, "runs", self.run_id)

    @property
    def manifest_uri(self) -> str:
        """Its presence means that the run is complete."""
        return storage.join(self.uri, "manifest.json")

    @property
    def duplicates_uri(self) -> str:
        """Rows whose doc_id came before; not there where no row is such."""
        return storage.join(self.uri, "duplicates.parquet")

    @property
    def sources_uri(self) -> str:
        """Which versions of which files a scoring run's tables are of."""
        return storage.join(self.uri, "sources.parquet")

    @property
    def plan_uri(self) -> str:
        """What a scoring run has to do; written after all that it refers to."""
        return storage.join(self.uri, "plan.json")

    @property
    def report_uri(self) -> str:
        """The page on what a scoring run read, said and cost."""
        return storage.join(self.uri, "report", "index.html")

    @property
    def quality_uri(self) -> str:
        """The page of the rows that a scoring run put aside, also of one that was refused for them."""
        return storage.join(self.uri, "report", "rejected.html")

    def rows_uri(self, shard_key: str) -> str:
        """Which rows of a shard a scoring run scores."""
        return storage.join(self.uri, "rows", f"{shard_key}.parquet")

    def existing_duplicates_uri(self) -> str | None:
        """`duplicates_uri` if it is there."""
        return self.duplicates_uri if storage.exists(self.duplicates_uri) else None

    def path_of(self, table: str, shard_key: str) -> str:
        """Where a shard's part of a table lies, relative to the output."""
        return f"runs/{self.run_id}/{table}/{shard_key}.parquet"

    def receipt_uri(self, shard_key: str) -> str:
        """Its presence means that the shard is finished."""
        return storage.join(self.uri, "receipts", f"{shard_key}.json")


class TableChange(Spec):
    """What a scoring run takes from the published tables. Paths are relative to the output."""

    base_run_id: str | None
    """The run whose tables are changed; None where there were none."""
    replaces_all: bool
    """Whether nothing of those tables stays."""
    removed_path: str | None = None
    """Ids of documents that are gone."""
    unscored_path: str | None = None
    """Ids of documents that were scored anew and got no prediction: what they had goes, marked or not."""
    reread_path: str | None = None
    """Files whose rejected rows are found anew."""
    marked_at: str | None = None
    """Documents that are gone stay, marked with this moment."""
    is_last: bool = True
    """Whether the tables are those of the whole corpus after it; otherwise it is a step on the way."""


class Manifest(Spec):
    """What makes a run complete: its row of the `runs` table, and every file it consists of."""

    run: dict[str, Any]
    """One row of the runs contract; times are ISO 8601."""
    labels: tuple[str, ...] = ()
    """Label names in the order of scores and logits."""
    rejected_by_reason: dict[str, int]
    files: tuple[FileReceipt, ...]
    change: TableChange | None = None
    """Of a scoring run."""

    def uris(self, output_uri: str, table: str) -> list[str]:
        """The files of one table."""
        return [storage.join(output_uri, file.path) for file in self.files if file.table == table]


def run_id_of(keys: Sequence[str], **deciding: Any) -> str:  # noqa: ANN401 - anything JSON
    """Hash everything that decides a run's result: what it reads, how, and belt's version."""
    return digest_of(keys=list(keys), belt=version("belt"), **deciding)


def digest_of(**deciding: Any) -> str:  # noqa: ANN401 - anything JSON
    """16 hex digits over specs and other values."""
    content = {name: value.model_dump() if isinstance(value, Spec) else value for name, value in deciding.items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def check(table: pa.Table, name: str, where: str) -> None:
    """Refuse rows that do not satisfy their contract.

    Raises:
        ContractError: all that is wrong with them.
    """
    violations = data_contracts.violations(table, name)
    if violations:
        raise ContractError(data_contracts.message(violations, name, where))


class ShardWriter:
    """Writes one shard's tables: streamed to temporary files, checked against contracts, put when all is there."""

    def __init__(self, stack: ExitStack, run: RunRef, shard: ShardRef, tables: Sequence[str]) -> None:
        self._run, self._shard, self._table = run, shard, tables[0]
        self._writers = {name: self._open(stack, name) for name in (*tables, "rejected")}
        self._num_rows = dict.fromkeys(self._writers, 0)
        self._rejected_by_reason: dict[str, int] = {}

    @classmethod
    @contextmanager
    def open(cls, run: RunRef, shard: ShardRef, *, table: str, more: Sequence[str] = ()) -> Iterator[Self]:
        """The objects of a shard's table, of more tables, and of rejected rows.

        They appear when the block ends well, and not when it raises.
        """
        with ExitStack() as stack:
            yield cls(stack, run, shard, (table, *more))

    def write(self, rows: pa.Table, name: str | None = None) -> None:
        """Append rows of the shard's table, or of another that was opened.

        Raises:
            ContractError: they do not satisfy the contract.
        """
        self._write(name or self._table, rows)

    def reject(self, rows: pl.DataFrame) -> None:
        """Append source rows that were put aside: source_uri, row_index, doc_id, reason, detail."""
        schema = data_contracts.arrow_schema("rejected")
        frame = rows.with_columns(run_id=pl.lit(self._run.run_id, dtype=pl.String)).select(schema.names)
        self._write("rejected", frame.to_arrow().cast(schema))
        for reason, count in frame.group_by("reason").len().iter_rows():
            self._rejected_by_reason[reason] = self._rejected_by_reason.get(reason, 0) + count

    def receipt(self, counts: Counts) -> ShardReceipt:
        """Say what was written, and record the shard as finished; call it after the block."""
        rejected = {
            "num_rejected": self._num_rows["rejected"],
            "rejected_by_reason": self._rejected_by_reason,
        }
        receipt = ShardReceipt(
            shard_key=self._shard.key,
            files=tuple(
                FileReceipt(table=name, path=self._run.path_of(name, self._shard.key), num_rows=num_rows)
                for name, num_rows in self._num_rows.items()
            ),
            counts=counts.model_copy(update=rejected),
        )
        storage.write_bytes(self._run.receipt_uri(self._shard.key), receipt.model_dump_json(indent=1).encode())
        return receipt

    def _open(self, stack: ExitStack, name: str) -> pq.ParquetWriter:
        uri = storage.join(self._run.output_uri, self._run.path_of(name, self._shard.key))
        if name in OBJECTS_SORTED_BY:
            schema = data_contracts.arrow_schema(name)
            return stack.enter_context(sorted_files.sorted_writer(uri, schema, by=OBJECTS_SORTED_BY[name]))
        return stack.enter_context(storage.parquet_writer(uri, data_contracts.arrow_schema(name)))

    def _write(self, name: str, table: pa.Table) -> None:
        check(table, name, f"shard {self._shard.key}")
        self._writers[name].write_table(table)
        self._num_rows[name] += table.num_rows


def finished_shard(run: RunRef, shard: ShardRef) -> ShardReceipt | None:
    """The receipt that an earlier attempt at this run left, if the shard is finished."""
    uri = run.receipt_uri(shard.key)
    if not storage.exists(uri):
        return None
    receipt = read_json(uri, ShardReceipt, "the receipt of a shard")
    if not all(storage.exists(storage.join(run.output_uri, file.path)) for file in receipt.files):
        return None
    return receipt.model_copy(update={"reused": True})


def complete(
    run: RunRef,
    receipts: list[ShardReceipt],
    *,
    row: dict[str, Any],
    labels: tuple[str, ...],
    started_at: datetime,
    change: TableChange | None = None,
) -> Manifest:
    """Say that a run is complete: check its row, and write the manifest.

    Args:
        run: where it wrote.
        receipts: of all its shards, and of its plan if that wrote tables too.
        row: columns of the runs contract that the counts do not give: flow, corpus_uri, spec, and so on.
        labels: label names in the order of scores.
        started_at: when it began.
        change: of a scoring run, what it does to the published tables.

    Raises:
        ContractError: the row does not satisfy the runs contract.
    """
    manifest = Manifest(
        run=_run_row(run, receipts, row, started_at),
        labels=labels,
        rejected_by_reason=total(receipts).rejected_by_reason,
        files=tuple(file for receipt in receipts for file in receipt.files),
        change=change,
    )
    storage.write_bytes(run.manifest_uri, (manifest.model_dump_json(indent=1) + "\n").encode())
    return manifest


def publish(
    run: RunRef,
    receipts: list[ShardReceipt],
    *,
    row: dict[str, Any],
    labels: tuple[str, ...],
    started_at: datetime,
) -> Manifest:
    """Complete a run, and point readers of the output to it; parameters are those of `complete`."""
    manifest = complete(run, receipts, row=row, labels=labels, started_at=started_at)
    storage.write_bytes(storage.join(run.output_uri, "published.json"), storage.read_bytes(run.manifest_uri))
    milestones.rows_rejected(run.run_id, total(receipts))
    milestones.published(run.run_id, run.output_uri)
    return manifest


def find_complete(run: RunRef) -> Manifest | None:
    """The manifest of a run that is complete already; None if it is not, or has lost a file."""
    if not storage.exists(run.manifest_uri):
        return None
    manifest = read_run_manifest(run)
    if not all(storage.exists(storage.join(run.output_uri, file.path)) for file in manifest.files):
        return None
    return manifest


def republish(run: RunRef) -> Manifest | None:
    """The manifest of a run that is complete already, made the published one again; None if it is not complete.

    A run that has lost a file is not complete: its missing shards are done again.
    """
    manifest = find_complete(run)
    if manifest is not None:
        data, published_uri = storage.read_bytes(run.manifest_uri), storage.join(run.output_uri, "published.json")
        if not storage.exists(published_uri) or storage.read_bytes(published_uri) != data:
            storage.write_bytes(published_uri, data)
        milestones.published(run.run_id, run.output_uri, reused=True)
    return manifest


def read_run_manifest(run: RunRef) -> Manifest:
    """The manifest of a complete run.

    Raises:
        ConfigError: it is not complete, or not a run of this belt.
    """
    return _read_manifest(run.manifest_uri)


def read_manifest(output_uri: str) -> Manifest:
    """The manifest of the published run.

    Raises:
        ConfigError: nothing was published there.
    """
    uri = storage.join(output_uri, "published.json")
    if not storage.exists(uri):
        raise ConfigError(f"{output_uri}: nothing is published there (no published.json)")
    return _read_manifest(uri)


def _read_manifest(uri: str) -> Manifest:
    return read_json(uri, Manifest, "a manifest")


def read_table(output_uri: str, table: str, *, columns: list[str] | None = None) -> pl.DataFrame:
    """One table of the published run; for results that fit in memory.

    Raises:
        ConfigError: nothing was published there, or not this table.
    """
    manifest = read_manifest(output_uri)
    uris = manifest.uris(output_uri, table)
    if not uris:
        names = sorted({file.table for file in manifest.files})
        raise ConfigError(f"{output_uri}: table must be one of {', '.join(names)}, got {table!r}")
    tables = [storage.read_parquet(uri, columns=columns) for uri in uris]
    return pl.DataFrame(pa.concat_tables(tables))


def _run_row(run: RunRef, receipts: list[ShardReceipt], row: dict[str, Any], started_at: datetime) -> dict[str, Any]:
    counts = total(receipts)
    finished_at = datetime.now(UTC)
    flops_per_s = _share(counts.needed_flops or None, counts.encode_s)
    schema = data_contracts.arrow_schema("runs")
    values = {name: getattr(counts, name) for name in Counts.model_fields if name in schema.names}
    values |= {
        "run_id": run.run_id,
        "output_uri": run.output_uri,
        "num_shards": sum(receipt.is_shard for receipt in receipts),
        "elapsed_s": (finished_at - started_at).total_seconds(),
        "tokens_per_s": _share(counts.num_tokens_encoded or None, counts.encode_s),
        "padding_share": _share(counts.num_padding, counts.num_positions),
        "redundant_chunk_share": _share(counts.num_redundant_chunks, counts.num_chunks),
        "flops_per_s": flops_per_s,
        "peak_share": _share(flops_per_s, peak_flops(row.get("device"), row.get("precision"))),
        "belt_version": version("belt"),
        "torch_version": version("torch"),
        "transformers_version": version("transformers"),
        "started_at": started_at,
        "finished_at": finished_at,
        **row,
    }
    values = {name: values.get(name) for name in schema.names}
    check(pa.Table.from_pylist([values], schema=schema), "runs", f"run {run.run_id}")
    return values | {"started_at": started_at.isoformat(), "finished_at": finished_at.isoformat()}


def _share(part: float | None, whole: float | None) -> float | None:
    """None where there is nothing to divide, or nothing to divide it by."""
    return part / whole if part is not None and whole else None
