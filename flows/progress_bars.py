"""Progress bars for the command line: one per stage, made when the stage first reports."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

LINE_EVERY_S = 10.0
GROWING = {"encode"}  # documents are cut while others are encoded: nobody knows how much there is to come
UNITS = {
    "compare": "files",
    "tokenize": "rows",
    "encode": "tokens",
    "score": "documents",
    "fine-tune": "documents",
    "check": "files",
}


class ProgressBars:
    """Listens to `belt_tasks.progress`; off a terminal it says where it is in a line now and then."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:>20}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._console = console
        self._done: dict[str, int] = {}
        self._next_line = time.monotonic() + LINE_EVERY_S
        self._tasks: dict[str, TaskID] = {}
        self._totals: dict[str, int] = {}

    def __enter__(self) -> Self:
        """Begin to draw."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the screen."""
        self._progress.stop()

    def say(self, words: str) -> None:
        """A line of its own, above the bars."""
        self._progress.console.print(words, markup=False)

    def advance(self, stage: str, num_done: int, num_more: int | None) -> None:
        """A stage reports; see `belt_tasks.progress.advance`."""
        if stage not in self._tasks:
            unit = UNITS.get(stage)
            self._tasks[stage] = self._progress.add_task(f"{stage} ({unit})" if unit else stage, total=None)
        if num_more and stage not in GROWING:
            self._totals[stage] = self._totals.get(stage, 0) + num_more
            self._progress.update(self._tasks[stage], total=self._totals[stage])
        self._progress.advance(self._tasks[stage], num_done)
        self._done[stage] = self._done.get(stage, 0) + num_done
        if not self._console.is_terminal and num_done and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_EVERY_S
            words = [f"{stage}: {self._done[stage]:,}", UNITS.get(stage, "")]
            if stage in self._totals:
                words.append(f"of {self._totals[stage]:,}")
            self._console.print(" ".join(word for word in words if word))
