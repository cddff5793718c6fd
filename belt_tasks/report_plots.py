"""Report plots: the pictures of a scoring run's report, as PNG bytes, each on light and on dark paper.

Like those of an evaluation (see `plots`): matplotlib's objects and never pyplot, and names drawn as they are.

Shape letters: B bins, D documents, R runs, N names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, PercentFormatter, StrMethodFormatter

from belt_tasks import histograms, plots
from belt_tasks.histograms import Histogram
from belt_tasks.receipts import STAGES
from belt_tasks.statistics import Sample

WIDTH, HEIGHT = 5.6, 3.5
MOST_BINS = 48
MOST_NAMES = 12  # with more, the rest is one bar
MOST_DATES = 6
NUM_LENGTHS = 12  # groups of documents by length, of which the middle score is drawn
NOW = "this run"
TICKS = [0, *(number * 10**power for power in range(10) for number in (1, 3))]


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours."""

    paper: str
    ink: str
    soft: str
    grid: str
    now: str
    reference: str
    stages: tuple[str, ...]


LIGHT = Theme(
    paper="#ffffff",
    ink=plots.INK,
    soft=plots.GREY,
    grid=plots.LIGHT_GREY,
    now=plots.BLUE,
    reference="#c76b10",
    stages=("#c9d3df", "#e0b37a", "#3b6ea5", "#6b9e8a"),
)
DARK = Theme(
    paper="#1b2128",
    ink="#e4e8ec",
    soft="#a3adb8",
    grid="#343d47",
    now="#7fb0e3",
    reference="#f0a95b",
    stages=("#5d6b7a", "#d9a15c", "#7fb0e3", "#7fc2a7"),
)


def distribution_png(now: Histogram, reference: Histogram | None, theme: Theme, *, label: str) -> bytes:
    """Draw the share of documents in each bin, of the run as bars and of the reference as a line.

    Args:
        now: of the run.
        reference: of the reference; None where there is none.
        theme: colours.
        label: of the numbers.
    """
    figure, axes = new_axes(theme, WIDTH, HEIGHT)
    _draw_distribution(axes, now, reference, theme)
    axes.set(xlabel=label)
    finish(axes, theme)
    return plots.png_of(figure)


def lengths_png(now: Histogram, reference: Histogram | None, theme: Theme) -> bytes:
    """Draw the distribution of lengths on an axis of logarithms; the histograms are of log2(1 + num_tokens)."""
    figure, axes = new_axes(theme, WIDTH, HEIGHT)
    _draw_distribution(axes, now, reference, theme)
    axes.set(xlabel="content tokens of a document")
    _tick_lengths(axes)
    finish(axes, theme)
    return plots.png_of(figure)


def shares_png(
    names: Sequence[str], share_N: Sequence[float], reference_N: Sequence[float] | None, theme: Theme, *, counted: str
) -> bytes:
    """Draw shares, those of the run above those of the reference, the largest first.

    Args:
        names: of what has them.
        share_N: of the run.
        reference_N: of the reference; None where there is none.
        theme: colours.
        counted: what they are shares of, in the plural.
    """
    shares = [np.asarray(share, dtype=np.float64) for share in (share_N, reference_N) if share is not None]
    order = np.argsort(-shares[0], kind="stable")
    shown = plots.display_names([names[i] for i in order[:MOST_NAMES]])
    shares = [share[order] for share in shares]
    if len(order) > MOST_NAMES:
        shown.append(f"{len(order) - MOST_NAMES:,} others")
        shares = [np.append(share[:MOST_NAMES], share[MOST_NAMES:].sum()) for share in shares]
    figure, axes = new_axes(theme, WIDTH, max(1.7, 0.85 + len(shown) * (0.42 if len(shares) > 1 else 0.32)))
    rows = np.arange(len(shown))
    height = 0.8 / len(shares)
    styles = [(NOW, theme.now), ("reference", theme.reference)]
    for i, (share, (name, color)) in enumerate(zip(shares, styles, strict=False)):
        place = rows + (i - (len(shares) - 1) / 2) * height
        axes.barh(place, share, height=0.9 * height, color=color, label=name)
        for y, x in zip(place, share, strict=True):
            axes.annotate(f"{x:.1%}", (x, y), (3, 0), textcoords="offset points", va="center", color=theme.soft, size=8)
    axes.set_yticks(rows, labels=shown, fontfamily=plots.FONT, parse_math=False)
    axes.set(ylim=(len(shown) - 0.5, -0.5), xlim=(0, 1.14 * max(0.01, *(share.max() for share in shares))))
    axes.set_xlabel(f"share of {counted}")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    finish(axes, theme, legend=len(shares) > 1)
    axes.grid(visible=False, axis="y")
    return plots.png_of(figure)


