"""Length pictures: the plots of a length report, each on light and on dark paper, with words for who does not see them.

Shape letters: G groups of documents by length.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter

from belt_tasks import length_words, metrics, plots, report_plots
from belt_tasks.length_comparison import LengthGroup, LengthReport, LengthRow
from belt_tasks.report_pictures import Picture, picture
from belt_tasks.report_plots import HEIGHT, WIDTH, Theme
from belt_tasks.specs import Selection

MARKERS: dict[Selection, str] = {"head": "s", "head_tail": "^", "all": "o"}
APART = 0.2  # between the points of one group, of the distance of two groups


def of_length_report(report: LengthReport) -> list[Picture]:
    """By length where there are groups large enough, and against cost."""
    shown = [group for group in report.buckets if not group.is_too_small]
    name, confidence = metrics.IN_WORDS[report.metric], f"{100 * report.spec.confidence:g} %"
    found = []
    if shown:
        of = ", ".join(f"{length_words.group_name(group)} tokens: {_values(report, group)}" for group in shown)
        found.append(
            picture(
                lambda theme: values_png(report, shown, theme),
                caption=f"{name[0].upper()}{name[1:]} by length, with {confidence} intervals",
                alt=f"Points of {name} by length of the documents; {of}",
            )
        )
        of = ", ".join(f"{length_words.group_name(group)} tokens: {_differences(report, group)}" for group in shown)
        found.append(
            picture(
                lambda theme: differences_png(report, shown, theme),
                caption=f"What reading all changes, by length, with {confidence} intervals",
                alt=f"Points of the differences in {name} by length of the documents; {of}",
            )
        )
    costs = ", ".join(
        f"{length_words.SELECTIONS[reading.selection]} {reading.num_tokens_encoded:,}" for reading in report.readings
    )
    found.append(
        picture(
            lambda theme: cost_png(report, theme),
            caption=f"{name[0].upper()}{name[1:]} against tokens encoded, all documents",
            alt=f"Points of {name} against tokens encoded: {costs}",
        )
    )
    return found


def values_png(report: LengthReport, groups: Sequence[LengthGroup], theme: Theme) -> bytes:
    """Draw the main metric of each way by length."""
    figure, axes = report_plots.new_axes(theme, WIDTH, HEIGHT)
    for i, reading in enumerate(report.readings):
        rows = [report.row(group, reading.selection) for group in groups]
        _draw(axes, rows, (i - (len(report.readings) - 1) / 2) * APART, theme)
    axes.set(ylabel=metrics.IN_WORDS[report.metric])
    _name_groups(axes, groups)
    report_plots.finish(axes, theme, columns=3)
    return plots.png_of(figure)


def differences_png(report: LengthReport, groups: Sequence[LengthGroup], theme: Theme) -> bytes:
    """Draw by how much the way that reads all differs from each of the others, by length."""
    figure, axes = report_plots.new_axes(theme, WIDTH, HEIGHT)
    axes.axhline(0, color=theme.soft, linewidth=1)
    for i, reading in enumerate(report.readings[:-1]):
        rows = [report.row(group, report.readings[-1].selection, reading.selection) for group in groups]
        _draw(axes, rows, (i - (len(report.readings) - 2) / 2) * APART, theme)
    axes.set(ylabel=f"change in {metrics.IN_WORDS[report.metric]}")
    _name_groups(axes, groups)
    report_plots.finish(axes, theme, columns=2)
    return plots.png_of(figure)


def cost_png(report: LengthReport, theme: Theme) -> bytes:
    """Draw the main metric of each way against the tokens that it encodes."""
    figure, axes = report_plots.new_axes(theme, WIDTH, HEIGHT)
    for reading in report.readings:
        row = report.row(report.group("all"), reading.selection)
        _draw(axes, [row], reading.num_tokens_encoded, theme)
    axes.set(xlabel="tokens encoded", ylabel=metrics.IN_WORDS[report.metric])
    axes.set_xlim(0, 1.1 * max(1, *(reading.num_tokens_encoded for reading in report.readings)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    report_plots.finish(axes, theme, columns=3)
    return plots.png_of(figure)


def _draw(axes: Axes, rows: Sequence[LengthRow], shift: float, theme: Theme) -> None:
    """Points with their intervals; a metric that has no definition is not drawn."""
    way = rows[0].compared_with or rows[0].selection
    colors: dict[Selection, str] = {"head": theme.reference, "head_tail": theme.soft, "all": theme.now}
    value_G, lower_G, upper_G = (
        np.array([getattr(row, name) for row in rows], dtype=np.float64) for name in ("value", "lower", "upper")
    )
    axes.errorbar(
        np.arange(len(rows)) + shift,
        value_G,
        yerr=np.abs(np.stack([value_G - lower_G, upper_G - value_G])),
        linestyle="none",
        marker=MARKERS[way],
        markersize=6,
        capsize=3,
        color=colors[way],
        label=length_words.SELECTIONS[way]
        if rows[0].compared_with is None
        else f"against {length_words.SELECTIONS[way]}",
    )


def _name_groups(axes: Axes, groups: Sequence[LengthGroup]) -> None:
    names = [f"{length_words.group_name(group)}\n({group.num_documents:,})" for group in groups]
    axes.set_xticks(np.arange(len(groups)), labels=names)
    axes.set(xlim=(-0.5, len(groups) - 0.5), xlabel="content tokens of a document (documents)")


def _values(report: LengthReport, group: LengthGroup) -> str:
    return ", ".join(
        f"{length_words.SELECTIONS[each.selection]} "
        f"{length_words.number(report.metric, report.row(group, each.selection).value)}"
        for each in report.readings
    )


def _differences(report: LengthReport, group: LengthGroup) -> str:
    return ", ".join(
        f"against {length_words.SELECTIONS[each.selection]} "
        f"{length_words.change(report.metric, report.row(group, 'all', each.selection).value)}"
        for each in report.readings[:-1]
    )
