"""Milestones: what an operator wants to know of a run, told once, to the log and to the meters.

A run is planned, its shards begin and end, rows are put aside, something is tried again, a run is published.
"""

import functools
import inspect
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import ParamSpec

from belt_tasks import logs, progress, telemetry
from belt_tasks.receipts import Counts, ShardReceipt
from belt_tasks.specs import Spec

P = ParamSpec("P")

log = logging.getLogger(__name__)


def planned(run_id: str, stage: str, *, num_shards: int, num_rows: int, counts: Spec | None = None) -> None:
    """A run is ready to start.

    Args:
        run_id: the run's.
        stage: score, chunk or prepare.
        num_shards: to do.
        num_rows: in them, to be done.
        counts: of documents that are new, changed and so on; None where that was not asked.
    """
    log.info(
        "run %s planned: %s shards and %s rows to %s",
        run_id,
        f"{num_shards:,}",
        f"{num_rows:,}",
        stage,
        extra={"run_id": run_id, "stage": stage, "num_shards": num_shards, "num_rows": num_rows}
        | ({} if counts is None else counts.model_dump()),
    )


def up_to_date(run_id: str, stage: str) -> None:
    """A run is complete already; at most it has to be published still."""
    log.info("run %s is complete already", run_id, extra={"run_id": run_id, "stage": stage})


def rows_rejected(run_id: str, counts: Counts, *, num_rows: int | None = None) -> None:
    """Rows of a run were put aside.

    Args:
        run_id: the run's.
        counts: of what was put aside.
        num_rows: good and bad rows that were read; None where that is not known.
    """
    share = counts.num_rejected / num_rows if num_rows else None
    log.info(
        "run %s: %s rows rejected%s",
        run_id,
        f"{counts.num_rejected:,}",
        "" if share is None else f" of {num_rows:,} ({share:.1%})",
        extra={
            "run_id": run_id,
            "num_rejected": counts.num_rejected,
            "rejected_by_reason": counts.rejected_by_reason,
            "rejected_share": share,
        },
    )


def published(run_id: str, output_uri: str, *, version: int | None = None, reused: bool = False) -> None:
    """Readers see a run.

    Args:
        run_id: the run's.
        output_uri: where.
        version: of the table predictions; None where there is no such table.
        reused: whether they saw it before, which is told to the meters alone.
    """
    if not reused:
        log.info(
            "run %s published%s",
            run_id,
            "" if version is None else f", version {version} of predictions",
            extra={"run_id": run_id, "output_uri": output_uri, "version": version},
        )
    telemetry.published(output_uri, datetime.now(UTC))


def tried_again(error: Exception, *, delay_s: float) -> None:
    """Something failed that another attempt may cure."""
    log.warning("%s; trying again in %.0f seconds", error, delay_s, extra={"delay_s": delay_s})
    telemetry.tried_again()


def of_shard(stage: str) -> Callable[[Callable[P, ShardReceipt]], Callable[P, ShardReceipt]]:
    """Tell when a stage begins and ends a shard; what is logged meanwhile carries the run and the shard.

    Args:
        stage: score, chunk or prepare; the function has parameters `shard` and `run`.
    """

    def decorate(function: Callable[P, ShardReceipt]) -> Callable[P, ShardReceipt]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def told(*args: P.args, **kwargs: P.kwargs) -> ShardReceipt:
            given = signature.bind(*args, **kwargs).arguments
            shard, run = given["shard"], given["run"]
            with logs.about(run_id=run.run_id, shard=shard.key):
                progress.check(stage)  # whoever was stopped begins nothing
                log.info("shard %s started", shard.key, extra={"stage": stage, "source_uri": shard.uri})
                start = time.perf_counter()
                try:
                    receipt = function(*args, **kwargs)
                except BaseException as error:
                    _failed(stage, shard.key, error)
                    raise
                _finished(stage, receipt, time.perf_counter() - start)
                return receipt

        return told

    return decorate


def _finished(stage: str, receipt: ShardReceipt, seconds: float) -> None:
    counts = receipt.counts
    if receipt.reused:
        log.info("shard %s was finished before", receipt.shard_key, extra={"stage": stage, "outcome": "reused"})
        telemetry.shard_ended(stage, "reused")
        return
    tokens_per_s = counts.num_tokens / seconds
    log.info(
        "shard %s finished: %s documents, %s tokens in %.1f s (%s tokens/s)",
        receipt.shard_key,
        f"{counts.num_documents:,}",
        f"{counts.num_tokens:,}",
        seconds,
        f"{tokens_per_s:,.0f}",
        extra={
            "stage": stage,
            "outcome": "finished",
            "num_documents": counts.num_documents,
            "num_tokens": counts.num_tokens,
            "num_chunks": counts.num_chunks,
            "num_rejected": counts.num_rejected,
            "seconds": round(seconds, 3),
            "tokens_per_s": round(tokens_per_s, 1),
        },
    )
    telemetry.shard_ended(stage, "finished", counts, seconds=seconds)


def _failed(stage: str, shard_key: str, error: BaseException) -> None:
    """The error itself goes on to whoever runs the stage, who tells it in full."""
    extra = {"stage": stage, "outcome": "failed", "error": type(error).__name__}
    if isinstance(error, progress.StoppedError):
        log.info("shard %s was stopped; the next attempt does it", shard_key, extra=extra)
    else:
        log.warning("shard %s failed: %s", shard_key, type(error).__name__, extra=extra)
    telemetry.shard_ended(stage, "failed")
