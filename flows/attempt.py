"""What every flow run has in common: where the stores are, how long it may take, and how often it may start again.

A run whose process was killed may be scheduled again, by a person or an automation, and goes on where it was. One that
brings its process down every time is not worth another attempt, so attempts are counted here. Going on after the run
was suspended to wait for a person is no attempt: Prefect does not count it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

from prefect.runtime import flow_run
from pydantic import Field

from belt_tasks import logs, progress
from belt_tasks.errors import ConfigError
from flows.observation import hide_tracebacks_of_mistakes, observe
from flows.progress_artifact import progress_artifact
from flows.storage_block import use_storage_block

MOST_ATTEMPTS = 5
hide_tracebacks_of_mistakes()  # here, since Prefect checks parameters before a flow begins
Seconds = Annotated[float, Field(gt=0)]


@contextmanager
def attempt(storage_block: str | None = None, time_limit_s: float | None = None) -> Iterator[None]:
    """Configure logs, metrics and object stores, show how far the block is, and see that it ends in time.

    Args:
        storage_block: a Prefect Secret block with the options of object stores; None takes those of the environment.
        time_limit_s: seconds that the block may take.

    Raises:
        ConfigError: this run has been started too often, or there is no such block.
        DeadlineError: the time is over; raised by a stage's next report.
    """
    number = flow_run.get_run_count()
    if number > MOST_ATTEMPTS:
        raise ConfigError(
            f"this run was started {number - 1} times and did not end in order; find out why (memory is the usual "
            "reason: look at the worker's log) and start a new one, which goes on from the finished shards"
        )
    observe()
    use_storage_block(storage_block)
    with logs.about(flow_run_id=str(flow_run.get_id())), progress.deadline(time_limit_s), progress_artifact():
        yield
