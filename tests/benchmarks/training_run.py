"""A run of the fine-tuning benchmark: memory of each way and length in a process of its own, then rounds of seconds.

Memory comes first: what it says decides which ways and lengths the rounds leave out.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.protocol import TrainingSetup, rotated
from tests.benchmarks.rounds import PeerError, Worker
from tests.benchmarks.training_ways import REFERENCE, WAYS

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Documents:
    """The documents of one step."""

    lengths: tuple[int, ...]
    """Content tokens of each."""

    @property
    def num_tokens(self) -> int:
        """Content tokens of all."""
        return sum(self.lengths)

    @property
    def title(self) -> str:
        """What the tables call them."""
        batch = "" if len(self.lengths) == 1 else f"{len(self.lengths)} documents, "
        return f"{batch}{self.num_tokens:,} tokens"

    def num_positions(self, chunk_size: int, padded_to: int | None = None) -> int:
        """Content tokens of their chunks when all are padded to so many, or to the longest."""
        num_chunks = sum(-(-length // chunk_size) for length in self.lengths)
        return num_chunks * (padded_to or min(max(self.lengths), chunk_size))


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was asked for, checked."""

    setup: TrainingSetup
    ways: tuple[str, ...]
    dropouts: tuple[float, ...]
    num_rounds: int
    timed: tuple[Documents, ...]
    weighed: tuple[Documents, ...]
    """Whose memory is measured; shortest first."""
    one_batch: Documents
    """One document that fills one mini-batch."""
    logs: Path
    """Folder for what the processes say."""


@dataclass(kw_only=True)
class Measurement:
    """What one way did with some documents; None where it was not measured."""

    way: str
    dropout: float
    documents: Documents
    seconds: list[float] = field(default_factory=list)
    """Of each round."""
    peak_bytes: int | None = None
    """The most that the step needed above what the process had before."""
    estimated_bytes: float | None = None
    """The same, expected from shorter documents."""
    difference: dict[str, float] | None = None
    """Of the gradient without dropout from that of one pass with the same pooling, over the norm of that: `norm`, and
    `largest` of any number."""
    reason: str | None = None
    """Why it was not measured."""


@dataclass(kw_only=True)
class Results:
    """All measurements."""

    options: Options
    memory: list[Measurement] = field(default_factory=list)
    gradients: list[Measurement] = field(default_factory=list)
    times: list[Measurement] = field(default_factory=list)

    def peaks(self, way: str, dropout: float) -> list[Measurement]:
        """Of a way, shortest documents first, those that were measured."""
        return [one for one in self.memory if (one.way, one.dropout) == (way, dropout) and one.peak_bytes is not None]

    def expected_bytes(self, way: str, dropout: float, documents: Documents) -> float | None:
        """What a step will need, from what it needed for other documents; None where nothing was measured."""
        points = [(self._position(way, one.documents), one.peak_bytes) for one in self.peaks(way, dropout)]
        return extrapolated(points, self._position(way, documents))

    def refusal(self, way: str, dropout: float, documents: Documents) -> str | None:
        """Why a step should not be tried; None where it should."""
        for one in self.memory:
            is_failure = (one.way, one.dropout) == (way, dropout) and one.reason and one.estimated_bytes is None
            if is_failure and (not self.peaks(way, dropout) or documents.num_tokens >= one.documents.num_tokens):
                return one.reason
        expected = self.expected_bytes(way, dropout, documents)
        if expected is not None and expected > self.options.setup.most_bytes:
            return f"needs {expected / GIB:,.1f} GiB (expected from shorter documents)"
        return None

    def _position(self, way: str, documents: Documents) -> int:
        """What memory is proportional to, or for a bounded way what of it decides."""
        setup, its = self.options.setup, WAYS[way]
        num_positions = documents.num_positions(setup.chunk_size, its.padded_to)
        return min(num_positions, max(setup.max_batch_tokens, setup.chunk_size)) if its.is_bounded else num_positions


def extrapolated(points: Sequence[tuple[int, float]], at: int) -> float | None:
    """The line through the two points nearest to a place; through zero where there is one; None where there is none."""
    nearest = sorted(dict(points).items(), key=lambda point: abs(point[0] - at))[:2]
    if not nearest:
        return None
    (place, value), (other_place, other_value) = nearest[0], nearest[1] if len(nearest) > 1 else (0, 0.0)
    return value + (at - place) * max((value - other_value) / (place - other_place), 0.0)


