"""Progress: stages say how far they are; whoever runs them may listen. A stage never knows who does."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Listener = Callable[[str, int, int | None], None]

_listeners: list[Listener] = []


def advance(stage: str, num_done: int, *, num_more: int | None = None) -> None:
    """Report that `num_done` more units of `stage` are done, and that `num_more` more units were found to do."""
    for listener in _listeners:
        listener(stage, num_done, num_more)


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Call `listener(stage, num_done, num_more)` for every report from this process while the block lasts."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
