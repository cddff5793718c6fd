"""Length comparison: what reading more of long documents gains, and what it costs. Pure.

The ways of reading are selections of chunks: the head alone, head and tail, all. They are measured on the same
documents and on the same draws of them (see `resampling`), so that what is hard for all ways cancels out of their
differences.

Documents are grouped by their content tokens: up to one chunk, two, four, ... Of a group of few documents nothing is
told but their number.

Shape letters: B draws, D documents, K statistics, L labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from belt_tasks import resampling
from belt_tasks.resampling import Floats
from belt_tasks.specs import ChunkSpec, Head, LengthSpec, Metric, Selection, Spec
from belt_tasks.windows import chunk_windows

Int64 = npt.NDArray[np.int64]
GroupKind = Literal["all", "longer", "bucket"]

MOST_BUCKETS = 6
COSTLY = {"auc", "spearman"}
"""Metrics that need the documents of every draw in order."""


class Reading(Spec):
    """One way of reading, and what its run says of itself."""

    selection: Selection
    checkpoint_uri: str
    checkpoint_digest: str
    trained_with: ChunkSpec | None
    """Windows that the checkpoint was fine-tuned with; None where that is not known."""
    chunks: ChunkSpec
    """Windows that it was scored with."""
    run_id: str
    output_uri: str
    device: str
    precision: str
    num_tokens_encoded: int
    """Content tokens of all chunks of the compared documents: those in an overlap count each time."""
    encode_s: float
    """Seconds of the encoder, as the run recorded them when it was made."""

    @property
    def is_at_home(self) -> bool:
        """Whether the checkpoint was fine-tuned with this selection."""
        return self.trained_with is not None and self.trained_with.selection == self.selection


class LengthGroup(Spec):
    """Documents of like length."""

    kind: GroupKind
    """all of them; those longer than a chunk; or a bucket. The buckets hold each document once."""
    min_tokens: int
    """Content tokens of the shortest document that belongs to it."""
    max_tokens: int | None
    """Of the longest; None where there is no end."""
    num_documents: int
    is_too_small: bool
    """Whether it has too few documents for anything to be told of them."""


class LengthRow(Spec):
    """A number of a group, with its interval."""

    kind: GroupKind
    min_tokens: int
    max_tokens: int | None
    num_documents: int
    metric: Metric
    selection: Selection
    compared_with: Selection | None
    """None of a way's own value; else the number is that value less the one of this way."""
    value: float | None
    """None where the group is too small, or the metric has no definition."""
    lower: float | None
    upper: float | None
    num_tokens_encoded: int
    """Of the group, in this selection."""


