"""Plots: the pictures of an evaluation, as PNG bytes.

Knows nothing about files or models. Uses matplotlib's objects and never pyplot, whose state is global: stages
draw in threads. A label's name is drawn as it is: no mathtext, and a box for what the font lacks.

Shape letters: D documents, L labels, B bins of confidence.
"""

import io
import math
import struct
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, LogNorm, PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter
from numpy.typing import ArrayLike, NDArray

from belt_tasks.errors import ConfigError
from belt_tasks.metrics import ReliabilityBins, regression_metrics

DPI = 144
FONT = "DejaVu Sans"  # comes with matplotlib, so that every machine draws the same
MISSING_GLYPH = "\N{WHITE SQUARE}"
INVISIBLE = {"Cc", "Cf", "Mn"}  # Unicode categories: control, joiners and direction marks, combining marks
NAME_HEAD, NAME_TAIL = 13, 8  # characters kept of a longer name; the rest becomes an ellipsis
MAX_COUNTED = 15  # labels; with more, a count does not fit its cell
MAX_SHARED = 8  # labels; with more, a percentage does not fit beside the count
MAX_NAMED = 60  # labels; with more, only every second, third, ... is named
MAX_EXACT = 100_000  # a larger count is written in thousands
MAX_DOTS = 5_000  # documents; more are counted in hexagons
MAX_EXTENT = 1e300  # of a number; axes overflow beyond
DARK = 0.3  # share of a row from which a cell is dark enough for white text
BLUE, ORANGE, GREY, INK = "#3b6ea5", "#d9822b", "#6b7280", "#1f2933"
DARK_BLUE, LIGHT_BLUE, LIGHT_ORANGE, LIGHT_GREY = "#12305a", "#a9c7e8", "#f6d2a8", "#e5e7eb"


