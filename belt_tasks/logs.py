"""Logs: what happens goes to Python's `logging`, under `belt_tasks` and `flows`; whoever runs belt says where to.

Records carry what the work is about, in whichever thread they are made: the run, the shard. Written as JSON, one record
a line, they have fields of their own for that and for what was counted.
"""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

from pythonjsonlogger.json import JsonFormatter

from belt_tasks.errors import ConfigError

LogFormat = Literal["text", "json"]
LOGGERS = ("belt_tasks", "flows")

_about: ContextVar[Mapping[str, str]] = ContextVar("about", default={})  # noqa: B039 - never changed in place


@contextmanager
def about(**fields: str) -> Iterator[None]:
    """Records made within the block carry these fields, and those of the blocks around it.

    Args:
        fields: such as run_id and shard.
    """
    token = _about.set({**_about.get(), **fields})
    try:
        yield
    finally:
        _about.reset(token)


def fields() -> Mapping[str, str]:
    """What the work at hand is about."""
    return _about.get()


def checked_format(wanted: str) -> LogFormat:
    """A format by its name.

    Raises:
        ConfigError: there is no such format.
    """
    for known in get_args(LogFormat):
        if wanted == known:
            return known  # type: ignore[no-any-return]  # one of the literals
    raise ConfigError(f"log format must be {' or '.join(get_args(LogFormat))}, got {wanted!r}")


def write_json() -> None:
    """Write belt's records from INFO on to standard error as JSON, and nowhere else; done again, nothing doubles.

    Handlers that others have put on belt's loggers, as Prefect does, still get them.
    """
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if any(isinstance(handler, _JsonLines) for handler in logger.handlers):
            continue
        logger.addHandler(_JsonLines())
        logger.setLevel(logging.INFO)
        logger.propagate = False


def writes_json() -> bool:
    """Whether records are written as JSON."""
    return any(isinstance(handler, _JsonLines) for handler in logging.getLogger(LOGGERS[0]).handlers)


def stop_json() -> None:
    """Take `write_json` back."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        for handler in [each for each in logger.handlers if isinstance(each, _JsonLines)]:
            logger.removeHandler(handler)
            logger.setLevel(logging.NOTSET)
            logger.propagate = True


class _JsonLines(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes each record as one line, to what is standard error at that time."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(
            JsonFormatter(
                ["levelname", "name", "message"],
                rename_fields={"levelname": "level", "name": "logger"},
                timestamp=True,
            )
        )
        self.addFilter(_told)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _told(record: logging.LogRecord) -> bool:
    """Give a record the fields of the work at hand; its own win."""
    for name, value in fields().items():
        if not hasattr(record, name):
            setattr(record, name, value)
    return True