class LengthReport(Spec):
    """Whether reading further pays."""

    run_id: str
    """Of the evaluation that it belongs to."""
    report_uri: str
    """The page."""
    numbers_uri: str
    """This, as JSON."""
    table_uri: str
    """Its rows, as Parquet."""
    head: Head
    metric: Metric
    """The task's main one."""
    num_documents: int
    num_left_out: int
    """Documents that not every way has a score of."""
    readings: tuple[Reading, ...]
    groups: tuple[LengthGroup, ...]
    rows: tuple[LengthRow, ...]
    spec: LengthSpec

    def reading(self, selection: Selection) -> Reading:
        """One of the ways."""
        return next(each for each in self.readings if each.selection == selection)

    def row(
        self,
        group: LengthGroup,
        selection: Selection,
        compared_with: Selection | None = None,
        metric: Metric | None = None,
    ) -> LengthRow:
        """A number; without a metric that of the main one."""
        wanted = (group.kind, group.min_tokens, selection, compared_with, metric or self.metric)
        return next(
            row
            for row in self.rows
            if (row.kind, row.min_tokens, row.selection, row.compared_with, row.metric) == wanted
        )

    def group(self, kind: GroupKind) -> LengthGroup:
        """The first of a kind."""
        return next(group for group in self.groups if group.kind == kind)

    @property
    def buckets(self) -> list[LengthGroup]:
        """Those by length, the shortest first."""
        return [group for group in self.groups if group.kind == "bucket"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """What one way says of the D documents."""

    selection: Selection
    scores_DL: Floats
    """Probabilities, or one column of numbers."""
    num_tokens_encoded_D: Int64


def tokens_encoded(num_tokens_D: Int64, chunks: ChunkSpec) -> Int64:
    """Content tokens of all chunks of each document; of any selection but the random one."""
    windows = chunk_windows(num_tokens_D, chunks)
    return np.add.reduceat(windows.stop_C - windows.start_C, windows.doc_offsets[:-1])


def length_groups(num_tokens_D: Int64, chunk_size: int, *, min_documents: int) -> list[LengthGroup]:
    """All documents, those longer than a chunk, and buckets that double from one chunk on until the longest is in."""
    longest = int(num_tokens_D.max())
    bounds: list[tuple[GroupKind, int, int | None]] = [("all", 0, None), ("longer", chunk_size + 1, None)]
    least, most = 0, chunk_size
    for number in range(1, MOST_BUCKETS + 1):
        bounds.append(("bucket", least, most if number < MOST_BUCKETS else None))
        if longest <= most:
            break
        least, most = most + 1, 2 * most
    groups = []
    for kind, min_tokens, max_tokens in bounds:
        count = int(np.count_nonzero(_is_within(num_tokens_D, min_tokens, max_tokens)))
        is_too_small = count < (1 if kind == "all" else min_documents)
        groups.append(
            LengthGroup(
                kind=kind,
                min_tokens=min_tokens,
                max_tokens=max_tokens,
                num_documents=count,
                is_too_small=is_too_small,
            )
        )
    return groups


def length_rows(
    groups: Sequence[LengthGroup],
    ways: Sequence[Scores],
    *,
    head: Head,
    target: npt.NDArray[Any],
    num_tokens_D: Int64,
    threshold: float,
    spec: LengthSpec,
) -> list[LengthRow]:
    """The metrics of each way on each group, and by how much the last way differs from each of the others.

    Args:
        groups: of the documents; of all of them every metric that is cheap is told, of others the main one.
        ways: of reading, the one that reads most last.
        head: task and labels.
        target: class positions [D], bools [D, L], or numbers [D].
        num_tokens_D: content tokens of each document.
        threshold: of multilabel.
        spec: draws, and the share of them in the intervals.
    """
    rows: list[LengthRow] = []
    for group in groups:
        chosen_D = _is_within(num_tokens_D, group.min_tokens, group.max_tokens)
        metrics = [name for name in resampling.METRICS[head.task] if name not in COSTLY]
        metrics = metrics if group.kind == "all" else metrics[:1]
        told: list[tuple[Metric, Scores, Selection | None]] = []
        for metric in metrics:
            told += [(metric, way, None) for way in ways]
            told += [(metric, ways[-1], way.selection) for way in ways[:-1]]
        statistics = _statistics(ways, chosen_D, head, metrics, target, threshold)
        numbers_K = _measured(group, statistics, spec, num_statistics=len(told))
        for (metric, way, other), (value, lower, upper) in zip(told, numbers_K, strict=True):
            rows.append(
                LengthRow(
                    kind=group.kind,
                    min_tokens=group.min_tokens,
                    max_tokens=group.max_tokens,
                    num_documents=group.num_documents,
                    metric=metric,
                    selection=way.selection,
                    compared_with=other,
                    value=value,
                    lower=lower,
                    upper=upper,
                    num_tokens_encoded=int(way.num_tokens_encoded_D[chosen_D].sum()),
                )
            )
    return rows


def _is_within(num_tokens_D: Int64, min_tokens: int, max_tokens: int | None) -> npt.NDArray[np.bool_]:
    return (num_tokens_D >= min_tokens) & (True if max_tokens is None else num_tokens_D <= max_tokens)


def _statistics(
    ways: Sequence[Scores],
    chosen_D: npt.NDArray[np.bool_],
    head: Head,
    metrics: Sequence[Metric],
    target: npt.NDArray[Any],
    threshold: float,
) -> resampling.WeightedMetrics:
    """Of each metric, that of each way, and the last way's less that of each other one: K of them on a draw."""
    of_metrics = [
        [
            resampling.weighted_metric(head.task, metric, target[chosen_D], way.scores_DL[chosen_D], threshold)
            for way in ways
        ]
        for metric in metrics
    ]

    def measure(weights_BD: Floats) -> Floats:
        found = []
        for of_ways in of_metrics:
            values_BW = np.stack([of_way(weights_BD) for of_way in of_ways], axis=1)
            found += [values_BW, values_BW[:, -1:] - values_BW[:, :-1]]
        return np.concatenate(found, axis=1)

    return measure


def _measured(
    group: LengthGroup, statistics: resampling.WeightedMetrics, spec: LengthSpec, *, num_statistics: int
) -> list[tuple[float | None, float | None, float | None]]:
    """Value and ends of the interval of each statistic."""
    if group.is_too_small:
        return [(None, None, None)] * num_statistics
    value_K = statistics(np.ones((1, group.num_documents)))[0]
    lower_K, upper_K = resampling.intervals(
        statistics,
        num_documents=group.num_documents,
        confidence=spec.confidence,
        num_resamples=spec.num_resamples,
        seed=spec.resampling_seed,
    )
    return [
        (_finite(value), _finite(lower), _finite(upper))
        for value, lower, upper in zip(value_K, lower_K, upper_K, strict=True)
    ]


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
