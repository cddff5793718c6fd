"""Threads: pools whose calls know what the caller is about: which run, which shard, which run of Prefect.

What is logged in a thread is then told of the shard that it works for.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Threads(ThreadPoolExecutor):
    """A thread pool that calls functions in a copy of the context of whoever handed them over."""

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> "Future[R]":
        """See `ThreadPoolExecutor.submit`; `map` comes here too."""
        return super().submit(partial(copy_context().run, fn, *args, **kwargs))
