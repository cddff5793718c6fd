"""The plot of the fine-tuning benchmark: memory and seconds against the length of one document."""

import io
import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from tests.benchmarks.plot import BELT_COLOUR, DPI, INK, PEER_COLOUR
from tests.benchmarks.training_run import GIB, Documents, Results
from tests.benchmarks.training_ways import WAYS

STYLES = {
    "belt-mean": {"color": BELT_COLOUR, "marker": "o", "linewidth": 2.4},
    "belt-max": {"color": BELT_COLOUR, "marker": "^", "linestyle": "--", "linewidth": 1.8},
    "one-pass": {"color": PEER_COLOUR, "marker": "s"},
    "checkpointing": {"color": "#5a9a62", "marker": "D"},
    "belt-nlp": {"color": "#8a6fa8", "marker": "v", "linestyle": ":"},
}
FAINT = "#6b7280"

Points = Sequence[tuple[Documents, float]]


def lines_png(results: Results, dropout: float, caption: str) -> bytes:
    """Draw two panels with logarithmic axes, one line per way.

    Args:
        results: of a run.
        dropout: which of the run's to draw.
        caption: one line below, about the machine.
    """
    figure = Figure(figsize=(11.0, 4.9), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    memory_axes, seconds_axes = figure.subplots(1, 2)
    for way in results.options.ways:
        peaks = [(one.documents, (one.peak_bytes or 0) / GIB) for one in results.peaks(way, dropout)]
        timed = [one for one in results.times if (one.way, one.dropout) == (way, dropout) and one.seconds]
        _line(memory_axes, way, peaks)
        _line(seconds_axes, way, [(one.documents, statistics.median(one.seconds)) for one in timed])
    _finish(memory_axes, results, f"Memory of a step, dropout {dropout:g}", "GiB above what the process had before")
    _finish(seconds_axes, results, f"Time of a step, dropout {dropout:g}", "seconds")
    most_gib = results.options.setup.most_bytes / GIB
    memory_axes.axhline(most_gib, color=FAINT, linewidth=0.8, linestyle=(0, (1, 2)))
    memory_axes.annotate(
        f"limit of this run, {most_gib:g} GiB",
        (1.0, most_gib),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=FAINT,
    )
    handles, labels = memory_axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9)
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=8, color=FAINT)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _line(axes: Axes, way: str, points: Points) -> None:
    """Of single documents; a batch has no one length."""
    drawn = sorted((documents.num_tokens, value) for documents, value in points if len(documents.lengths) == 1)
    axes.plot(
        [length for length, _ in drawn],
        [value for _, value in drawn],
        label=WAYS[way].title,
        markersize=5,
        **STYLES[way],
    )


def _finish(axes: Axes, results: Results, title: str, unit: str) -> None:
    if any(len(line.get_xdata()) > 0 for line in axes.get_lines()):  # axes without values cannot be logarithmic
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axis.set_minor_formatter(lambda *_: "")
    axes.axvline(results.options.one_batch.num_tokens, color=FAINT, linewidth=0.8, linestyle=(0, (1, 2)))
    axes.annotate(
        "one mini-batch",
        (results.options.one_batch.num_tokens, 0.0),
        xycoords=("data", "axes fraction"),
        xytext=(3, 4),
        textcoords="offset points",
        fontsize=8,
        color=FAINT,
    )
    axes.tick_params(labelsize=8)
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel("tokens of the document", fontsize=9)
    axes.set_ylabel(unit, fontsize=9)
    axes.grid(visible=True, which="major", color="#e5e7eb", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
