"""Plots: what can be checked without eyes: they are PNGs, of the size meant, of these data, for any label."""

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread

from belt_tasks import plots
from belt_tasks.errors import ConfigError
from belt_tasks.metrics import reliability_bins
from belt_tasks.plots import (
    confusion_matrix_png,
    display_names,
    predicted_against_target_png,
    reliability_png,
)

SURE, RIGHT = [0.55, 0.7, 0.95, 0.9], [False, True, True, True]
ODD = ["$", "$x_1^2$", r"\frac{1}", "a_b", "two\nlines", "\N{PILE OF POO}", "%", "", "\ud800", "\x00\x07"]


def shape_of(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(io.BytesIO(png), format="png")
    assert np.ptp(pixels[..., :3]) > 0.5  # not an empty page
    return pixels.shape[:2]


@pytest.mark.parametrize("num_labels", [1, 2, 7, 15, 16, 33, 61])
def test_confusion_is_a_png_that_grows_with_the_labels(num_labels: int) -> None:
    labels = [f"label {i:02}" for i in range(num_labels)]
    height, width = shape_of(confusion_matrix_png(np.eye(num_labels, dtype=int), labels))
    cell = {1: 3.0, 2: 1.5, 7: 1.1, 15: 0.7, 16: 10.5 / 16, 33: 10.5 / 33, 61: 16.2 / 61}[num_labels]
    assert cell * num_labels * plots.DPI < min(height, width)
    assert max(height, width) < (cell * num_labels + 3.5) * plots.DPI


def test_confusion_shows_its_counts() -> None:
    labels = ["negative", "positive"]
    few = confusion_matrix_png([[8, 2], [1, 9]], labels)
    assert few == confusion_matrix_png(np.array([[8, 2], [1, 9]]), labels)
    assert few != confusion_matrix_png([[80, 20], [10, 90]], labels)  # the same shares
    assert few != confusion_matrix_png([[8, 2], [1, 9]], ["negative", "other"])


def test_confusion_draws_rows_as_true_labels() -> None:
    upper, lower = (confusion_matrix_png(rows, ["x", "y"]) for rows in ([[1, 5], [0, 5]], [[1, 0], [5, 5]]))
    assert upper != lower


@pytest.mark.parametrize("num_labels", [3, 20])
def test_a_label_without_documents_is_drawn_without_a_warning(num_labels: int) -> None:
    confusion = np.eye(num_labels, dtype=int)
    confusion[1] = 0
    shape_of(confusion_matrix_png(confusion, [f"label {i}" for i in range(num_labels)]))


@pytest.mark.parametrize("num_labels", [len(ODD), 2 * len(ODD)])
def test_odd_labels_are_drawn(num_labels: int) -> None:
    shape_of(confusion_matrix_png(np.eye(num_labels, dtype=int), (ODD * 2)[:num_labels]))


@settings(deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=12))
def test_names_can_be_drawn_and_are_short(labels: list[str]) -> None:
    names = display_names(labels)
    assert len(names) == len(labels)
    for name in names:
        assert 0 < len(name) <= 22 + len("11: ")
        assert {ord(character) for character in name} <= plots._glyphs()
        assert "\n" not in name


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("$x_1$", "$x_1$"),
        (" two\n\tlines ", "two lines"),
        ("Cafe\N{COMBINING ACUTE ACCENT}", "Caf\u00e9"),
        ("\u65b0\u805e A", "\u25a1\u25a1 A"),
        ("an\u200bo\u202edd", "anodd"),
        ("", "(empty)"),
        ("twenty-two characters.", "twenty-two characters."),
        ("a name of more than twenty-two characters", "a name of mor\u2026aracters"),
    ],
)
def test_name_of_a_label(label: str, name: str) -> None:
    assert display_names([label]) == [name]


def test_names_that_look_alike_are_told_apart_by_position() -> None:
    labels = ["\u65b0", "plain", "\u805e", "x" * 40, "x" * 50]
    alike = "x" * 13 + "\u2026" + "x" * 8
    assert display_names(labels) == ["0: \u25a1", "plain", "2: \u25a1", f"3: {alike}", f"4: {alike}"]


