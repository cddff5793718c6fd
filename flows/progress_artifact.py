"""Progress as a Prefect artifact: how much of a run is done, how fast it goes, and when it should end.

Stages report in this process, those on other machines too (`flows.ray_workers`), so that one artifact tells of all.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.runtime import flow_run
from rich.progress import Progress, Task

from belt_tasks import progress
from flows.progress_bars import GROWING, UNITS

EVERY_S = 10.0
SPEED_OVER_S = 120.0
LAST_WORDS_S = 10.0
IN_ORDER = ("compare", "tokenize", "score", "fine-tune", "check")
"""Stages whose size is known when they begin; a run is as far as the last of those that it has."""

log = logging.getLogger(__name__)


class Pace:
    """How far the stages of a run are and how fast they go. Any thread may report.

    Args:
        get_time: seconds, by any clock.
    """

    def __init__(self, get_time: Callable[[], float] = time.monotonic) -> None:
        self._rich = Progress(disable=True, speed_estimate_period=SPEED_OVER_S, get_time=get_time)
        self._lock = threading.Lock()
        self._of_stage: dict[str, Task] = {}

    def advance(self, stage: str, num_done: int, num_more: int | None) -> None:
        """A stage reports; see `belt_tasks.progress.advance`."""
        with self._lock:
            if stage not in self._of_stage:
                number = self._rich.add_task(stage, total=None)
                self._of_stage[stage] = self._rich.tasks[number]
            task = self._of_stage[stage]
            if num_more and stage not in GROWING:
                self._rich.update(task.id, total=(task.total or 0) + num_more)
            if num_done:  # the first that is done is where the clock starts, not when it was planned
                self._rich.advance(task.id, num_done)

    @property
    def percentage(self) -> float | None:
        """Of the run, as far as is known; None while nothing is."""
        task = self._task
        return None if task is None else round(task.percentage, 1)

    def words(self, now: datetime) -> str:
        """How far, how fast and until when."""
        task = self._task
        if task is None:
            return ""
        told = [f"{task.description}: {task.completed:,.0f} of {task.total:,.0f} {UNITS[task.description]}"]
        encode = self._of_stage.get("encode")
        for each, unit, digits in ((task, UNITS[task.description], 1), (encode, "tokens", 0)):
            if each is not None and each.speed:
                told.append(f"{each.speed:,.{digits}f} {unit} per second")
        left_s = task.time_remaining
        if left_s:
            left = timedelta(seconds=left_s)
            told.append(f"about {left} left, until {now + left:%Y-%m-%d %H:%M} UTC")
        return f"{'; '.join(told)} (as of {now:%H:%M:%S} UTC)"

    @property
    def _task(self) -> Task | None:
        with self._lock:
            known = [self._of_stage[stage] for stage in IN_ORDER if stage in self._of_stage]
        return next((task for task in reversed(known) if task.total), None)


@contextmanager
def progress_artifact() -> Iterator[None]:
    """Show how far the present flow run is, while the block lasts; one with nothing to do has no artifact.

    A server that cannot be told is a warning: no run fails for it.
    """
    pace, ended = Pace(), threading.Event()
    identity = flow_run.get_id()
    key = f"{flow_run.get_flow_name()}-progress"

    def follow() -> None:
        artifact: UUID | None = None
        while True:
            is_last = ended.wait(EVERY_S)
            try:
                artifact = _show(pace, artifact, flow_run_id=UUID(identity), key=key)
            except httpx.HTTPError as error:
                log.warning("progress: cannot tell the Prefect server: %s", type(error).__name__)
            if is_last:
                return

    follower = threading.Thread(target=follow, name="progress-artifact", daemon=True)
    with progress.listen(pace.advance):
        follower.start()
        try:
            yield
        finally:
            ended.set()
            follower.join(LAST_WORDS_S)


def _show(pace: Pace, artifact: UUID | None, *, flow_run_id: UUID, key: str) -> UUID | None:
    percentage = pace.percentage
    if percentage is None:
        return artifact
    words = pace.words(datetime.now(UTC))
    with get_client(sync_client=True) as client:
        if artifact is not None:
            client.update_artifact(artifact, ArtifactUpdate(data=percentage, description=words))
            return artifact
        wanted = ArtifactCreate(key=key, type="progress", data=percentage, description=words, flow_run_id=flow_run_id)
        return client.create_artifact(wanted).id
