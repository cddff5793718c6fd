"""Progress: stages say how far they are; whoever runs them may listen. A stage never knows who does.

A report is also where a stage that runs in a thread can be stopped, since nothing else can interrupt a thread, and
where it finds that its time is over.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from belt_tasks.errors import DeadlineError

Listener = Callable[[str, int, int | None], None]
Hearer = Callable[[str], None]

_listeners: list[Listener] = []
_hearers: list[Hearer] = []
_stopping = threading.Event()
_deadlines: list[tuple[float, float]] = []
"""When by the monotonic clock, and after how many seconds."""


class StoppedError(Exception):
    """Whoever runs the stage wants it to end; what is finished is kept."""


def advance(stage: str, num_done: int, *, num_more: int | None = None) -> None:
    """Report that `num_done` more units of `stage` are done, and that `num_more` more units were found to do.

    Raises:
        StoppedError: `stop` was called, and this is not the main thread.
        DeadlineError: a `deadline` has passed.
    """
    check(stage)
    for listener in _listeners:
        listener(stage, num_done, num_more)


def check(stage: str) -> None:
    """End here if the stage should; for whoever waits for a stage that runs elsewhere.

    Raises:
        StoppedError: `stop` was called, and this is not the main thread.
        DeadlineError: a `deadline` has passed.
    """
    for at, seconds in _deadlines:
        if time.monotonic() > at:
            raise DeadlineError(
                f"{stage}: not done within the {seconds:,g} s that the run may take; finished shards are kept, and the "
                "next attempt goes on from there"
            )
    if _stopping.is_set() and threading.current_thread() is not threading.main_thread():
        raise StoppedError(f"{stage}: stopped before its end")


def say(words: str) -> None:
    """Tell whoever runs the stages what happened, in a sentence."""
    for hearer in _hearers:
        hearer(words)


@contextmanager
def listen(listener: Listener, hearer: Hearer | None = None) -> Iterator[None]:
    """Call `listener(stage, num_done, num_more)` for every report from this process while the block lasts.

    Args:
        listener: of reports.
        hearer: of sentences.
    """
    hearers = [] if hearer is None else [hearer]
    _listeners.append(listener)
    _hearers.extend(hearers)
    try:
        yield
    finally:
        _listeners.remove(listener)
        for each in hearers:
            _hearers.remove(each)


def stop() -> None:
    """End every stage that runs in a thread of this process at its next report; signals reach the main thread."""
    _stopping.set()


def go_on() -> None:
    """Take `stop` back, for the next run in this process."""
    _stopping.clear()


@contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """End every stage of this process, in whichever thread, at its first report after so many seconds of the block.

    Args:
        seconds: that the block may take; None is no limit.
    """
    limit = None if seconds is None else (time.monotonic() + seconds, seconds)
    if limit is not None:
        _deadlines.append(limit)
    try:
        yield
    finally:
        if limit is not None:
            _deadlines.remove(limit)
