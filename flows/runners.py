"""Where the stages of a scoring run are done: in this process, or on the workers of a Ray cluster.

Either way they are the same tasks of the same flow run, with the same names, retries and errors. Under Ray a task is a
thread that waits for a worker, so that workers need no access to Prefect.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

from prefect.futures import PrefectFuture
from prefect.task_runners import ThreadPoolTaskRunner

from belt_tasks import score_planning, shard_scoring
from belt_tasks.receipts import ShardReceipt
from belt_tasks.score_planning import ScorePlan
from belt_tasks.specs import RaySpec, Runner
from flows import tasks
from flows.ray_workers import RayWorkers, ray_workers

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class ScoringStages:
    """The two stages that compute."""

    plan_scoring: Callable[..., ScorePlan]
    """Parameters are those of `score_planning.plan_scoring`."""
    score_shards: Callable[..., Sequence[PrefectFuture[ShardReceipt]]]
    """`Task.map` of `shard_scoring.score_shard`."""


@contextmanager
def scoring(runner: Runner, ray: RaySpec) -> Iterator[ScoringStages]:
    """The stages of a scoring run, under a runner.

    Raises:
        ConfigError: Ray is not installed; from the stages, there is no cluster, or no room in it.
    """
    if runner == "threads":
        yield ScoringStages(plan_scoring=tasks.plan_scoring, score_shards=tasks.score_shard.map)
        return
    with ray_workers(ray) as workers, ExitStack() as stack:
        threads: list[ThreadPoolTaskRunner[Any]] = []
        score_shard = tasks.bind(_on(workers, shard_scoring.score_shard), task_run_name=tasks.SCORE_SHARD_NAME)
        signature = inspect.signature(shard_scoring.score_shard)

        def score_shards(*args: Any, **kwargs: Any) -> list[PrefectFuture[ShardReceipt]]:  # noqa: ANN401 - as `Task.map`
            if not threads:
                pool: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=workers().num_workers)
                threads.append(stack.enter_context(pool))
            futures = threads[0].map(score_shard, dict(signature.bind(*args, **kwargs).arguments))
            return cast("list[PrefectFuture[ShardReceipt]]", futures)

        # the device decides the precision, and so what has to be scored: it is asked where it is
        plan_scoring = tasks.bind(_on(workers, score_planning.plan_scoring)) if ray.num_gpus else tasks.plan_scoring
        yield ScoringStages(plan_scoring=plan_scoring, score_shards=score_shards)


def _on(workers: Callable[[], RayWorkers], function: Callable[P, R]) -> Callable[P, R]:
    """The function, called in a worker."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return workers().call(function, *args, **kwargs)

    return call
