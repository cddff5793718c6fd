"""Progress: stages say how far they are; whoever runs them may listen. A stage never knows who does.

A report is also where a stage that runs in a thread can be stopped, since nothing else can interrupt a thread.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Listener = Callable[[str, int, int | None], None]
Hearer = Callable[[str], None]

_listeners: list[Listener] = []
_hearers: list[Hearer] = []
_stopping = threading.Event()


class StoppedError(Exception):
    """Whoever runs the stage wants it to end; what is finished is kept."""


def advance(stage: str, num_done: int, *, num_more: int | None = None) -> None:
    """Report that `num_done` more units of `stage` are done, and that `num_more` more units were found to do.

    Raises:
        StoppedError: `stop` was called, and this is not the main thread.
    """
    if _stopping.is_set() and threading.current_thread() is not threading.main_thread():
        raise StoppedError(f"{stage}: stopped before its end")
    for listener in _listeners:
        listener(stage, num_done, num_more)


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
