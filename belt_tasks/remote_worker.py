"""A process that does a flow's stages elsewhere: what it needs to be told, and what it has to tell.

Nothing here knows who started the process or how calls reach it. Whoever did calls `start` once, then `call` for one
stage after the other, and meanwhile `report` now and then: what the stages say of their progress, log, and would tell
meters is kept until it is asked for.
"""

import copy
import logging
import os
import pickle
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import version
from logging.handlers import QueueHandler
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from belt_tasks import progress, telemetry
from belt_tasks.errors import BeltError

ItemT = TypeVar("ItemT")

THREADS = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "POLARS_MAX_THREADS")
"""What the libraries read when they are loaded: PyTorch and Arrow, the tokenizers, polars."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What happened in a worker since its last report."""

    advanced: tuple[tuple[str, int, int], ...]
    """By stage: how many units more are done, and how many more were found to do."""
    said: tuple[str, ...]
    logged: tuple[logging.LogRecord, ...]
    metered: tuple[telemetry.Call, ...]
    """For the meters of the flow's process."""


@dataclass(frozen=True, kw_only=True)
class Raised:
    """What a stage raised, as a value: a scheduler in between logs no error that it does not see."""

    error: Exception


class RemoteWorker:
    """The process's side. Methods may be called by several threads; one `call` at a time."""

    def __init__(self, *, num_cores: int, share_of_gpu: float) -> None:
        # before anything is imported that computes: the process has these cores, not all of the machine
        os.environ.update(dict.fromkeys(THREADS, str(num_cores)))
        self._num_cores, self._share_of_gpu = num_cores, share_of_gpu
        self._advanced: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._said: SimpleQueue[str] = SimpleQueue()
        self._logged: SimpleQueue[logging.LogRecord] = SimpleQueue()
        self._metered: SimpleQueue[telemetry.Call] = SimpleQueue()
        self._listening = ExitStack()

    def start(self, storage_options: Mapping[str, Mapping[str, str]], log_level: int) -> tuple[str, int]:
        """Make ready for calls.

        Args:
            storage_options: of object stores, as they are configured where the flow runs.
            log_level: from which on belt's log is wanted there.

        Returns:
            belt's version here, and the process's id.
        """
        import pyarrow as pa  # noqa: PLC0415 - after the environment is set
        import torch  # noqa: PLC0415 - after the environment is set

        from belt_tasks import object_stores  # noqa: PLC0415 - after the environment is set

        torch.set_num_threads(self._num_cores)
        pa.set_cpu_count(self._num_cores)
        if 0 < self._share_of_gpu < 1 and torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(self._share_of_gpu)  # its neighbours have the rest
        object_stores.configure(storage_options)
        logging.captureWarnings(capture=True)
        logging.getLogger().addHandler(QueueHandler(self._logged))
        logging.getLogger("belt_tasks").setLevel(log_level)
        self._listening.enter_context(progress.listen(self._advance, self._said.put))
        self._listening.enter_context(telemetry.relayed(self._metered.put))
        return version("belt"), os.getpid()

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Any:  # noqa: ANN401 - whatever the stage returns
        """Call a stage; returns what it returns, or `Raised`."""
        progress.go_on()
        try:
            return function(*arguments, **named)
        except Exception as error:  # noqa: BLE001 - raised again where the flow runs
            if not isinstance(error, BeltError):  # a bug: tracebacks cannot travel
                error.add_note("".join(traceback.format_exception(error)))
            return Raised(error=_that_travels(error))

    def report(self) -> Report:
        """What happened since the last report."""
        with self._lock:
            advanced, self._advanced = self._advanced, {}
        return Report(
            advanced=tuple((stage, *numbers) for stage, numbers in advanced.items()),
            said=tuple(_emptied(self._said)),
            logged=tuple(_emptied(self._logged)),
            metered=tuple(_emptied(self._metered)),
        )

    def stop(self) -> None:
        """End the present call at the stage's next report."""
        progress.stop()

    def _advance(self, stage: str, num_done: int, num_more: int | None) -> None:
        with self._lock:
            done, more = self._advanced.get(stage, (0, 0))
            self._advanced[stage] = (done + num_done, more + (num_more or 0))


def _emptied(queue: SimpleQueue[ItemT]) -> Iterator[ItemT]:
    with suppress(Empty):
        while True:
            yield queue.get_nowait()


def _that_travels(error: Exception) -> Exception:
    """The error, or one that says the same where its class cannot be sent."""
    try:
        pickle.dumps(copy.copy(error))  # a copy is made as the other side would make it
    except Exception:  # noqa: BLE001 - whatever its class does
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
