"""Every Prefect task, bound on one page: which function, how often it is retried, and what it is called.

The functions know nothing of Prefect. What crosses a task's boundary is a reference and a spec; what comes back is a
receipt: nothing here is worth caching or persisting, since a stage finds its own finished work in storage.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar, cast

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner
from prefect.tasks import Task

from belt_tasks import (
    chunks,
    clean,
    demo,
    evaluation,
    export,
    fine_tuning,
    fitting,
    length_report,
    maintenance,
    milestones,
    planning,
    preview,
    progress,
    promotion,
    publishing,
    report,
    score_corpus,
    score_planning,
    score_tables,
    shard_scoring,
    training_set,
    watch,
)
from belt_tasks.errors import ShardError, TransientError

P = ParamSpec("P")
R = TypeVar("R")

RETRY_DELAYS_S = [2.0, 10.0, 60.0]
POLL_S = 1.0

# a model already uses all cores or the GPU
one_worker = cast("TaskRunner[PrefectFuture[Any]]", ThreadPoolTaskRunner(max_workers=1))


def only_transient(_task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Retry what a retry can cure, and nothing else; whoever waits is told."""
    error = state.result(raise_on_failure=False)
    if not isinstance(error, TransientError):
        return False
    delay_s = RETRY_DELAYS_S[run.run_count - 1]
    progress.say(f"{error}; trying again in {delay_s:.0f} seconds")
    milestones.tried_again(error, delay_s=delay_s)
    return True


def bind(function: Callable[P, R], *, task_run_name: str | None = None) -> Task[P, R]:
    """A task that calls `function` under belt's one policy."""
    return task(
        task_run_name=task_run_name,
        retries=len(RETRY_DELAYS_S),
        retry_delay_seconds=RETRY_DELAYS_S,
        retry_condition_fn=only_transient,
        cache_policy=NO_CACHE,
        persist_result=False,
    )(function)


plan_scoring = bind(score_planning.plan_scoring)
plan_chunking = bind(planning.plan_chunking)
plan_fine_tuning = bind(planning.plan_fine_tuning)
plan_validation = bind(planning.plan_validation)
plan_evaluation = bind(planning.plan_evaluation)

preview_scoring = bind(preview.preview_scoring)
SCORE_SHARD_NAME = "score-{shard.key}"
score_shard = bind(shard_scoring.score_shard, task_run_name=SCORE_SHARD_NAME)
chunk_shard = bind(chunks.chunk_shard, task_run_name="chunk-{shard.key}")
prepare_shard = bind(training_set.prepare_shard, task_run_name="prepare-{shard.key}")
fine_tune_prepared = bind(fine_tuning.fine_tune_prepared)
forget_states = bind(fitting.forget)
read_fine_tuning_receipt = bind(fine_tuning.read_receipt)
evaluate_run = bind(evaluation.evaluate_run)
plan_ways = bind(length_report.plan_ways)
write_length_report = bind(length_report.write_length_report)

republish = bind(publishing.republish)
republish_fine_tuning = bind(fine_tuning.republish)
publish = bind(publishing.publish)
complete_scoring = bind(score_corpus.complete)
publish_tables = bind(score_tables.publish_tables)
score_report = bind(report.score_report)
export_predictions = bind(export.export_predictions)

plan_promotion = bind(promotion.plan_promotion)
decide_promotion = bind(promotion.decide_promotion)
promote = bind(promotion.promote)
find_promotion = bind(promotion.find_done)

clean_up = bind(clean.clean_up)
check_tables = bind(maintenance.check_tables)

look_at = bind(watch.look_at)
remember = bind(watch.remember)

write_demo_corpus = bind(demo.write_demo_corpus)
read_back = bind(demo.read_back)


def gather(futures: Sequence[PrefectFuture[R]]) -> list[R]:
    """Wait for all shards; a shard that failed does not stop the others, but nothing is published without it.

    Raises:
        ShardError: some shards could not be processed; names them all. The others are finished and will be found by
            the next attempt.
        Exception: whatever else a shard raised.
    """
    try:
        results = [_result(future) for future in futures]
    except BaseException:  # Ctrl-C, or the run is cancelled: the flow ends when the running shards have
        progress.stop()
        raise
    failed = [result for result in results if isinstance(result, BaseException)]
    other = next((error for error in failed if not isinstance(error, ShardError)), None)
    if other is not None:
        raise other
    if failed:
        reasons = "\n".join(f"- {error}" for error in failed)
        raise ShardError(
            f"{len(failed)} of {len(results)} shards failed, so nothing was published; the others are kept for the "
            f"next attempt:\n{reasons}"
        )
    return results


def _result(future: PrefectFuture[R]) -> Any:  # noqa: ANN401 - R, or the error that was raised instead
    """Wait in short steps: where a signal arrives in another thread, the main thread sees it between two of them."""
    while True:
        with suppress(TimeoutError):
            return future.result(timeout=POLL_S, raise_on_failure=False)