def length_against_score_png(sample: Sample, theme: Theme, *, label: str) -> bytes:
    """Draw the sampled documents by length and score, and the middle score of documents of like length."""
    figure, axes = new_axes(theme, WIDTH, HEIGHT)
    length_D, score_D = np.log2(1.0 + np.array(sample.num_tokens)), np.array(sample.scores)
    size = 3 + 9 * (len(score_D) < plots.MAX_DOTS // 5)
    axes.scatter(length_D, score_D, s=size, color=theme.now, alpha=0.45, linewidths=0, zorder=2)
    groups = np.array_split(np.argsort(length_D, kind="stable"), min(NUM_LENGTHS, max(1, len(score_D) // 20)))
    middle = [(np.median(length_D[group]), np.median(score_D[group])) for group in groups]
    axes.plot(*zip(*middle, strict=True), color=theme.reference, marker="o", markersize=4, zorder=3, label="median")
    axes.set(xlabel="content tokens of a document", ylabel=label)
    _tick_lengths(axes)
    finish(axes, theme)
    return plots.png_of(figure)


def throughput_png(
    tokens_per_s_R: Sequence[float | None], started_at_R: Sequence[datetime], like_R: Sequence[bool], theme: Theme
) -> bytes:
    """Draw the speed of runs in their order; hollow where the rules of scoring or the device were others.

    Args:
        tokens_per_s_R: None where nothing was encoded.
        started_at_R: in order.
        like_R: whether the run compares with the last.
        theme: colours.
    """
    figure, axes = new_axes(theme, WIDTH, HEIGHT)
    speed_R = np.array([np.nan if speed is None else speed for speed in tokens_per_s_R], dtype=np.float64)
    place_R = np.arange(len(speed_R))
    axes.plot(place_R, speed_R, color=theme.soft, linewidth=1, zorder=2)
    for is_like, face in ((True, theme.now), (False, theme.paper)):
        chosen = np.array(like_R) == is_like
        words = "as this run" if is_like else "other rules or device"
        if chosen.any():
            dots: dict[str, Any] = {"s": 30, "edgecolors": theme.now, "linewidths": 1.2, "zorder": 3, "label": words}
            axes.scatter(place_R[chosen], speed_R[chosen], color=face, **dots)
    axes.set(xlabel="run, by its start (UTC)", ylabel="tokens per second", ylim=(0, 1.08 * max(np.nanmax(speed_R), 1)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _tick_dates(axes, started_at_R)
    finish(axes, theme)
    return plots.png_of(figure)


def cost_png(seconds: Mapping[str, Sequence[float]], started_at_R: Sequence[datetime], theme: Theme) -> bytes:
    """Draw the seconds of each stage, stacked, of runs in their order.

    Args:
        seconds: of each of STAGES, R each.
        started_at_R: in order.
        theme: colours.
    """
    figure, axes = new_axes(theme, WIDTH, HEIGHT)
    below_R = np.zeros(len(started_at_R))
    for stage, color in zip(STAGES, theme.stages, strict=True):
        axes.bar(np.arange(len(below_R)), seconds[stage], bottom=below_R, width=0.7, color=color, label=stage)
        below_R += np.array(seconds[stage])
    axes.set(
        xlabel="run, by its start (UTC)", ylabel="seconds, over all shards", xlim=(-0.6, max(len(below_R), 5) - 0.4)
    )
    axes.set_ylim(0, 1.08 * max(below_R.max(), 1e-3))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    _tick_dates(axes, started_at_R)
    finish(axes, theme, columns=4)
    axes.grid(visible=False, axis="x")
    return plots.png_of(figure)


def _draw_distribution(axes: Axes, now: Histogram, reference: Histogram | None, theme: Theme) -> None:
    edges, now_B, then_B = histograms.aligned(now, reference or Histogram(), most_bins=MOST_BINS)
    axes.bar(edges[:-1], now_B / now_B.sum(), np.diff(edges), align="edge", color=theme.now, label=NOW)
    if reference is not None:
        axes.stairs(then_B / then_B.sum(), edges, color=theme.reference, linewidth=1.8, label="reference")
    axes.set(ylabel="share of documents", xlim=(edges[0], edges[-1]))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _tick_lengths(axes: Axes) -> None:
    low, high = axes.get_xlim()
    places = [(np.log2(1.0 + number), number) for number in TICKS if low <= np.log2(1.0 + number) <= high]
    axes.xaxis.set_major_locator(FixedLocator([place for place, _ in places]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda place, _: _thousands(2.0**place - 1)))


def _tick_dates(axes: Axes, started_at_R: Sequence[datetime]) -> None:
    step = -(-len(started_at_R) // MOST_DATES)
    places = np.arange(len(started_at_R))[::-step][::-1]  # the last run is named
    axes.set_xticks(places, labels=[f"{started_at_R[i]:%d %b\n%H:%M}" for i in places])


def _thousands(number: float) -> str:
    return f"{number / 1000:,.0f}k" if number >= 999.5 else f"{number:.0f}"  # noqa: PLR2004 - what rounds to 1,000


def new_axes(theme: Theme, width: float, height: float) -> tuple[Figure, Axes]:
    """An empty plot on its paper, in inches."""
    figure = plots.new_figure(width, height, facecolor=theme.paper)
    return figure, figure.add_subplot(facecolor=theme.paper)


def finish(axes: Axes, theme: Theme, *, legend: bool = True, columns: int = 2) -> None:
    """Colour what is around the data, and put the legend above it."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.soft)
    axes.tick_params(colors=theme.ink, which="both", labelsize=9)
    axes.xaxis.label.set_color(theme.ink)
    axes.yaxis.label.set_color(theme.ink)
    axes.set_axisbelow(True)
    axes.grid(color=theme.grid, linewidth=0.8)
    if legend:
        named = sorted(zip(*axes.get_legend_handles_labels(), strict=True), key=lambda pair: pair[1] != NOW)
        axes.legend(  # above the plot, where nothing is behind it
            *zip(*named, strict=True),
            loc="lower left",
            bbox_to_anchor=(0, 1),
            borderaxespad=0.2,
            ncols=columns,
            frameon=False,
            labelcolor=theme.ink,
            fontsize=8.5,
        )
