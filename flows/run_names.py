"""Names of flow runs: what a run does, to what, and when it was due. Prefect asks for one when a run starts."""

from collections.abc import Callable
from datetime import UTC, datetime

from prefect.runtime import flow_run


def of(parameter: str) -> Callable[[], str]:
    """Name runs of a flow after one of its parameters, such as `score s3://corpora/news 2026-03-31 02:00 UTC`.

    A run that is started again keeps its name: it is due when it was.
    """

    def name() -> str:
        parameters = flow_run.get_parameters()
        due_at = flow_run.get_scheduled_start_time() or datetime.now(UTC)
        return f"{flow_run.get_flow_name()} {parameters[parameter]} {due_at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"

    return name
