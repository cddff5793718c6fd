"""Report pictures: the plots of a run's pages, with words for those who do not see them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from belt_tasks import pages, plots, report_plots
from belt_tasks.histograms import Histogram
from belt_tasks.receipts import STAGES
from belt_tasks.report_plots import Theme
from belt_tasks.statistics import RunStatistics

NO_LABEL = "(no label)"
Drawing = Callable[[Theme], bytes]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A plot within a page."""

    light: str
    """Data URLs, for light and for dark paper."""
    dark: str
    width: int
    height: int
    alt: str
    """What it shows, in words."""
    caption: str


def of_predictions(counted: RunStatistics, other: RunStatistics | None) -> list[Picture]:
    """Pictures of what the model said.

    Args:
        counted: of a run with documents.
        other: of the reference; None where there is none, or it is the run itself.
    """
    score = "predicted value" if counted.is_regression else "score: probability of the label"
    than = "" if other is None else f" against {other.num_documents:,} of the reference"
    other_lengths = None if other is None else other.lengths
    scores, other_scores = _shown_scores(counted, other)
    found = [
        picture(
            lambda theme: report_plots.distribution_png(scores, other_scores, theme, label=score),
            caption="Distribution of values, the middle 99 % of a sample"
            if counted.is_regression
            else "Distribution of scores",
            alt=f"Histogram of the scores of {counted.num_documents:,} documents{than}; {_middle('scores', counted)}"
            + ("" if other is None else f", in the reference {_middle('scores', other)}"),
        )
    ]
    if not counted.is_regression:
        found.append(_of_labels(label_shares(counted, other)))
    found.append(
        picture(
            lambda theme: report_plots.lengths_png(counted.lengths, other_lengths, theme),
            caption="Lengths of documents, on an axis of logarithms",
            alt=f"Histogram of the lengths of {counted.num_documents:,} documents{than}; "
            f"{_middle('num_tokens', counted)} tokens"
            + ("" if other is None else f", in the reference {_middle('num_tokens', other)}"),
        )
    )
    num_drawn = len(counted.sample.keys)
    found.append(
        picture(
            lambda theme: report_plots.length_against_score_png(counted.sample, theme, label=score),
            caption=f"Length against score; {num_drawn:,} documents, and the median of those of like length",
            alt=f"Scatter plot of {num_drawn:,} documents by length and score, with the median score by length",
        )
    )
    return found


def of_rejected(by_reason: dict[str, int]) -> Picture | None:
    """A picture of the reasons of rejected rows; None where there is no such row."""
    if not by_reason:
        return None
    names, shares = list(by_reason), [count / sum(by_reason.values()) for count in by_reason.values()]
    words = ", ".join(f"{name} {count:,}" for name, count in sorted(by_reason.items(), key=lambda part: -part[1]))
    return picture(
        lambda theme: report_plots.shares_png(names, shares, None, theme, counted="rejected rows"),
        caption="Reasons",
        alt=f"Bars of rejected rows by reason: {words}",
    )


def of_runs(history: pl.DataFrame) -> list[Picture]:
    """Pictures of what the last runs took.

    Args:
        history: of `examples.last_runs`.
    """
    started_at, speeds = history["started_at"].to_list(), history["tokens_per_s"].to_list()
    this = history.row(-1, named=True)
    like = [
        (row["scoring_fingerprint"], row["device"]) == (this["scoring_fingerprint"], this["device"])
        for row in history.iter_rows(named=True)
    ]
    seconds = {stage: history[f"{stage}_s"].to_list() for stage in STAGES}
    known = [speed for speed in speeds if speed is not None]
    found = []
    if known:
        found.append(
            picture(
                lambda theme: report_plots.throughput_png(speeds, started_at, like, theme),
                caption="Throughput, run by run at this output",
                alt=f"Line of tokens per second over {len(history):,} runs, between {min(known):,.0f} and "
                f"{max(known):,.0f}",
            )
        )
    found.append(
        picture(
            lambda theme: report_plots.cost_png(seconds, started_at, theme),
            caption="Seconds of work by stage, run by run",
            alt=f"Stacked bars of seconds by stage over {len(history):,} runs; the last took "
            f"{sum(parts[-1] for parts in seconds.values()):,.1f} seconds",
        )
    )
    return found


def label_shares(counted: RunStatistics, compared: RunStatistics | None) -> list[dict[str, Any]]:
    """name, count, share and share of the reference of every label, the commonest first."""
    unlabelled = any(each.num_without_label for each in (counted, compared) if each is not None)  # some multilabel
    names = [*counted.labels, *([NO_LABEL] if unlabelled else [])]
    counts = [*counted.label_counts, counted.num_without_label]
    others = None if compared is None else [*compared.label_counts, compared.num_without_label]
    rows = [
        {
            "name": name,
            "count": counts[i],
            "share": counts[i] / max(counted.num_documents, 1),
            "reference": None if others is None or compared is None else others[i] / max(compared.num_documents, 1),
        }
        for i, name in enumerate(names)
    ]
    return sorted(rows, key=lambda row: -row["count"])


def _shown_scores(counted: RunStatistics, other: RunStatistics | None) -> tuple[Histogram, Histogram | None]:
    """Histograms of the run and the reference; of values, one of which may be far from all others, without the ends."""
    if not counted.is_regression:
        return counted.scores, None if other is None else other.scores
    samples = [np.array(each.sample.scores) for each in (counted, other) if each is not None]
    low, high = np.quantile(np.concatenate(samples), [0.005, 0.995])
    middles = [Histogram.of(sample[(sample >= low) & (sample <= high)]) for sample in samples]
    return middles[0], None if other is None else middles[1]


def _of_labels(rows: list[dict[str, Any]]) -> Picture:
    reference = None if rows[0]["reference"] is None else [row["reference"] for row in rows]
    shares = [f"{pages.short(row['name'], 40)} {row['share']:.1%}" for row in rows[: report_plots.MOST_NAMES]]
    return picture(
        lambda theme: report_plots.shares_png(
            [row["name"] for row in rows], [row["share"] for row in rows], reference, theme, counted="documents"
        ),
        caption="Labels",
        alt=f"Bars of the share of documents with each label: {', '.join(shares)}",
    )


def _middle(name: str, counted: RunStatistics) -> str:
    values = getattr(counted.sample, name)
    return f"the median is {np.median(values):,.3g}" if values else "there is none"


def picture(draw: Drawing, *, caption: str, alt: str) -> Picture:
    """A plot on light and on dark paper."""
    light, dark = draw(report_plots.LIGHT), draw(report_plots.DARK)
    width, height = plots.size_of(light)
    return Picture(
        light=pages.data_url(light),
        dark=pages.data_url(dark),
        width=width,
        height=height,
        alt=alt,
        caption=caption,
    )
