"""Report plots: what can be checked without eyes: they are PNGs on the right paper, of these data, for any name."""

import io
from datetime import UTC, datetime, timedelta
from functools import partial

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from belt_tasks import plots, report_plots
from belt_tasks.histograms import Histogram
from belt_tasks.receipts import STAGES
from belt_tasks.report_plots import DARK, LIGHT
from belt_tasks.statistics import Sample

RNG = np.random.default_rng(0)
NOW, THEN = Histogram.of(RNG.random(500)), Histogram.of(RNG.beta(2, 5, 500))
TIMES = [datetime(2026, 1, 2, 3, tzinfo=UTC) + timedelta(days=i) for i in range(40)]
ODD = ["$x_1^2$", r"\frac{1}", "two\nlines", "\N{PILE OF POO}", "%", "", "\x00\x07", "\u202ex", "<b>", "x" * 10_000]
SAMPLE = Sample(keys=("a", "b", "c"), scores=(0.1, 0.2, 0.9), labels=(0, 0, 1), num_tokens=(0, 7, 2_000))


def seconds(number: int) -> dict[str, list[float]]:
    return {stage: [float(i + 1) for i in range(number)] for stage in STAGES}


DRAWINGS = {
    "distribution": partial(report_plots.distribution_png, NOW, THEN, label="score"),
    "distribution without a reference": partial(report_plots.distribution_png, NOW, None, label="score"),
    "distribution of one value": partial(report_plots.distribution_png, Histogram.of([0.5]), None, label="score"),
    "distribution of far values": partial(report_plots.distribution_png, Histogram.of([-1e300, 1e300]), NOW, label="x"),
    "lengths": partial(report_plots.lengths_png, Histogram.of([0.0, 3.0, 20.0]), Histogram.of([1.0])),
    "lengths of empty documents": partial(report_plots.lengths_png, Histogram.of([0.0]), None),
    "shares": partial(report_plots.shares_png, ["a", "b"], [0.3, 0.7], [0.5, 0.5], counted="documents"),
    "shares of odd names": partial(report_plots.shares_png, ODD, [0.1] * len(ODD), None, counted="documents"),
    "shares of many": partial(report_plots.shares_png, [str(i) for i in range(99)], [0.01] * 99, None, counted="x"),
    "shares of nothing": partial(report_plots.shares_png, ["a", "b"], [0.0, 0.0], None, counted="documents"),
    "lengths against scores": partial(report_plots.length_against_score_png, SAMPLE, label="score"),
    "throughput": partial(report_plots.throughput_png, [1.0, None, 3.0], TIMES[:3], [False, False, True]),
    "throughput of one": partial(report_plots.throughput_png, [5e6], TIMES[:1], [True]),
    "cost": partial(report_plots.cost_png, seconds(30), TIMES[:30]),
    "cost of nothing": partial(report_plots.cost_png, {stage: [0.0] for stage in STAGES}, TIMES[:1]),
}


@pytest.mark.parametrize("name", DRAWINGS)
@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_a_picture_is_of_the_size_meant_and_on_its_paper(name, theme):
    png = DRAWINGS[name](theme=theme)

    pixels = imread(io.BytesIO(png), format="png")[..., :3]
    width, height = plots.size_of(png)
    assert (round(pixels.shape[1] * 96 / plots.DPI), round(pixels.shape[0] * 96 / plots.DPI)) == (width, height)
    assert abs(width - report_plots.WIDTH * 96) <= 1
    assert 150 < height < 700
    assert np.abs(pixels[2, 2] - to_rgb(theme.paper)).max() < 0.01
    assert np.ptp(pixels) > 0.5  # not an empty page


def test_a_picture_is_of_its_data():
    one = report_plots.distribution_png(NOW, THEN, LIGHT, label="score")

    assert one == report_plots.distribution_png(NOW, THEN, LIGHT, label="score")
    assert one != report_plots.distribution_png(THEN, NOW, LIGHT, label="score")
    assert one != report_plots.distribution_png(NOW, None, LIGHT, label="score")


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_what_is_written_can_be_read_on_its_paper(theme):
    """The contrast that WCAG asks of text is 4.5, of lines and bars 3."""
    assert contrast(theme.ink, theme.paper) > 7
    assert contrast(theme.soft, theme.paper) > 4.5
    assert contrast(theme.now, theme.paper) > 3
    assert contrast(theme.reference, theme.paper) > 3


def contrast(one: str, two: str) -> float:
    low, high = sorted(map(luminance, (one, two)))
    return (high + 0.05) / (low + 0.05)


def luminance(color: str) -> float:
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
