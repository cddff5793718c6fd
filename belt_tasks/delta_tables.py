"""Delta tables: what belt asks Delta Lake about a published table, and how an earlier version is shown again.

Whatever Delta Lake has to say against it becomes an error of belt's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import polars as pl
import pyarrow as pa
from deltalake import CommitProperties, DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

import data_contracts
from belt_tasks import object_stores, storage
from belt_tasks.errors import ConfigError, ConflictError

RUN_ID = "belt.run_id"  # in a commit's metadata
MOST_HISTORY = 100  # commits looked back for one of belt's; there are others where someone maintains the table


@dataclass(frozen=True, kw_only=True)
class TableRef:
    """A published table."""

    uri: str
    name: str
    """Of its contract."""
    key: str
    """Its first sorting column; a run replaces all rows of a key together."""
    order: tuple[str, ...] = ()
    """Further sorting columns."""

    def load(self, version: int | None = None) -> DeltaTable | None:
        """The table as it is now, or was; None where there is none.

        Raises:
            ConfigError: the place cannot be read, or Delta Lake cannot write there.
        """
        with delta_errors(f"read {self.uri}"):
            try:
                return DeltaTable(self.uri, version=version, storage_options=storage.delta_options(self.uri))
            except TableNotFoundError:
                return None


def scan(table: TableRef, version: int | None = None) -> pl.LazyFrame | None:
    """The table's rows as they are now, or were, in the columns of the contract; None where there is none.

    Columns that the table does not have yet are null, and those that only a later contract has are left out.

    Raises:
        ConfigError: its columns are not those of the contract.
    """
    delta = table.load(version)
    if delta is None:
        return None
    checked(table, delta, may_have_more=True)
    with delta_errors(f"read {table.uri}"):
        rows = _rows(table, delta)
        stored = rows.collect_schema()
    wanted = pl.DataFrame(data_contracts.arrow_schema(table.name).empty_table()).schema
    rows = rows.with_columns(pl.lit(None).alias(name) for name in wanted if name not in stored)
    # a cast of all columns would keep filters from the files
    return rows.cast({name: wanted[name] for name in wanted if stored.get(name) != wanted[name]}).select(wanted.names())


def _rows(table: TableRef, delta: DeltaTable) -> pl.LazyFrame:
    """The rows by polars, which reads local files in half the time that pyarrow takes.

    Not those of object stores: for each store polars leaves a task behind that reads the environment ten times a second
    as long as the process lives, and whoever then adds a variable may end a process whose C library is glibc before
    2.41.
    """
    if storage.is_local(table.uri):
        return pl.scan_delta(delta)
    return pl.scan_pyarrow_dataset(delta.to_pyarrow_dataset())


def collect(rows: pl.LazyFrame, table: TableRef) -> pl.DataFrame:
    """What was asked of a table's rows.

    Raises:
        ConfigError: they cannot be read.
        TransientError: the store did not answer.
    """
    with delta_errors(f"read {table.uri}"):
        return rows.collect()


def check(table: TableRef) -> None:
    """Make sure that runs can be published to a table; also where there is none yet.

    Raises:
        ConfigError: its columns are not those of the contract, and cannot become so.
    """
    delta = table.load()
    if delta is not None:
        checked(table, delta)


def shown_run(delta: DeltaTable) -> str | None:
    """The run that the table shows: the last one that changed it, or to which it was restored."""
    commit = _shown_commit(delta)
    return None if commit is None else str(commit[RUN_ID])


def is_restored(delta: DeltaTable) -> bool:
    """Whether it shows a run that it had shown before."""
    commit = _shown_commit(delta)
    return commit is not None and commit["operation"] == "RESTORE"


def versions_by_run(table: TableRef) -> dict[str, int]:
    """The runs that a table has shown, the present one first, each with the last version that shows it."""
    delta = table.load()
    versions: dict[str, int] = {}
    for entry in [] if delta is None else _history(delta):
        if RUN_ID in entry:
            versions.setdefault(str(entry[RUN_ID]), int(entry["version"]))
    return versions


def expired_files(table: TableRef) -> list[str]:
    """Files that no version refers to which can still be gone back to, by the table's own limit of 30 days.

    Nothing is removed, and nothing committed.
    """
    delta = table.load()
    if delta is None:
        return []
    with delta_errors(f"look through {table.uri}"):
        return [storage.join(table.uri, path) for path in delta.vacuum(dry_run=True, full=True)]


def restore(table: TableRef, version: int, *, run_id: str, now: DeltaTable | None = None) -> int:
    """Show an earlier version again, by a new commit; returns that commit's version.

    Args:
        table: what to change.
        version: what to show.
        run_id: the run that this version shows.
        now: the table as it was found; where it has changed since, nothing is restored. None finds it.

    Raises:
        ConflictError: a run changed the table at the same moment; nothing was restored.
        ConfigError: files of that version were removed since.
    """
    delta = now or table.load()
    if delta is None:
        raise ConfigError(f"{table.uri}: no table is there")
    properties = CommitProperties(custom_metadata={RUN_ID: run_id}, max_commit_retries=0)
    try:
        with delta_errors(f"restore version {version} of {table.uri}"):
            delta.restore(version, commit_properties=properties)
    except CommitFailedError as error:
        raise ConflictError(f"{table.uri}: a run changed the table at this moment; nothing was restored") from error
    after = table.load()
    return version if after is None else after.version()


def checked(table: TableRef, delta: DeltaTable, *, may_have_more: bool = False) -> pa.Schema:
    """The schema of a table whose rows can be rows of its contract.

    Args:
        table: its contract.
        delta: the table.
        may_have_more: whether columns of a later contract are let pass.

    Raises:
        ConfigError: they cannot.
    """
    stored = pa.schema(delta.schema().to_arrow())
    found = data_contracts.misfits(stored, table.name)
    found = [each for each in found if not (may_have_more and each.rule == "extra" and each.path in stored.names)]
    if found:
        raise ConfigError(
            f"{data_contracts.message(found, table.name, table.uri)}; "
            "use the version of belt that wrote this table, or choose another output"
        )
    return stored


def num_rows(delta: DeltaTable) -> int:
    """Of a version."""
    return int(sum(add_actions(delta)["num_records"].to_pylist()))


def add_actions(delta: DeltaTable) -> pa.Table:
    """The files of a version."""
    with delta_errors(f"read {delta.table_uri}"):
        return pa.table(delta.get_add_actions(flatten=True))


@contextmanager
def delta_errors(action: str) -> Iterator[None]:
    """Say what failed; the store's own words, without its address book.

    Raises:
        ConfigError: a person has to mend it.
        TransientError: the same may succeed later.
        CommitFailedError: another commit came first; TableNotFoundError: there is no table.
    """
    try:
        yield
    except (CommitFailedError, TableNotFoundError):
        raise
    except (DeltaError, OSError, ValueError, pl.exceptions.ComputeError) as error:
        if "already exists at that location" in str(error):  # two runs made the table
            raise CommitFailedError(str(error)) from None
        raise object_stores.error_of(error, action) from None


def _shown_commit(delta: DeltaTable) -> dict[str, Any] | None:
    return next((entry for entry in _history(delta, MOST_HISTORY) if RUN_ID in entry), None)


def _history(delta: DeltaTable, most: int | None = None) -> list[dict[str, Any]]:
    """The last commits, the last one first."""
    with delta_errors(f"read {delta.table_uri}"):
        return delta.history(most)