def confusion_matrix_png(confusion: ArrayLike, labels: Sequence[str]) -> bytes:
    """Draw counts of documents by true (row) and predicted (column) label, coloured by share of the row."""
    confusion_LL = np.asarray(confusion)
    num_labels = len(labels)
    if num_labels == 0 or confusion_LL.shape != (num_labels, num_labels):
        allowed = f"a row and a column for each label ({num_labels}) and at least one"
        raise ConfigError(f"confusion must have {allowed}, got shape {confusion_LL.shape}")
    true_L = confusion_LL.sum(axis=1, keepdims=True)
    num_documents = int(true_L.sum())
    if num_documents == 0:
        raise ConfigError("confusion must count at least one document, got zeros only")
    share_LL = np.ma.masked_where(np.broadcast_to(true_L == 0, confusion_LL.shape), confusion_LL)
    share_LL = share_LL / np.maximum(true_L, 1)

    names = display_names(labels)
    size = 10 if num_labels <= MAX_COUNTED else 8
    name_inches = max(map(len, names)) * size / 145
    cell = min(1.1, max(10.5 / num_labels, 0.27)) if num_labels <= MAX_NAMED else 16.2 / num_labels
    side = max(cell * num_labels, 3.0)
    rotation = 0 if name_inches < 0.9 * side / num_labels else 40 if num_labels <= MAX_COUNTED else 90
    below = name_inches * math.sin(math.radians(rotation))
    figure = new_figure(side + name_inches + 1.9, side + below + 1.3)
    axes = figure.add_subplot()
    # the root of the share: a confusion of 2 % is to be seen beside a recall of 90 %
    norm = PowerNorm(0.5, vmin=0, vmax=1)
    image = axes.imshow(share_LL, cmap=colormaps["Blues"].with_extremes(bad=LIGHT_GREY), norm=norm)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=25, pad=0.02, ticks=[0, 0.02, 0.1, 0.25, 0.5, 1])
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bar.set_label("share of the true label's documents", size=9)

    shown = slice(None, None, math.ceil(num_labels / MAX_NAMED))
    style: dict[str, Any] = {"fontfamily": FONT, "fontsize": size, "parse_math": False}
    turn: dict[str, Any] = {"rotation": rotation}
    if rotation not in {0, 90}:
        turn |= {"ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(np.arange(num_labels)[shown], labels=names[shown], **style, **turn)
    axes.set_yticks(np.arange(num_labels)[shown], labels=names[shown], **style)
    axes.set(xlabel="predicted label", ylabel="true label")
    axes.set_xticks(np.arange(0.5, num_labels - 1), minor=True)
    axes.set_yticks(np.arange(0.5, num_labels - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5 if num_labels <= MAX_COUNTED else 0.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    if num_labels <= MAX_COUNTED:
        _write_counts(axes, confusion_LL, share_LL.filled(0.0))
    accuracy = float(confusion_LL.trace() / num_documents)
    axes.set_title(f"Confusion matrix: accuracy {accuracy:.3f}", loc="left")
    num_absent = int((true_L == 0).sum())
    absent = f"; grey rows: labels without documents ({num_absent})" if num_absent else ""
    _caption(figure, f"documents: {num_documents:,}{absent}")
    return png_of(figure)


def reliability_png(bins: ReliabilityBins, counted: str = "documents") -> bytes:
    """Draw how often decisions are correct, by how sure they are, above how many there are of each.

    Args:
        bins: What `metrics.reliability_bins` returns.
        counted: What one decision is about, in the plural: documents, or for multilabel label decisions.
    """
    num_decisions = int(bins.num_decisions.sum())
    figure = new_figure(6.4, 7.0)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    left_B, width_B = bins.edges[:-1], np.diff(bins.edges)
    gap_B = bins.confidence - bins.accuracy
    over_B, under_B = gap_B.clip(min=0), gap_B.clip(max=0)  # under-confident: from the bar's top downwards
    bars: dict[str, Any] = {"width": width_B, "align": "edge", "edgecolor": "white", "linewidth": 0.8}
    above.bar(left_B, bins.accuracy, color=BLUE, label="accuracy", **bars)
    above.bar(left_B, over_B, bottom=bins.accuracy, color=LIGHT_ORANGE, label="over-confident by", **bars)
    above.bar(left_B, under_B, bottom=bins.accuracy, color=LIGHT_BLUE, label="under-confident by", **bars)
    above.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=1, label="perfectly calibrated")
    above.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy in the bin")
    above.set_title(f"Reliability: expected calibration error (ECE) {bins.calibration_error:.3f}", loc="left")

    accuracy = float(bins.accuracy @ bins.num_decisions / num_decisions)
    confidence = float(bins.confidence @ bins.num_decisions / num_decisions)
    below.bar(left_B, bins.num_decisions, color=GREY, **bars)
    below.axvline(accuracy, color=BLUE, label=f"accuracy {accuracy:.3f}")
    below.axvline(confidence, color=ORANGE, linestyle="--", label=f"mean confidence {confidence:.3f}")
    below.set(xlabel="confidence", ylabel=counted)
    below.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    below.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _finish(above)
    _finish(below)
    _caption(figure, f"{counted}: {num_decisions:,}; {len(left_B)} bins of equal width")
    return png_of(figure)


def predicted_against_target_png(target_D: ArrayLike, predicted_D: ArrayLike) -> bytes:
    """Draw each document's prediction over its target; many documents are counted in hexagons."""
    metrics = regression_metrics(target_D, predicted_D)
    target_D, predicted_D = np.asarray(target_D, np.float64), np.asarray(predicted_D, np.float64)
    lowest = float(min(target_D.min(), predicted_D.min()))
    highest = float(max(target_D.max(), predicted_D.max()))
    extent = max(abs(lowest), abs(highest))
    if extent > MAX_EXTENT:
        raise ConfigError(f"target_D and predicted_D must be within {MAX_EXTENT:g} of zero, got {extent:g}")
    margin = max(0.04 * (highest - lowest), 1e-6 * extent) or 1.0  # documents may all be the same
    limits = (lowest - margin, highest + margin)
    is_crowded = len(target_D) > MAX_DOTS
    figure = new_figure(7.6 if is_crowded else 6.4, 6.6)
    axes = figure.add_subplot()
    if is_crowded:
        blues = LinearSegmentedColormap.from_list("blues", [LIGHT_BLUE, BLUE, DARK_BLUE])
        hexagons = axes.hexbin(
            target_D, predicted_D, gridsize=60, extent=limits * 2, mincnt=1, cmap=blues, norm=LogNorm(vmin=1)
        )
        bar = figure.colorbar(hexagons, ax=axes, label="documents in a hexagon", shrink=0.8, pad=0.02)
        bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    else:
        axes.scatter(target_D, predicted_D, s=14, color=BLUE, alpha=0.5, linewidths=0, zorder=3)
    axes.plot(limits, limits, color=ORANGE, linestyle="--", label="predicted = target")
    axes.set(xlim=limits, ylim=limits, aspect="equal", xlabel="target", ylabel="predicted")
    _finish(axes)
    values = ", ".join(f"{name} {_shown(metrics[key])}" for name, key in (("R\u00b2", "r2"), ("MAE", "mae")))
    axes.set_title(f"Predicted against target: {values}", loc="left")
    _caption(figure, f"documents: {len(target_D):,}; Spearman {_shown(metrics['spearman'])}")
    return png_of(figure)


def display_names(labels: Sequence[str]) -> list[str]:
    """Make names that can be drawn and are short; those that would look alike are told apart by position."""
    names = [_drawable(label) for label in labels]
    names = [
        name if len(name) <= NAME_HEAD + 1 + NAME_TAIL else f"{name[:NAME_HEAD]}\u2026{name[-NAME_TAIL:]}"
        for name in names
    ]
    num_alike = Counter(names)
    return [f"{i}: {name}" if num_alike[name] > 1 else name for i, name in enumerate(names)]


def _drawable(label: str) -> str:
    words = " ".join(unicodedata.normalize("NFC", label).split())
    visible = (character for character in words if unicodedata.category(character) not in INVISIBLE)
    return "".join(c if ord(c) in _glyphs() else MISSING_GLYPH for c in visible) or "(empty)"


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties(family=FONT))).get_charmap())


