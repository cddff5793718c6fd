"""Published tables as others read them, wherever they are.

Polars reads object stores with threads that never end and read the environment ten times a second. pytest changes the
environment at every test, and with glibc before 2.41 the two together now and then end a process: so polars reads in
a process of its own.
"""

import functools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import polars as pl
from deltalake import DeltaTable

from belt_tasks import storage


def by_delta_lake(uri: str, version: int | None = None) -> pl.DataFrame:
    """As Delta Lake's own library reads a table, now or at a version."""
    table = DeltaTable(uri, version=version, storage_options=storage.delta_options(uri))
    return pl.DataFrame(table.to_pyarrow_table())


def by_polars(uri: str, version: int | None = None) -> pl.DataFrame:
    """As polars reads a table, now or at a version."""
    stores = {name.lower(): value for name, value in os.environ.items() if name.startswith("AWS_")}
    return _process().submit(_read, uri, version, stores | storage.delta_options(uri)).result()


@functools.cache
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def _read(uri: str, version: int | None, options: dict[str, str]) -> pl.DataFrame:
    return pl.read_delta(uri, version=version, storage_options=options)
