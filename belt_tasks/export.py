"""Export: the predictions as plain Parquet, for tools that know neither Delta Lake nor belt.

    OUTPUT/export/RUN_ID/N.parquet    all predictions that the run shows
    OUTPUT/export/manifest.json       the folder to read now; written after its files

A folder is never changed once the manifest names it. The one before it stays until the next export, for readers that
are in the middle of it; to read more than one folder at once is to read documents twice.
"""

import json
from datetime import UTC, datetime

import data_contracts
from belt_tasks import lake, score_tables, sorted_files, storage
from belt_tasks.errors import ConfigError
from belt_tasks.sorted_files import SortedFile
from belt_tasks.specs import Spec
from belt_tasks.stored import read_json


class ExportManifest(Spec):
    """What to read."""

    run_id: str
    version: int
    """Of the predictions table."""
    glob: str
    """The files, relative to the output."""
    files: tuple[str, ...]
    """The same one by one."""
    num_rows: int
    exported_at: datetime


def export_predictions(output_uri: str) -> ExportManifest:
    """Export what is shown now; nothing happens where that was exported already.

    Raises:
        ConfigError: nothing is published there.
    """
    output_uri = storage.absolute(output_uri)
    shown = score_tables.shown(output_uri)
    if shown is None:
        raise ConfigError(f"{output_uri}: nothing is published there (no table predictions)")
    before = read_export(output_uri)
    if before is not None and (before.run_id, before.version) == (shown.run_id, shown.version):
        return before
    table = score_tables.table_at(output_uri, "predictions")
    schema = data_contracts.arrow_schema("predictions")
    folder = f"export/{shown.run_id}-{shown.version}"
    files, num_rows = [], 0
    for i, uri in enumerate(lake.file_uris(table, shown.version)):
        rows = SortedFile.read(uri, table.key).rows(None, None, schema)
        files.append(f"{folder}/{i:05}.parquet")
        sorted_files.put_sorted(storage.join(output_uri, files[-1]), rows, by=[table.key])
        num_rows += len(rows)
    manifest = ExportManifest(
        run_id=shown.run_id,
        version=shown.version,
        glob=f"{folder}/*.parquet",
        files=tuple(files),
        num_rows=num_rows,
        exported_at=datetime.now(UTC),
    )
    data = json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n"
    storage.write_bytes(storage.join(output_uri, "export", "manifest.json"), data.encode())
    _remove_all_but(output_uri, {manifest.glob, *(() if before is None else (before.glob,))})
    return manifest


def read_export(output_uri: str) -> ExportManifest | None:
    """What was exported last; None where nothing was."""
    uri = storage.join(output_uri, "export", "manifest.json")
    return read_json(uri, ExportManifest, "the manifest of an export") if storage.exists(uri) else None


def _remove_all_but(output_uri: str, globs: set[str]) -> None:
    kept = tuple(storage.join(output_uri, glob.removesuffix("*.parquet")) for glob in globs)
    files = storage.list_files(storage.join(output_uri, "export"), suffix=".parquet", hidden=True)
    storage.remove_files([file.uri for file in files if not file.uri.startswith(kept)])
