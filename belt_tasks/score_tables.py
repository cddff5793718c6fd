"""Score tables: what scoring runs show in the lake, for BI: predictions, evidence, rejected and runs.

    OUTPUT/tables/predictions    one row per document of the corpus
    OUTPUT/tables/evidence       the chunks that speak most for each document's label
    OUTPUT/tables/rejected       the rows of the corpus that are put aside
    OUTPUT/tables/runs           one row per run that was shown, now or before

The commit to predictions is the one that counts: it happens on the version that the run was planned on. The others
follow it, and an attempt that is killed between them is completed before the next run is planned. So is a rollback:
predictions show an earlier run again first, and evidence and rejected follow to their versions of it.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import datetime

import polars as pl
import pyarrow as pa

import data_contracts
from belt_tasks import delta_tables, lake, milestones, publishing, storage
from belt_tasks.delta_tables import TableRef
from belt_tasks.errors import ConfigError, ConflictError
from belt_tasks.lake import Change
from belt_tasks.publishing import Manifest, RunRef
from belt_tasks.receipts import UNSCORED
from belt_tasks.specs import Spec

MOST_ATTEMPTS = 10
SORTED_BY = {
    "predictions": ("doc_id",),
    "evidence": ("doc_id", "rank"),
    "rejected": ("source_uri", "row_index"),
    "runs": ("run_id",),
}
"""The columns of each published table that its rows are sorted by; the first is what runs replace rows by."""
FOLLOWERS = ("evidence", "rejected")
"""Tables that show the run that predictions show; in `runs` every run stays."""


class PublishedTables(Spec):
    """Where a run is shown."""

    predictions_uri: str
    version: int
    """Of predictions."""
    reused: bool
    """Whether the table showed this run already."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """The run whose tables readers see."""

    run: RunRef
    manifest: Manifest
    version: int
    """Of predictions."""

    @property
    def run_id(self) -> str:
        """The run's."""
        return self.run.run_id


def table_at(output_uri: str, name: str) -> TableRef:
    """A published table of an output: predictions, evidence, rejected or runs."""
    key, *order = SORTED_BY[name]
    return TableRef(uri=storage.join(output_uri, "tables", name), name=name, key=key, order=tuple(order))


def read_table(
    output_uri: str, name: str, *, columns: list[str] | None = None, run_id: str | None = None
) -> pl.DataFrame:
    """A published table, sorted; for results that fit in memory.

    Args:
        output_uri: of `belt score`.
        name: predictions, evidence, rejected or runs.
        columns: some of them; None reads all.
        run_id: the run that it is to show; None is the one that it shows now.

    Raises:
        ConfigError: nothing was published there, the table never showed such a run, or its columns are not those of its
            contract.
    """
    table = table_at(storage.absolute(output_uri), name)
    versions = {} if run_id is None else delta_tables.versions_by_run(table)
    if run_id is not None and run_id not in versions:
        raise ConfigError(f"{output_uri}: table {name} never showed run {run_id}")
    rows = delta_tables.scan(table, None if run_id is None else versions[run_id])
    if rows is None:
        raise ConfigError(f"{output_uri}: nothing is published there (no table {name})")
    return delta_tables.collect((rows if columns is None else rows.select(columns)).sort(*SORTED_BY[name]), table)


def shown(output_uri: str) -> Shown | None:
    """The run that predictions show, for the next to be planned on; None where nothing was published.

    Raises:
        ConfigError: tables cannot be published there, or what they show is not known.
    """
    table = table_at(output_uri, "predictions")
    delta = table.load()
    if delta is None:
        return None
    run_id = delta_tables.shown_run(delta)
    if run_id is None:
        raise ConfigError(f"{table.uri}: is not a table that belt wrote; choose another output")
    for name in SORTED_BY:
        delta_tables.check(table_at(output_uri, name))
    run = RunRef(output_uri=output_uri, run_id=run_id)
    return Shown(run=run, manifest=publishing.read_run_manifest(run), version=delta.version())


def finish(output_uri: str) -> Shown | None:
    """Let the other tables follow predictions where an attempt ended between the commits.

    Returns:
        The run that all tables show, for the next to be planned on: one that was shown meanwhile may not be complete.

    Raises:
        ConflictError: another run was shown meanwhile.
    """
    now = shown(output_uri)
    if now is not None:
        publish_tables(now.run, now.manifest, base_version=now.version)
    return now


def follow_back(run: RunRef) -> str | None:
    """Let evidence and rejected show a run again that predictions show again.

    A table that was not there yet when the run was shown becomes empty.

    Returns:
        The run that one of them showed instead; None where none did.

    Raises:
        ConflictError: another run was shown meanwhile.
        ConfigError: files of that version were removed since.
    """
    instead = None
    for name in FOLLOWERS:
        table = table_at(run.output_uri, name)
        delta = table.load()  # before predictions are looked at: once they show another run, its tables stay its own
        now = None if delta is None else delta_tables.shown_run(delta)
        if delta is None or now == run.run_id or not _is_shown(run):
            continue
        instead, versions = now, delta_tables.versions_by_run(table)
        if run.run_id in versions:
            delta_tables.restore(table, versions[run.run_id], run_id=run.run_id, now=delta)
        else:
            lake.commit(table, Change(replaces_all=True), run_id=run.run_id, base_version=delta.version())
    return instead