def test_reliability_is_a_png_of_its_bins() -> None:
    png = reliability_png(reliability_bins(SURE, RIGHT))
    assert shape_of(png) == (int(7.0 * plots.DPI), int(6.4 * plots.DPI))
    assert png == reliability_png(reliability_bins(SURE, RIGHT))
    assert png != reliability_png(reliability_bins(SURE, [True] * 4))
    assert png != reliability_png(reliability_bins(SURE * 2, RIGHT * 2))  # as accurate, of more documents
    assert png != reliability_png(reliability_bins(SURE, RIGHT), counted="label decisions")


@pytest.mark.parametrize("num_bins", [1, 15])
@pytest.mark.parametrize("decision", [(0.0, False), (0.0, True), (1.0, True), (1.0, False)])
def test_reliability_of_one_decision_is_drawn(decision: tuple[float, bool], num_bins: int) -> None:
    confidence, correct = decision
    shape_of(reliability_png(reliability_bins([confidence], [correct], num_bins)))


def test_predicted_against_target_is_a_png_of_its_documents() -> None:
    png = predicted_against_target_png([1.0, 2.0, 3.0], [1.5, 2.0, 2.5])
    assert shape_of(png) == (int(6.6 * plots.DPI), int(6.4 * plots.DPI))
    assert png != predicted_against_target_png([1.0, 2.0, 3.0], [1.5, 2.0, 3.5])
    assert png != predicted_against_target_png([1.5, 2.0, 2.5], [1.0, 2.0, 3.0])


def test_many_documents_are_counted_in_hexagons() -> None:
    target_D = np.linspace(0, 1, plots.MAX_DOTS + 1)
    height, width = shape_of(predicted_against_target_png(target_D, target_D**2))
    assert (height, width) == (int(6.6 * plots.DPI), int(7.6 * plots.DPI))


@pytest.mark.parametrize("value", [0.0, 5.0, -1e9, 5e-324, 1e300])
@pytest.mark.parametrize("num_documents", [1, plots.MAX_DOTS + 1])
def test_equal_numbers_are_drawn(value: float, num_documents: int) -> None:
    same_D = np.full(num_documents, value)
    shape_of(predicted_against_target_png(same_D, same_D))


def test_threads_draw_what_one_thread_draws() -> None:
    def draw(i: int) -> list[bytes]:
        labels = [f"label {i}-{j}" for j in range(4)]
        return [
            confusion_matrix_png(np.eye(4, dtype=int) + i, labels),
            reliability_png(reliability_bins([0.5 + i / 20], [True])),
            predicted_against_target_png([0.0, 1.0], [0.0, 1.0 + i]),
        ]

    expected = [draw(i) for i in range(6)]
    with ThreadPoolExecutor(max_workers=6) as pool:
        assert list(pool.map(draw, range(6))) == expected


def test_global_state_of_matplotlib_is_not_loaded() -> None:
    code = "import sys, belt_tasks.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("confusion", "labels", "message"),
    [
        ([[1, 2]], ["x"], r"confusion must have a row and a column for each label \(1\).*got shape \(1, 2\)"),
        ([[1, 2], [3, 4]], ["x"], r"for each label \(1\) and at least one, got shape \(2, 2\)"),
        ([], [], r"for each label \(0\) and at least one, got shape \(0,\)"),
        ([[0, 0], [0, 0]], ["x", "y"], "confusion must count at least one document, got zeros only"),
    ],
)
def test_confusion_says_what_is_wrong(confusion: Any, labels: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        confusion_matrix_png(confusion, labels)


@pytest.mark.parametrize(
    ("target", "predicted", "message"),
    [
        ([], [], "target_D must have 1 dimension"),
        ([1.0], [1e301], r"must be within 1e\+300 of zero, got 1e\+301"),
    ],
)
def test_predicted_against_target_says_what_is_wrong(target: list[float], predicted: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        predicted_against_target_png(target, predicted)