def run(options: Options, say: Callable[[str], None]) -> Results:
    """Measure memory, compare gradients, and time."""
    options.logs.mkdir(parents=True, exist_ok=True)
    results = Results(options=options)
    for dropout, way in itertools.product(options.dropouts, options.ways):
        for documents in options.weighed:
            results.memory.append(_peak(results, way, dropout, documents))
            say(f"memory, dropout {dropout:g}: {WAYS[way].title}, {documents.title}: {_told(results.memory[-1])}")
    results.gradients = _gradients(results)
    for dropout in options.dropouts:
        results.times += _times(results, dropout, say)
    return results


def _told(measured: Measurement) -> str:
    return measured.reason or f"{(measured.peak_bytes or 0) / 2**20:,.0f} MiB"


def _peak(results: Results, way: str, dropout: float, documents: Documents) -> Measurement:
    measured = Measurement(way=way, dropout=dropout, documents=documents)
    measured.reason = results.refusal(way, dropout, documents)
    if measured.reason is not None:
        measured.estimated_bytes = results.expected_bytes(way, dropout, documents)
        return measured
    try:
        with _worker(results.options, dropout, f"memory-{way}") as worker:
            worker.answer()
            measured.peak_bytes = int(_ask(worker, "peak_bytes", way, documents)["peak_bytes"])
    except PeerError as error:
        measured.reason = str(error)
    return measured


def _gradients(results: Results) -> list[Measurement]:
    """Of each way against one pass, without dropout, where one pass is small enough."""
    options = results.options
    found = []
    with _worker(options, 0.0, "gradients") as worker:
        worker.answer()
        for documents, way in itertools.product(options.timed, options.ways):
            if way == REFERENCE:
                continue
            measured = Measurement(way=way, dropout=0.0, documents=documents)
            measured.reason = _first_refusal(results, documents, way)
            if measured.reason is None:
                try:
                    measured.difference = _ask(worker, "differences", way, documents)
                except PeerError as error:
                    measured.reason = str(error)
            found.append(measured)
    return found


def _first_refusal(results: Results, documents: Documents, way: str) -> str | None:
    """Why a comparison with one pass should not be tried, by any dropout that was measured."""
    tried = itertools.product((REFERENCE, way), results.options.dropouts)
    reasons = [results.refusal(name, dropout, documents) for name, dropout in tried]
    if all(name != REFERENCE for name in results.options.ways):
        most = results.options.setup.max_batch_tokens  # of whose size nothing is known but that it should be harmless
        reasons += ["one pass was not measured"] * (documents.num_positions(results.options.setup.chunk_size) > most)
    return next((reason for reason in reasons if reason is not None), None)


def _times(results: Results, dropout: float, say: Callable[[str], None]) -> list[Measurement]:
    """Rounds in which the ways take turns, each in a process that lives through all of them."""
    options = results.options
    found, failed = [], {}
    with _workers(options, dropout) as (workers, reasons):
        failed |= reasons
        for documents in options.timed:
            measured = {way: Measurement(way=way, dropout=dropout, documents=documents) for way in options.ways}
            for way, one in measured.items():
                one.reason = failed.get(way) or results.refusal(way, dropout, documents)
            for number in range(0 if documents is options.timed[0] else 1, options.num_rounds + 1):
                for way in rotated([way for way, one in measured.items() if one.reason is None], number):
                    try:
                        seconds = float(_ask(workers[way], "seconds", way, documents)["seconds"])
                    except PeerError as error:
                        measured[way].reason = failed[way] = str(error)
                        continue
                    if number > 0:  # the round before the first warms up
                        measured[way].seconds.append(seconds)
            found += measured.values()
            told = ", ".join(f"{one.way} {min(one.seconds):.2f} s" for one in found[-len(measured) :] if one.seconds)
            say(f"seconds, dropout {dropout:g}: {documents.title}: {told}")
    return found


@contextmanager
def _workers(options: Options, dropout: float) -> Iterator[tuple[dict[str, Worker], dict[str, str]]]:
    """A process of each way, all loaded; and why some of them are not."""
    workers, reasons = {}, {}
    try:
        for way in options.ways:
            workers[way] = _started(options, dropout, way)
        for way, worker in workers.items():
            try:
                worker.answer()
            except PeerError as error:
                reasons[way] = str(error)
        yield workers, reasons
    finally:
        for worker in workers.values():
            worker.close()


@contextmanager
def _worker(options: Options, dropout: float, name: str) -> Iterator[Worker]:
    worker = _started(options, dropout, name)
    try:
        yield worker
    finally:
        worker.close()


def _started(options: Options, dropout: float, name: str) -> Worker:
    return Worker(str(dropout), options.setup, options.logs / f"{name}.txt", "tests.benchmarks.training_worker")


def _ask(worker: Worker, wanted: str, way: str, documents: Documents) -> dict[str, Any]:
    return worker.ask({"wanted": wanted, "way": way, "lengths": documents.lengths})
