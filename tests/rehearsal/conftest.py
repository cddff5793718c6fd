"""One stack for all rehearsals: PostgreSQL, S3, Prefect server and workers, with everything deployed."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import polars as pl
import pytest

from belt_tasks import object_stores, storage
from deployments.services import PREFERRED_PORTS, Stack, free_ports
from tests.conftest import labelled_rows, save_tiny_checkpoint, save_tiny_encoder
from tests.rehearsal.rehearsal import Rehearsal

NUM_FILES = 60
TIMEZONE = "Europe/Warsaw"
NIGHT_IN = timedelta(minutes=4)


@pytest.fixture(scope="session")
def night() -> datetime:
    """When the schedule has its night: soon, at a full minute."""
    return (datetime.now(UTC) + NIGHT_IN).replace(second=0, microsecond=0)


@pytest.fixture(scope="session")
def rehearsal(night, tmp_path_factory) -> Iterator[Rehearsal]:
    """The stack, started, with corpora in its store; it ends with the session."""
    folder = tmp_path_factory.mktemp("stack") / "data"
    stack = Stack.make(folder, **dict(zip(PREFERRED_PORTS, free_ports(3), strict=True)))
    encoder = save_tiny_encoder(folder.parent / "encoder", "bert", max_position_embeddings=512)
    local = night.astimezone(ZoneInfo(TIMEZONE))
    site = {
        "BELT_CORPUS_URI": "s3://belt/corpus",
        "BELT_LABELLED_URI": "s3://belt/labelled",
        "BELT_HELD_OUT_URI": "s3://belt/held-out",
        "BELT_CHECKPOINT_URI": save_tiny_checkpoint(folder.parent / "model", encoder, ("fox", "window")),
        "BELT_OUTPUT_URI": "s3://belt/predictions",
        "BELT_MODELS_URI": "s3://belt/models",
        "BELT_ENCODER": str(encoder),
        "BELT_CRON": f"{local.minute} {local.hour} * * *",
        "BELT_TIMEZONE": TIMEZONE,
    }
    rehearsal = Rehearsal(stack=stack, site=site)
    try:
        rehearsal.make("up", "--late-after-s=15", **site)
        _write_corpora(stack)
        yield rehearsal
    finally:
        rehearsal.make("down")


@pytest.fixture
def stores(rehearsal) -> Iterator[None]:
    """Belt's own functions find the stack's object store."""
    object_stores.configure(rehearsal.stack.storage_options)
    yield
    object_stores.configure({})


def _write_corpora(stack: Stack) -> None:
    object_stores.configure(stack.storage_options)
    rows = labelled_rows(12 * NUM_FILES, most_words=60).with_columns(
        text=pl.when(pl.col("doc_id") == "doc-0030").then(None).otherwise(pl.col("text"))
    )
    for i in range(NUM_FILES):
        storage.write_parquet(f"s3://belt/corpus/part-{i:02}.parquet", rows.slice(12 * i, 12).to_arrow())
    for name, seed in (("labelled", 1), ("held-out", 2)):
        some = labelled_rows(120, seed=seed, most_words=60).drop("split")
        storage.write_parquet(f"s3://belt/{name}/part-0.parquet", some.to_arrow())
    object_stores.configure({})
