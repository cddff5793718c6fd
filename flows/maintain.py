"""Clean up after the runs of an output, and check its published tables."""

from datetime import timedelta
from typing import Annotated

from prefect import flow
from pydantic import Field

from belt_tasks import summaries
from belt_tasks.clean import Cleaned
from belt_tasks.maintenance import TableCheck
from flows import artifacts, run_names, tasks
from flows.attempt import Seconds, attempt


@flow(name="maintain", flow_run_name=run_names.of("output_uri"))
def maintain(
    output_uri: str,
    older_than_days: Annotated[float, Field(ge=0)] = 7,
    storage_block: str | None = None,
    time_limit_s: Seconds | None = None,
) -> tuple[Cleaned, tuple[TableCheck, ...]]:
    """Remove what runs left behind and no table refers to, and check every published row against its contract.

    Args:
        output_uri: of `score`.
        older_than_days: what changed since is left alone.
        storage_block: a Prefect Secret block with the options of object stores; None takes those of the environment.
        time_limit_s: seconds after which it ends, to be taken up again by the next attempt; None is no limit.
    """
    with attempt(storage_block, time_limit_s):
        cleaned = tasks.clean_up(output_uri, older_than=timedelta(days=older_than_days))
        checks = tasks.check_tables(output_uri)
        told = summaries.clean_summary(cleaned) + "\n" + summaries.checks_summary(checks)
        artifacts.show("maintain-summary", told)
        return cleaned, checks
