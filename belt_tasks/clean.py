"""Cleaning up: what runs left behind that nobody needs any more, never anything that a table refers to.

- Runs that did not finish, and complete ones that were never shown: all of them.
- Runs that were shown before the present one: the files that the tables have taken in. What a rollback needs stays, and
  so do evaluations.
- Inventories of files that no remaining run knows.
- Files of the tables that no version refers to; older versions can be gone back to for 30 days.
- Temporary files of processes that were killed.

Nothing is touched that changed after the limit, so that a run under way is safe however slow it is, as long as it was
taken up, or finished a shard, within the limit.
"""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from belt_tasks import delta_tables, local_files, storage
from belt_tasks.errors import ConfigError
from belt_tasks.publishing import RunRef
from belt_tasks.score_tables import SORTED_BY, table_at
from belt_tasks.specs import Spec
from belt_tasks.storage import StoredFile

TAKEN_IN = (
    "plan.json",
    "removed.parquet",
    "unscored.parquet",
    "reread.parquet",
    "rows/",
    "receipts/",
    "predictions/",
    "evidence/",
    "rejected/",
)
"""Of a run that was shown: what only its publishing needed."""
FIRST = ("manifest.json", "plan.json")
"""Removed before all else, so that half a run never looks like a whole one."""


class Removed(Spec):
    """Files that belong together."""

    what: str
    num_files: int
    num_bytes: int


class Cleaned(Spec):
    """What was removed, or would be."""

    num_unfinished_runs: int
    """Runs that did not finish or were never shown."""
    parts: tuple[Removed, ...]

    @property
    def num_files(self) -> int:
        """In all."""
        return sum(part.num_files for part in self.parts)

    @property
    def num_bytes(self) -> int:
        """In all."""
        return sum(part.num_bytes for part in self.parts)


def clean_up(output_uri: str, *, older_than: timedelta, dry_run: bool = False) -> Cleaned:
    """Remove what nobody needs.

    Args:
        output_uri: of earlier runs.
        older_than: what changed since is left alone.
        dry_run: only say what would be removed.

    Raises:
        ConfigError: there is no run, or the output is not one of score runs.
    """
    output_uri = storage.absolute(output_uri)
    predictions = table_at(output_uri, "predictions")
    shown = list(delta_tables.versions_by_run(predictions))
    if not shown:
        raise ConfigError(f"{output_uri}: nothing was published there by `belt score`")
    limit = datetime.now(UTC) - older_than
    runs: dict[str, list[StoredFile]] = {}
    for file in _files(storage.join(output_uri, "runs")):
        run_id = file.uri.removeprefix(storage.join(output_uri, "runs") + "/").partition("/")[0]
        runs.setdefault(run_id, []).append(file)
    old = {run_id: files for run_id, files in runs.items() if max(file.changed_at for file in files) < limit}
    orphans = old.keys() - set(shown)
    found = {f"run {run_id}, never shown": old[run_id] for run_id in sorted(orphans)}
    for run_id in sorted(old.keys() & set(shown[1:])):
        folder = RunRef(output_uri=output_uri, run_id=run_id).uri
        taken_in = [file for file in old[run_id] if file.uri.removeprefix(f"{folder}/").startswith(TAKEN_IN)]
        found[f"run {run_id}, what the tables have taken in"] = taken_in
    found["inventories that no run knows"] = _unknown_inventories(output_uri, runs.keys() - orphans, limit)
    for name in SORTED_BY:
        table = table_at(output_uri, name)
        expired = set(delta_tables.expired_files(table))
        left = [file for file in _files(table.uri) if file.uri in expired and file.changed_at < limit]
        found[f"table {name}, what no version refers to"] = left
    if storage.is_local(output_uri):  # object stores know no half-written files
        known = {file.uri for files in found.values() for file in files}
        found["temporary files of processes that were killed"] = [
            file
            for folder in ("runs", "inventory", "tables", "export")
            for file in _files(storage.join(output_uri, folder))
            if local_files.is_temporary(file.uri) and file.changed_at < limit and file.uri not in known
        ]
    if not dry_run:
        removed = [file for files in found.values() for file in files]
        first = [file.uri for file in removed if file.uri.rpartition("/")[2] in FIRST]
        storage.remove_files(first)
        storage.remove_files([file.uri for file in removed if file.uri not in set(first)])
    return Cleaned(
        num_unfinished_runs=len(orphans),
        parts=tuple(
            Removed(what=what, num_files=len(files), num_bytes=sum(file.num_bytes for file in files))
            for what, files in found.items()
            if files
        ),
    )


def _unknown_inventories(output_uri: str, run_ids: Iterable[str], limit: datetime) -> list[StoredFile]:
    """Inventories that no remaining run knows."""
    known: set[str] = set()
    for run_id in run_ids:
        run = RunRef(output_uri=output_uri, run_id=run_id)
        if storage.exists(run.sources_uri):
            known |= set(storage.read_parquet(run.sources_uri, columns=["inventory_key"])["inventory_key"].to_pylist())
    return [
        file
        for file in _files(storage.join(output_uri, "inventory"))
        if file.changed_at < limit and file.uri.rpartition("/")[2].removesuffix(".parquet") not in known
    ]


def _files(uri: str) -> list[StoredFile]:
    return storage.files_under(uri, hidden=True) or []
