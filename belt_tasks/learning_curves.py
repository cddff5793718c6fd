"""Learning curves: how the loss of a fine-tuning fell, on what it saw and on what was held out."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from belt_tasks import plots

SMOOTHED_OVER = 50  # of all steps: a running mean over one fiftieth
WIDTH, HEIGHT = 9.0, 3.6


def learning_curves_png(lines: Sequence[dict[str, Any]]) -> bytes:
    """Draw the loss of every step, its running mean and the validation losses; beside them the learning rate.

    Args:
        lines: of the training log, one step or more.
    """
    steps = [line for line in lines if line["kind"] == "step" and line["loss"] is not None]
    epochs = [line for line in lines if line["kind"] == "epoch" and line["validation"] is not None]
    figure = plots.new_figure(WIDTH, HEIGHT)
    losses, rates = figure.subplots(1, 2, width_ratios=[2, 1])
    numbers, values = [line["step"] for line in steps], np.array([line["loss"] for line in steps])
    losses.plot(numbers, values, color=plots.LIGHT_BLUE, linewidth=0.8)
    losses.plot(numbers, _running_mean(values), color=plots.BLUE, linewidth=1.6, label="training")
    if epochs:
        held_out = [line["validation"]["loss"] for line in epochs]
        losses.plot([line["step"] for line in epochs], held_out, "o-", color=plots.ORANGE, label="held out")
    losses.set(xlabel="step", ylabel="loss")
    losses.legend(frameon=False)
    rates.plot(numbers, [line["learning_rate"] for line in steps], color=plots.GREY)
    rates.set(xlabel="step", ylabel="learning rate")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (losses, rates):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(left=0)
    return plots.png_of(figure)


def _running_mean(values: "np.ndarray[Any, np.dtype[np.float64]]") -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Over the last few values, fewer at the beginning."""
    size = max(len(values) // SMOOTHED_OVER, 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - size, 0)
    return np.asarray((sums[stop] - sums[start]) / (stop - start))
