"""Examples: a few rows of a run that people should look at, found without holding its tables in memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import polars as pl

import data_contracts
from belt_tasks import delta_tables, score_tables, storage
from belt_tasks.publishing import Manifest, RunRef
from belt_tasks.receipts import FileReceipt
from belt_tasks.threads import Threads

NUM_LABELS = 8  # that evidence is shown of
NUM_PASSAGES = 3  # of a label
NUM_ROWS = 300  # rejected ones that are shown
NUM_RUNS = 30
BATCH_ROWS = 16_384
NUM_THREADS = 4  # files at once, some columns of a row group of each in memory

RANKING: dict[str, type[pl.DataType]] = {"rank": pl.Int32, "label": pl.String, "contribution": pl.Float64}
PLACE: dict[str, type[pl.DataType]] = {"file": pl.Int32, "group": pl.Int32, "row": pl.UInt32}
EVIDENCE = ["doc_id", "label", "score", "contribution", "start_char", "stop_char", "text"]
RUN_COLUMNS = [
    "run_id",
    "started_at",
    "scoring_fingerprint",
    "device",
    "tokens_per_s",
    "read_s",
    "tokenize_s",
    "encode_s",
    "write_s",
]
REJECTED = ["source_uri", "row_index", "doc_id", "reason", "detail"]


@dataclass(frozen=True, kw_only=True)
class RejectedRows:
    """What was put aside."""

    by_reason: pl.DataFrame
    """reason, len; the commonest first."""
    by_source: pl.DataFrame
    """source_uri, reason, len; the files with most rejected rows first."""
    rows: pl.DataFrame
    """REJECTED; some rows of every reason, by file and position."""

    @property
    def num_rows(self) -> int:
        """In all."""
        return int(self.by_reason["len"].sum())


def top_evidence(run: RunRef, manifest: Manifest, labels: tuple[str, ...]) -> list[dict[str, str | float | None]]:
    """The chunks that give most to their documents' labels: EVIDENCE, `text` None where passages were not copied.

    Args:
        run: a complete run whose files are there.
        manifest: of it.
        labels: those of which to show evidence, NUM_LABELS of them at most.

    Returns:
        In the order of the labels, what contributes most first.
    """
    labels, uris = labels[:NUM_LABELS], manifest.uris(run.output_uri, "evidence")

    def rank(number: int) -> pl.DataFrame:
        found = pl.DataFrame(schema=RANKING | PLACE)
        with storage.open_parquet(uris[number]) as file:
            for group in range(file.num_row_groups):
                with storage.errors_of(f"read {uris[number]}"):
                    rows = pl.DataFrame(file.read_row_group(group, columns=list(RANKING)))
                place = {"file": pl.lit(number), "group": pl.lit(group), "row": pl.int_range(pl.len())}
                rows = rows.with_columns(expression.cast(PLACE[name]).alias(name) for name, expression in place.items())
                rows = rows.filter((pl.col("rank") == 1) & pl.col("label").is_in(labels)).select(*RANKING, *PLACE)
                found = _best(pl.concat([found, rows]))
        return found

    with Threads(NUM_THREADS) as threads:
        found = _best(pl.concat([pl.DataFrame(schema=RANKING | PLACE), *threads.map(rank, range(len(uris)))]))
        places = [(uris[file], group, row) for file, group, row in found.select(*PLACE).iter_rows()]
        rows = list(threads.map(lambda place: _row(*place, columns=EVIDENCE), places))
    return sorted(rows, key=lambda row: labels.index(str(row["label"])))


def rejected_rows(output_uri: str, files: Sequence[FileReceipt]) -> RejectedRows:
    """Count and choose rows that a run put aside, when it was planned or later.

    Args:
        output_uri: of the run.
        files: what it wrote; other tables than `rejected` are passed over.
    """
    counts = pl.DataFrame(schema={"source_uri": pl.String, "reason": pl.String, "len": pl.UInt32})
    chosen = [pl.DataFrame(schema=dict.fromkeys(REJECTED, pl.String) | {"row_index": pl.Int64})]
    num_chosen: dict[str, int] = {}
    with_rows = [file for file in files if file.table == "rejected" and file.num_rows]
    for uri in (storage.join(output_uri, file.path) for file in with_rows):
        with storage.open_parquet(uri) as file, storage.errors_of(f"read {uri}"):
            for batch in file.iter_batches(BATCH_ROWS, columns=REJECTED):
                rows = pl.DataFrame(batch)
                counts = pl.concat([counts, rows.group_by("source_uri", "reason").len()])
                counts = counts.group_by("source_uri", "reason").agg(pl.col("len").sum())
                for (reason,), of_reason in rows.group_by("reason", maintain_order=True):
                    taken = num_chosen.get(str(reason), 0)
                    chosen.append(of_reason.head(NUM_ROWS - taken))
                    num_chosen[str(reason)] = taken + len(chosen[-1])
    turn = pl.int_range(pl.len()).over("reason")  # each reason has its turn until there are enough
    rows = pl.concat(chosen).sort(turn, maintain_order=True).head(NUM_ROWS).sort("source_uri", "row_index")
    in_file = pl.col("len").sum().over("source_uri")
    return RejectedRows(
        by_reason=counts.group_by("reason").agg(pl.col("len").sum()).sort("len", "reason", descending=[True, False]),
        by_source=counts.sort(in_file, "source_uri", "len", "reason", descending=[True, False, True, False]),
        rows=rows,
    )


def last_runs(run: RunRef, manifest: Manifest) -> pl.DataFrame:
    """The last scoring runs of an output up to one, which comes last: RUN_COLUMNS, by their start."""
    table = score_tables.table_at(run.output_uri, "runs")
    schema = pl.DataFrame(data_contracts.arrow_schema("runs").empty_table()).schema
    this = manifest.run | {"started_at": datetime.fromisoformat(manifest.run["started_at"])}
    wanted = {name: schema[name] for name in RUN_COLUMNS}
    row = pl.DataFrame([{name: this.get(name) for name in RUN_COLUMNS}], schema=wanted)
    rows = delta_tables.scan(table)
    if rows is None:
        return row
    before = rows.filter(
        pl.col("flow") == "score", pl.col("run_id") != run.run_id, pl.col("started_at") <= this["started_at"]
    )
    found = delta_tables.collect(before.select(RUN_COLUMNS), table).sort("started_at", "run_id").tail(NUM_RUNS - 1)
    return pl.concat([found, row])


def _best(rows: pl.DataFrame) -> pl.DataFrame:
    """Of each label the rows that contribute most; of equals those that come first."""
    ordered = rows.sort("contribution", descending=True, maintain_order=True)
    return ordered.filter(pl.int_range(pl.len()).over("label") < NUM_PASSAGES)


def _row(uri: str, group: int, row: int, *, columns: list[str]) -> dict[str, str | float | None]:
    """One row of a row group, without the rest of it in memory: passages can be larger than all else."""
    with storage.open_parquet(uri) as file, storage.errors_of(f"read {uri}"):
        for batch in file.iter_batches(BATCH_ROWS // 16, row_groups=[group], columns=columns):
            if row < len(batch):
                return dict(batch.slice(row, 1).to_pylist()[0])
            row -= len(batch)
    raise AssertionError("the row was found there")
