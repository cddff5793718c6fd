"""Observation: where logs and metrics of this process go, by its environment. Commands and flow runs begin with it.

BELT_LOG_FORMAT=json writes belt's records as JSON lines. PREFECT_LOGGING_EXTRA_LOGGERS=belt_tasks sends them to
Prefect, which shows them with the flow run. For metrics see `belt_tasks.telemetry`.
"""

import logging
import os

from belt_tasks import logs, milestones, telemetry
from belt_tasks.errors import BeltError
from belt_tasks.progress import StoppedError

EXTRA_LOGGERS = "PREFECT_LOGGING_EXTRA_LOGGERS"
LOG_FORMAT = "BELT_LOG_FORMAT"
WRONG_PARAMETERS = {"ParameterTypeError", "ParameterBindError", "SignatureMismatchError"}
"""Errors of Prefect's, by name: to import them takes a second."""
RUN_LOGGERS = ("prefect.flow_runs", "prefect.task_runs", "prefect.engine")


def observe(log_format: str | None = None) -> None:
    """See that milestones reach those who asked for them; done again, nothing changes.

    Args:
        log_format: text or json; None takes that of the environment.

    Raises:
        ConfigError: there is no such format, or a variable of metrics is wrong.
    """
    if logs.checked_format(log_format or os.environ.get(LOG_FORMAT) or "text") == "json":
        logs.write_json()
    if goes_to_prefect():  # which copies handlers to the loggers, but no level
        logging.getLogger("belt_tasks").setLevel(logging.INFO)
    telemetry.start()


def hide_tracebacks_of_mistakes() -> None:
    """See that a user's mistake is a sentence in the log of its run; done again, nothing changes."""
    for name in RUN_LOGGERS:
        logging.getLogger(name).addFilter(_without_traceback)


def _without_traceback(record: logging.LogRecord) -> bool:
    """What belt says of a mistake is the whole story: where in the code it says so helps nobody to mend it."""
    if record.exc_info is None or record.exc_info[1] is None:
        return True
    error = record.exc_info[1]
    if type(error).__name__ in WRONG_PARAMETERS:
        record.msg, record.args = str(error), ()  # instead of "unexpected exception"
    if isinstance(error, (BeltError, StoppedError)) or type(error).__name__ in WRONG_PARAMETERS:
        record.exc_info = record.exc_text = None
    return True


def observe_command(log_format: str | None, *, verbose: bool) -> None:
    """As `observe`, for a command, which draws its progress and says how it ended: its log is quiet unless asked for.

    Raises:
        ConfigError: there is no such format, or a variable of metrics is wrong.
    """
    observe(log_format)
    if verbose:
        logging.getLogger("belt_tasks").setLevel(logging.INFO)
    is_quiet = not (verbose or logs.writes_json() or goes_to_prefect())
    milestones.log.setLevel(logging.CRITICAL if is_quiet else logging.NOTSET)


def goes_to_prefect() -> bool:
    """Whether Prefect gets belt's records."""
    return "belt_tasks" in [name.strip() for name in os.environ.get(EXTRA_LOGGERS, "").split(",")]
