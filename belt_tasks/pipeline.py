"""Pipelines: stages of one job that run beside each other, each in a thread of its own, a few items apart.

`ahead` runs a producer some items ahead of its consumer; `behind` runs a consumer's last step while it goes on. Who is
faster waits, so memory does not depend on how much there is to do. What one stage raises, the consumer raises; and
when the consumer stops, for whatever reason, the other stages have ended before it does.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

from belt_tasks.threads import Threads

ItemT = TypeVar("ItemT")

_END = object()


@contextmanager
def ahead(items: Generator[ItemT], *, most: int) -> Iterator[Iterator[ItemT]]:
    """Produce items in a thread while the block consumes them.

    Args:
        items: advanced and at last closed in that thread.
        most: items that may be finished or in the making and not yet consumed.
    """
    with Threads(1, thread_name_prefix="ahead") as thread:
        pending: deque[Future[ItemT | object]] = deque(thread.submit(next, items, _END) for _ in range(most))

        def consume() -> Iterator[ItemT]:
            while (item := pending.popleft().result()) is not _END:
                pending.append(thread.submit(next, items, _END))
                yield item  # type: ignore[misc]

        try:
            yield consume()
        finally:
            for future in pending:
                future.cancel()
            thread.submit(items.close).result()


@contextmanager
def behind(function: Callable[[ItemT], None], *, most: int) -> Iterator[Callable[[ItemT], None]]:
    """Call a function in a thread, in order, for everything that the block hands over.

    Every call has ended when the block has. What one raises is raised by a later hand-over or by the end of the block;
    nothing is called after it, nor once the block itself has raised.

    Args:
        function: what to call.
        most: items that may wait or be in the function.
    """
    broken = False

    def call(item: ItemT) -> None:
        nonlocal broken
        if not broken:
            try:
                function(item)
            except BaseException:
                broken = True
                raise

    with Threads(1, thread_name_prefix="behind") as thread:
        pending: deque[Future[None]] = deque()

        def hand_over(item: ItemT) -> None:
            while len(pending) >= most or (pending and pending[0].done()):
                pending.popleft().result()
            pending.append(thread.submit(call, item))

        try:
            yield hand_over
            while pending:
                pending.popleft().result()
        except BaseException as error:
            broken = True
            raised = [future.exception() for future in pending if future.done()]
            earlier = next((found for found in raised if found is not None), None)
            if earlier is None or earlier is error:
                raise
            raise error from earlier