def _write_counts(axes: Axes, confusion_LL: NDArray[np.int64], share_LL: NDArray[np.float64]) -> None:
    for (row, column), count in np.ndenumerate(confusion_LL):
        share = share_LL[row, column]
        text = f"{count:,}" if count < MAX_EXACT else f"{count / 1000:,.0f}k"
        if count and len(confusion_LL) <= MAX_SHARED:
            text += f"\n{share:.1%}"
        color = "white" if share > DARK else INK if count else GREY
        axes.text(column, row, text, ha="center", va="center", color=color, size=9)


def new_figure(width: float, height: float, *, facecolor: str = "white") -> Figure:
    """An empty figure, in inches."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    return Figure(figsize=(width, height), dpi=DPI, layout=layout, facecolor=facecolor)


def _finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(color=LIGHT_GREY, linewidth=0.8)
    axes.legend(loc="upper left", framealpha=0.85, edgecolor="white")


def _caption(figure: Figure, text: str) -> None:
    figure.supxlabel(text, x=0.02, ha="left", fontsize=8.5, color=GREY)


def png_of(figure: Figure) -> bytes:
    """The finished picture."""
    buffer = io.BytesIO()
    # not savefig, which lays out and draws everything twice
    FigureCanvasAgg(figure).print_png(buffer)  # type: ignore[no-untyped-call]
    return buffer.getvalue()


def size_of(png: bytes) -> tuple[int, int]:
    """Width and height of a picture, as it is to be shown: in pixels of 96 to an inch."""
    width, height = struct.unpack(">II", png[16:24])
    return round(width * 96 / DPI), round(height * 96 / DPI)


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4g}"
