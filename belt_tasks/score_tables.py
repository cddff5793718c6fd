"""Score tables: what a complete scoring run shows in the lake, for BI: predictions, rejected and runs.

    OUTPUT/tables/predictions    one row per document, of the run that is shown
    OUTPUT/tables/rejected       the rows that this run put aside
    OUTPUT/tables/runs           one row per run that was shown, now or before

The commit to predictions is the one that counts: it happens on the version that the run was planned on. The other two
follow it, and an attempt that is killed between them is completed by the next.
"""

from datetime import datetime

import pyarrow as pa

import data_contracts
from belt_tasks import lake, storage
from belt_tasks.errors import ConflictError
from belt_tasks.lake import Change, Committed, TableRef
from belt_tasks.publishing import Manifest, RunRef
from belt_tasks.specs import Spec

MOST_ATTEMPTS = 10


class PublishedTables(Spec):
    """Where a run is shown."""

    predictions_uri: str
    version: int
    """Of predictions."""
    reused: bool
    """Whether the table showed this run already."""


def table_at(output_uri: str, name: str) -> TableRef:
    """A published table of an output: predictions, rejected or runs."""
    key, *order = {"predictions": ["doc_id"], "rejected": ["source_uri", "row_index"], "runs": ["run_id"]}[name]
    return TableRef(uri=storage.join(output_uri, "tables", name), name=name, key=key, order=tuple(order))


def shown_version(output_uri: str) -> int | None:
    """The present version of predictions, for a run to be planned on; None where nothing was published.

    Raises:
        ConfigError: tables cannot be published there.
    """
    delta = table_at(output_uri, "predictions").load()
    return None if delta is None else delta.version()


def publish_tables(run: RunRef, manifest: Manifest, *, base_version: int | None) -> PublishedTables:
    """Show a complete run; done again, nothing happens.

    Args:
        run: the run.
        manifest: of the run.
        base_version: the version of predictions that it was planned on.

    Raises:
        ConflictError: another run was shown meanwhile; this one is complete, and is shown when it is asked for again.
    """
    predictions = table_at(run.output_uri, "predictions")
    change = Change(new_uris=tuple(manifest.uris(run.output_uri, "predictions")), replaces_all=True)
    shown = lake.commit(predictions, change, run_id=run.run_id, base_version=base_version)
    row_uri = storage.join(run.uri, "run.parquet")
    if not storage.exists(row_uri):
        storage.write_parquet(row_uri, _row(manifest))
    _follow(run, table_at(run.output_uri, "runs"), Change(new_uris=(row_uri,)))
    rejected = Change(new_uris=tuple(manifest.uris(run.output_uri, "rejected")), replaces_all=True)
    _follow(run, table_at(run.output_uri, "rejected"), rejected)
    return PublishedTables(predictions_uri=predictions.uri, version=shown.version, reused=shown.reused)


def _follow(run: RunRef, table: TableRef, change: Change) -> Committed | None:
    """Change a table after predictions, on whatever version it has; not if predictions show another run by now."""
    for attempt in range(MOST_ATTEMPTS):
        predictions = table_at(run.output_uri, "predictions").load()
        if predictions is None or lake.shown_run(predictions) != run.run_id:
            return None
        delta = table.load()
        try:
            return lake.commit(
                table, change, run_id=run.run_id, base_version=None if delta is None else delta.version()
            )
        except ConflictError:
            if attempt + 1 == MOST_ATTEMPTS:
                raise
    return None


def _row(manifest: Manifest) -> pa.Table:
    """The run's row of the runs table."""
    times = {name: datetime.fromisoformat(manifest.run[name]) for name in ("started_at", "finished_at")}
    return pa.Table.from_pylist([manifest.run | times], schema=data_contracts.arrow_schema("runs"))