def publish_tables(run: RunRef, manifest: Manifest, *, base_version: int | None) -> PublishedTables:
    """Show a complete run; done again, nothing happens.

    Args:
        run: the run.
        manifest: of the run.
        base_version: the version of predictions that it was planned on.

    Raises:
        ConflictError: another run was shown meanwhile; nothing of this one is.
    """
    predictions = table_at(run.output_uri, "predictions")
    if manifest.change is None:
        raise ConfigError(f"{run.manifest_uri}: not a scoring run")
    marked_at = None if manifest.change.marked_at is None else datetime.fromisoformat(manifest.change.marked_at)
    change = _change(run, manifest, "predictions", manifest.change.removed_path, marked_at)
    committed = lake.commit(predictions, change, run_id=run.run_id, base_version=base_version)
    row_uri = storage.join(run.uri, "run.parquet")
    if not storage.exists(row_uri):
        storage.write_parquet(row_uri, _row(manifest))
    _follow(run, table_at(run.output_uri, "runs"), Change(new_uris=(row_uri,)))
    now = predictions.load()
    if now is not None and delta_tables.is_restored(now):
        follow_back(run)  # the run's change was made for what they showed before it
    else:
        evidence = table_at(run.output_uri, "evidence")
        if manifest.uris(run.output_uri, "evidence") or evidence.load() is not None:
            _follow(run, evidence, _evidence_change(run, manifest))
        rejected = _change(run, manifest, "rejected", manifest.change.reread_path)
        _follow(run, table_at(run.output_uri, "rejected"), rejected)
    milestones.published(run.run_id, run.output_uri, version=committed.version, reused=committed.reused)
    return PublishedTables(predictions_uri=predictions.uri, version=committed.version, reused=committed.reused)


def never_scored(now: Shown | None, files: Collection[str]) -> pl.Series:
    """Ids of documents of some files that were fit for use but have no prediction: the model gave no number."""
    chosen = (pl.col("reason") == UNSCORED) & pl.col("source_uri").is_in(list(files))
    return _ids(now, "rejected", chosen)


def marked(now: Shown | None) -> pl.Series:
    """Ids of documents that were gone already, and whose predictions are still there."""
    marks = now is not None and now.manifest.change is not None and now.manifest.change.marked_at is not None
    return _ids(now if marks else None, "predictions", pl.col("removed_at").is_not_null())


def _ids(now: Shown | None, name: str, chosen: pl.Expr) -> pl.Series:
    """Ids of some rows of a table; none where there is no such table."""
    table = None if now is None else table_at(now.run.output_uri, name)
    rows = None if table is None else delta_tables.scan(table)
    if table is None or rows is None:
        return pl.Series([], dtype=pl.String)
    return delta_tables.collect(rows.filter(chosen).select("doc_id"), table)["doc_id"]


def _change(
    run: RunRef, manifest: Manifest, table: str, removed_path: str | None, marked_at: datetime | None = None
) -> Change:
    unscored_path = None if manifest.change is None or table == "rejected" else manifest.change.unscored_path
    removed, dropped = (
        () if path is None else (storage.join(run.output_uri, path),) for path in (removed_path, unscored_path)
    )
    return Change(
        new_uris=tuple(manifest.uris(run.output_uri, table)),
        removed_uris=removed,
        dropped_uris=dropped,
        replaces_all=manifest.change is not None and manifest.change.replaces_all,
        marked_at=marked_at,
    )


def _evidence_change(run: RunRef, manifest: Manifest) -> Change:
    """Evidence follows its documents' predictions; of marked ones it stays."""
    gone = None if manifest.change is None or manifest.change.marked_at else manifest.change.removed_path
    change = _change(run, manifest, "evidence", gone)
    scored = manifest.uris(run.output_uri, "predictions")  # their old evidence goes also where no new one comes
    return replace(change, removed_uris=(*change.removed_uris, *scored))


def _follow(run: RunRef, table: TableRef, change: Change) -> None:
    """Change a table after predictions, on whatever version it has; not if predictions show another run by now."""
    for attempt in range(MOST_ATTEMPTS):
        delta = table.load()  # before predictions: once they show this run, the next one's commit comes after
        if not _is_shown(run):
            return
        try:
            lake.commit(table, change, run_id=run.run_id, base_version=None if delta is None else delta.version())
        except ConflictError:
            if attempt + 1 == MOST_ATTEMPTS:
                raise
        else:
            return


def _is_shown(run: RunRef) -> bool:
    predictions = table_at(run.output_uri, "predictions").load()
    return predictions is not None and delta_tables.shown_run(predictions) == run.run_id


def _row(manifest: Manifest) -> pa.Table:
    """The run's row of the runs table."""
    times = {name: datetime.fromisoformat(manifest.run[name]) for name in ("started_at", "finished_at")}
    return pa.Table.from_pylist([manifest.run | times], schema=data_contracts.arrow_schema("runs"))
