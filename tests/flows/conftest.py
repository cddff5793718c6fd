"""One Prefect server for all flow tests, in a PREFECT_HOME that goes when the session ends."""

import os
import shutil
import tempfile
import time
from typing import Any

# before anything imports prefect, which makes its home at once
os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="belt-prefect-")
os.environ["PREFECT_LOGGING_LEVEL"] = "CRITICAL"
os.environ["PREFECT_SERVER_LOGGING_LEVEL"] = "CRITICAL"
os.environ["PREFECT_LOGGING_TO_API_ENABLED"] = "false"

import polars as pl
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events.filters import EventFilter, EventNameFilter, EventResourceFilter
from prefect.settings import PREFECT_API_URL
from prefect.testing.utilities import prefect_test_harness

from tests.conftest import labelled_rows

KEPT_WITHIN_S = 60


@pytest.fixture(scope="session", autouse=True)
def prefect_server():
    """The server's address; subprocesses use the same one."""
    with pytest.MonkeyPatch.context() as patch, prefect_test_harness(server_startup_timeout=120):
        patch.setenv("PREFECT_API_URL", PREFECT_API_URL.value())
        yield PREFECT_API_URL.value()
    shutil.rmtree(os.environ["PREFECT_HOME"], ignore_errors=True)


@pytest.fixture
def client() -> SyncPrefectClient:
    with get_client(sync_client=True) as client:
        yield client


def events_of(client: SyncPrefectClient, name: str, resource_id: str, *, at_least: int) -> list[Any]:
    """The events of a resource that the server keeps, once it keeps so many, or after a while."""
    wanted = EventFilter(event=EventNameFilter(name=[name]), resource=EventResourceFilter(id=[resource_id]))
    give_up_at = time.monotonic() + KEPT_WITHIN_S
    while True:
        found = client.read_events(wanted, limit=50).events
        if len(found) >= at_least or time.monotonic() > give_up_at:
            return found
        time.sleep(0.2)


def write_files(folder, rows: pl.DataFrame, *, num_files: int) -> str:
    """Rows as the Parquet files of a corpus; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    size = -(-len(rows) // num_files)
    for i in range(num_files):
        rows.slice(i * size, size).write_parquet(folder / f"part-{i}.parquet")
    return str(folder)


@pytest.fixture(scope="session")
def labelled_corpus(tmp_path_factory) -> str:
    """Three files of 12 documents each, with one broken row."""
    rows = labelled_rows(36, most_words=60)
    rows = rows.with_columns(text=pl.when(pl.col("doc_id") == "doc-0030").then(None).otherwise(pl.col("text")))
    return write_files(tmp_path_factory.mktemp("labelled") / "corpus", rows, num_files=3)
