"""The plot: documents per second of every peer, one panel per corpus."""

import io
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tests.benchmarks.report import BELT, Row, rate

DPI = 144
BELT_COLOUR, PEER_COLOUR, LESS_WORK_COLOUR, INK = "#d9822b", "#3b6ea5", "#c3cad3", "#1f2933"
BAR_INCHES, HEAD_INCHES, WIDTH_INCHES = 0.32, 0.95, 9.0


def bars_png(panels: Sequence[tuple[str, Sequence[Row]]], caption: str) -> bytes:
    """Draw horizontal bars, fastest first; belt in its own colour, less work in grey.

    Args:
        panels: title and rows of each corpus.
        caption: one line below, about the machine.
    """
    shown = [(title, _fastest_first(rows)) for title, rows in panels]
    heights = [HEAD_INCHES + BAR_INCHES * max(len(rows), 1) for _, rows in shown]
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights) + 0.3), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes_of_panel = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, rows) in zip(axes_of_panel, shown, strict=True):
        values = [row.documents_per_s or 0.0 for row in rows]
        drawn = axes.barh([_name(row) for row in rows], values, color=[_colour(row) for row in rows], height=0.72)
        axes.bar_label(drawn, labels=[_label(row) for row in rows], padding=4, fontsize=9, color=INK)
        if not rows:
            axes.set_yticks([])
        for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
            tick.set_fontweight("bold" if _is_belt(row) else "normal")
        axes.invert_yaxis()
        axes.set_xlim(0, max(values, default=1.0) * 1.27)
        axes.set_title(title, loc="left", fontsize=11, color=INK)
        axes.set_xlabel("documents per second", fontsize=9)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=8, color="#6b7280")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _fastest_first(rows: Sequence[Row]) -> list[Row]:
    with_result = [row for row in rows if row.documents_per_s is not None]
    return sorted(with_result, key=lambda row: -(row.documents_per_s or 0.0))


def _is_belt(row: Row) -> bool:
    return row.peer in BELT.values()


def _colour(row: Row) -> str:
    if _is_belt(row):
        return BELT_COLOUR
    return LESS_WORK_COLOUR if row.less_work else PEER_COLOUR


def _name(row: Row) -> str:
    return f"{row.title}\n({row.note})" if row.less_work else row.title


def _label(row: Row) -> str:
    written = rate(row.documents_per_s)
    ratio = row.belt_ratio[row.precision]
    return written if ratio is None or _is_belt(row) else f"{written}   belt is {ratio:.2f} x"
