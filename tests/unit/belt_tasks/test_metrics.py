"""Metrics: values worked out by hand, laws, and answers that are JSON whatever the documents."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, r2_score, roc_auc_score

from belt_tasks.errors import ConfigError
from belt_tasks.metrics import (
    class_decisions,
    classification_metrics,
    expected_calibration_error,
    label_decisions,
    multilabel_metrics,
    regression_metrics,
    reliability_bins,
    task_metrics,
)

LABELS = ["a", "b", "c", "d", "e"]
unit = st.floats(0.0, 1.0, allow_subnormal=False)


@st.composite
def classified(draw: st.DrawFn) -> tuple[Any, Any, list[str]]:
    num_labels = draw(st.integers(2, 5))
    rows = draw(st.lists(st.lists(unit, min_size=num_labels, max_size=num_labels), min_size=1, max_size=30))
    classes = st.integers(0, num_labels - 1)
    target_D = draw(st.lists(classes, min_size=len(rows), max_size=len(rows)))
    return np.array(target_D), np.array(rows), LABELS[:num_labels]


@st.composite
def labelled(draw: st.DrawFn) -> tuple[Any, Any, list[str]]:
    num_labels = draw(st.integers(1, 5))
    pairs = st.lists(st.tuples(st.booleans(), unit), min_size=num_labels, max_size=num_labels)
    rows = draw(st.lists(pairs, min_size=1, max_size=30))
    target_DL = np.array([[target for target, _ in row] for row in rows])
    return target_DL, np.array([[score for _, score in row] for row in rows]), LABELS[:num_labels]


def assert_close(actual: Any, expected: Any) -> None:  # any JSON value
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_close(actual[key], expected[key])
    elif isinstance(expected, list):
        assert len(actual) == len(expected)
        for left, right in zip(actual, expected, strict=True):
            assert_close(left, right)
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=1e-9, abs=1e-12)
    else:
        assert actual == expected


def assert_is_json(metrics: dict[str, Any]) -> None:
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_binary_by_hand() -> None:
    scores = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.2, 0.8]])
    metrics = classification_metrics(np.array([0, 0, 1, 1]), scores, ["negative", "positive"])
    assert_close(
        metrics,
        {
            "num_documents": 4,
            "accuracy": 0.75,
            "majority_baseline_accuracy": 0.5,
            "macro_f1": (2 / 3 + 4 / 5) / 2,
            "auc": 1.0,
            "log_loss": -math.log(0.9 * 0.4 * 0.7 * 0.8) / 4,
            # bins of 1/15: 0.6 and 0.7 and 0.8 and 0.9 are each alone
            "ece": (0.1 + 0.6 + 0.3 + 0.2) / 4,
            "per_class": [
                {"label": "negative", "num_documents": 2, "precision": 1.0, "recall": 0.5, "f1": 2 / 3},
                {"label": "positive", "num_documents": 2, "precision": 2 / 3, "recall": 1.0, "f1": 4 / 5},
            ],
            "confusion_matrix": [[1, 1], [0, 2]],
        },
    )


def test_auc_of_two_classes_is_the_positive_ones() -> None:
    scores_DL = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.5, 0.5], [0.1, 0.9]])
    metrics = classification_metrics(np.array([0, 0, 1, 1, 1]), scores_DL, LABELS[:2])
    # of 6 pairs of a positive and a negative, the positive is ranked higher in 4: 3 against 0.1, 1 against 0.8
    assert metrics["auc"] == pytest.approx(4 / 6)


def test_multiclass_by_hand_with_a_class_that_never_occurs() -> None:
    target_D = np.array([0, 0, 1, 1])
    scores_DL = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    metrics = classification_metrics(target_D, scores_DL, ["x", "y", "z"])
    assert metrics["confusion_matrix"] == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]
    assert [row["recall"] for row in metrics["per_class"]] == [0.5, 0.5, None]
    assert [row["precision"] for row in metrics["per_class"]] == [1.0, 0.5, 0.0]
    assert_close([row["f1"] for row in metrics["per_class"]], [2 / 3, 0.5, 0.0])
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 0.5 + 0.0) / 3)
    # x: pairs 0.6 and 0.2 against 0.1 and 0.3 give 3 of 4; y: 0.8 and 0.3 against 0.3 and 0.5 give 2.5 of 4
    assert metrics["auc"] == pytest.approx((0.75 + 0.625) / 2)
    assert metrics["log_loss"] == pytest.approx(-math.log(0.6 * 0.2 * 0.8 * 0.3) / 4)
    assert metrics["majority_baseline_accuracy"] == 0.5


def test_a_class_neither_true_nor_predicted_has_no_f1_and_does_not_dilute_the_macro() -> None:
    metrics = classification_metrics(np.array([0, 1]), np.eye(3)[:2], ["x", "y", "z"])
    assert metrics["per_class"][2] == {
        "label": "z",
        "num_documents": 0,
        "precision": None,
        "recall": None,
        "f1": None,
    }
    assert metrics["macro_f1"] == 1.0


def test_multilabel_by_hand() -> None:
    target_DL = np.array([[True, False], [True, True], [False, False]])
    scores_DL = np.array([[0.9, 0.2], [0.5, 0.4], [0.7, 0.1]])
    metrics = multilabel_metrics(target_DL, scores_DL, ["x", "y"])
    likelihood = 0.9 * 0.8 * 0.5 * 0.4 * 0.3 * 0.9
    assert_close(
        metrics,
        {
            "num_documents": 3,
            "micro_f1": 4 / 6,
            "macro_f1": (4 / 5 + 0) / 2,
            "subset_accuracy": 1 / 3,
            "auc": (0.5 + 1.0) / 2,
            "log_loss": -math.log(likelihood) / 6,
            # sure by 0.9 twice (right), 0.8 (right), 0.7 (wrong), 0.6 (wrong), 0.5 (right)
            "ece": (0.2 + 0.2 + 0.7 + 0.6 + 0.5) / 6,
            "per_class": [
                {"label": "x", "num_documents": 2, "precision": 2 / 3, "recall": 1.0, "f1": 4 / 5},
                {"label": "y", "num_documents": 1, "precision": None, "recall": 0.0, "f1": 0.0},
            ],
        },
    )


def test_a_higher_threshold_predicts_fewer_labels() -> None:
    target_DL, scores_DL = np.array([[True], [True]]), np.array([[0.9], [0.6]])
    metrics = multilabel_metrics(target_DL, scores_DL, ["x"], threshold=0.7)
    assert metrics["per_class"][0]["recall"] == 0.5
    assert multilabel_metrics(target_DL, scores_DL, ["x"], threshold=0.6)["per_class"][0]["recall"] == 1.0


def test_regression_by_hand() -> None:
    metrics = regression_metrics(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 6.0]))
    # errors 0, 1, -1, 2; the target's squares around 2.5 add up to 5; ranks 1 3 2 4: 1 - 6 * 2 / (4 * 15)
    expected = {"num_documents": 4, "mse": 1.5, "mae": 1.0, "r2": 1 - 6 / 5, "spearman": 0.8}
    assert_close(metrics, expected)


def test_calibration_error_by_hand() -> None:
    confidence_N, correct_N = [0.1, 0.3, 0.6, 0.9, 1.0], [False, True, True, True, False]
    # two bins: (0.1 + 0.3) / 2 sure, 1/2 right; 2.5 / 3 sure, 2/3 right
    expected = 2 / 5 * (0.5 - 0.2) + 3 / 5 * (2.5 / 3 - 2 / 3)
    assert expected_calibration_error(confidence_N, correct_N, num_bins=2) == pytest.approx(expected)


def test_a_bin_holds_its_upper_border_and_the_first_bin_zero() -> None:
    bins = reliability_bins([0.0, 0.25, 0.5, 0.51, 1.0], [True] * 5, num_bins=4)
    assert bins.num_decisions.tolist() == [2, 1, 1, 1]
    assert bins.accuracy.tolist() == [1.0, 1.0, 1.0, 1.0]
    assert bins.confidence.tolist() == [0.125, 0.5, 0.51, 1.0]
    assert bins.edges.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


@settings(deadline=None)
@given(st.lists(st.tuples(unit, st.booleans()), min_size=1, max_size=60), st.integers(1, 20))
def test_calibration_error_equals_a_naive_loop(decisions: list[tuple[float, bool]], num_bins: int) -> None:
    edges = [float(edge) for edge in np.linspace(0, 1, num_bins + 1)]
    expected = 0.0
    for i in range(num_bins):
        low, high = edges[i], edges[i + 1]
        inside = [(c, right) for c, right in decisions if low < c <= high or (i == 0 and c == 0)]
        if inside:
            accuracy = sum(right for _, right in inside) / len(inside)
            confidence = sum(c for c, _ in inside) / len(inside)
            expected += len(inside) / len(decisions) * abs(accuracy - confidence)
    confidence_N, correct_N = zip(*decisions, strict=True)
    actual = expected_calibration_error(confidence_N, correct_N, num_bins)
    assert 0.0 <= actual <= 1.0
    assert actual == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(classified(), st.randoms(use_true_random=False))
def test_order_of_documents_changes_no_classification_metric(case: Any, random: Any) -> None:
    target_D, scores_DL, labels = case
    order = random.sample(range(len(target_D)), len(target_D))
    metrics = classification_metrics(target_D, scores_DL, labels)
    assert_is_json(metrics)
    assert_close(classification_metrics(target_D[order], scores_DL[order], labels), metrics)


@settings(deadline=None)
@given(labelled(), st.randoms(use_true_random=False))
def test_order_of_documents_changes_no_multilabel_metric(case: Any, random: Any) -> None:
    target_DL, scores_DL, labels = case
    order = random.sample(range(len(target_DL)), len(target_DL))
    metrics = multilabel_metrics(target_DL, scores_DL, labels)
    assert_is_json(metrics)
    assert_close(multilabel_metrics(target_DL[order], scores_DL[order], labels), metrics)


numbers = st.floats(-1e6, 1e6).map(lambda x: round(x, 3))


@settings(deadline=None)
@given(
    st.lists(st.tuples(numbers, numbers), min_size=1, max_size=30),
    st.randoms(use_true_random=False),
)
def test_order_of_documents_changes_no_regression_metric(pairs: list[Any], random: Any) -> None:
    target_D, predicted_D = (np.array(column) for column in zip(*pairs, strict=True))
    order = random.sample(range(len(pairs)), len(pairs))
    metrics = regression_metrics(target_D, predicted_D)
    assert_is_json(metrics)
    shuffled = regression_metrics(target_D[order], predicted_D[order])
    for key, value in metrics.items():
        assert shuffled[key] == (None if value is None else pytest.approx(value, rel=1e-6, abs=1e-9))


@settings(deadline=None)
@given(classified())
def test_agrees_with_scikit_learn(case: Any) -> None:
    target_D, scores_DL, labels = case
    metrics = classification_metrics(target_D, scores_DL, labels)
    expected = f1_score(target_D, scores_DL.argmax(axis=1), average="macro", zero_division=0)
    assert metrics["macro_f1"] == pytest.approx(expected)
    if len(labels) > 2 and len(set(target_D.tolist())) == len(labels):
        probability_DL = (scores_DL + 1) / (scores_DL + 1).sum(axis=1, keepdims=True)
        expected = roc_auc_score(target_D, probability_DL, multi_class="ovr", average="macro")
        assert classification_metrics(target_D, probability_DL, labels)["auc"] == pytest.approx(expected)


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_perfect_classification_is_one_and_zero(classes: list[int]) -> None:
    metrics = classification_metrics(np.array(classes), np.eye(4)[classes], LABELS[:4])
    assert metrics["accuracy"] == metrics["macro_f1"] == 1.0
    assert metrics["ece"] == 0.0
    assert metrics["log_loss"] == pytest.approx(0.0, abs=1e-12)
    assert metrics["auc"] == (None if len(set(classes)) == 1 else 1.0)


@settings(deadline=None)
@given(labelled())
def test_perfect_multilabel_is_one_and_zero(case: Any) -> None:
    target_DL, _, labels = case
    metrics = multilabel_metrics(target_DL, target_DL.astype(float), labels)
    assert metrics["subset_accuracy"] == 1.0
    assert metrics["ece"] == 0.0
    assert metrics["log_loss"] == pytest.approx(0.0, abs=1e-12)
    assert metrics["micro_f1"] == metrics["macro_f1"] == (1.0 if target_DL.any() else None)
    assert metrics["auc"] in {None, 1.0}


@settings(deadline=None)
@given(st.lists(numbers, min_size=2, max_size=30, unique=True))
def test_perfect_regression_is_one_and_zero(values: list[float]) -> None:
    metrics = regression_metrics(np.array(values), np.array(values))
    assert metrics["mse"] == metrics["mae"] == 0.0
    assert metrics["r2"] == r2_score(values, values) == 1.0
    assert metrics["spearman"] == pytest.approx(1.0)


def test_reversed_order_has_spearman_minus_one() -> None:
    assert regression_metrics([1.0, 2.0, 3.0], [9.0, 4.0, 1.0])["spearman"] == pytest.approx(-1.0)


@pytest.mark.parametrize("target", [[0], [1], [1, 1, 1]])
def test_one_class_only_has_no_auc(target: list[int]) -> None:
    scores_DL = np.tile([0.25, 0.75], (len(target), 1))
    metrics = classification_metrics(np.array(target), scores_DL, ["negative", "positive"])
    assert_is_json(metrics)
    assert metrics["auc"] is None
    assert metrics["majority_baseline_accuracy"] == 1.0


def test_auc_of_several_classes_is_undefined_where_one_occurs() -> None:
    assert classification_metrics([2], [[0.2, 0.3, 0.5]], ["x", "y", "z"])["auc"] is None


def test_multilabel_auc_is_over_the_labels_with_both_values() -> None:
    target_DL = np.array([[True, False, False], [True, False, True]])
    metrics = multilabel_metrics(target_DL, np.array([[0.9, 0.1, 0.2], [0.8, 0.2, 0.7]]), ["x", "y", "z"])
    assert_is_json(metrics)
    assert metrics["auc"] == 1.0
    assert metrics["per_class"][1]["f1"] is None
    assert metrics["macro_f1"] == 1.0


def test_no_label_anywhere_leaves_f1_undefined() -> None:
    metrics = multilabel_metrics(np.zeros((3, 2), dtype=bool), np.zeros((3, 2)), ["x", "y"])
    assert_is_json(metrics)
    assert [metrics[key] for key in ("micro_f1", "macro_f1", "auc")] == [None, None, None]
    assert metrics["subset_accuracy"] == 1.0


@pytest.mark.parametrize(
    ("target", "predicted", "undefined"),
    [
        ([3.0], [4.0], {"r2", "spearman"}),
        ([0.1, 0.1, 0.1], [1.0, 2.0, 3.0], {"r2", "spearman"}),
        ([1.0, 2.0, 3.0], [0.1, 0.1, 0.1], {"spearman"}),
        ([1e200, 2e200], [2e200, 1e200], {"mse", "r2"}),
        ([1e-200, 2e-200], [1e-200, 2e-200], {"r2"}),
    ],
    ids=["one document", "constant target", "constant prediction", "overflow", "underflow"],
)
def test_undefined_regression_metrics_are_none(
    target: list[float], predicted: list[float], undefined: set[str]
) -> None:
    metrics = regression_metrics(target, predicted)
    assert_is_json(metrics)
    assert {key for key, value in metrics.items() if value is None} == undefined


def test_an_impossible_class_that_occurs_has_a_finite_log_loss() -> None:
    metrics = classification_metrics([1, 0], [[1.0, 0.0], [0.0, 0.0]], LABELS[:2])
    assert_is_json(metrics)
    # the row of zeros counts as uniform, the impossible one as likely as one rounding error
    assert metrics["log_loss"] == pytest.approx((math.log(2) - math.log(np.finfo(float).eps)) / 2)


def test_rounded_probabilities_are_accepted() -> None:
    scores_DL = np.array([[1.0005, -0.0004], [0.3001, 0.7001]])
    metrics = classification_metrics([0, 1], scores_DL, LABELS[:2])
    assert metrics["ece"] == pytest.approx((0.0 + (1 - 0.7001)) / 2)
    assert metrics["log_loss"] == pytest.approx(-math.log(0.7001 / 1.0002) / 2)


def test_single_precision_is_accepted() -> None:
    scores_DL = np.array([[0.9, 0.1], [0.2, 0.8]], dtype=np.float32)
    assert_is_json(classification_metrics(np.array([0, 1], dtype=np.int32), scores_DL, LABELS[:2]))


def test_decisions_of_classes_and_of_labels() -> None:
    confidence_D, correct_D = class_decisions([1, 0], [[0.3, 0.7], [0.4, 0.6]])
    assert confidence_D.tolist() == [0.7, 0.6]
    assert correct_D.tolist() == [True, False]
    confidence_N, correct_N = label_decisions([[True, False]], [[0.75, 0.25]])
    assert confidence_N.tolist() == [0.75, 0.75]
    assert correct_N.tolist() == [True, True]


def test_each_task_has_its_metrics() -> None:
    scores_DL, labels = np.array([[0.9, 0.1], [0.2, 0.8]]), LABELS[:2]
    target_DL = np.array([[True, False], [True, True]])
    classes = classification_metrics([0, 1], scores_DL, labels)
    assert task_metrics("binary", [0, 1], scores_DL, labels) == classes
    assert task_metrics("multiclass", [0, 1], scores_DL, labels) == classes
    expected = multilabel_metrics(target_DL, scores_DL, labels, 0.9)
    assert task_metrics("multilabel", target_DL, scores_DL, labels, 0.9) == expected
    assert task_metrics("regression", [1.0, 2.0], [[1.0], [3.0]], []) == regression_metrics([1.0, 2.0], [1.0, 3.0])


HALF = [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("target", "scores", "labels", "message"),
    [
        ([], np.zeros((0, 2)), "ab", r"scores_DL must have 2 dimension\(s\) and rows, got \(0, 2\)"),
        ([0, 1], [0.5, 0.5], "ab", r"scores_DL must have 2 dimension\(s\) and rows, got \(2,\)"),
        ([0, 1], [[0.5], [0.5]], "a", "scores_DL must have a column per class .* got 1 column"),
        ([0, 1], HALF, "abc", "labels must name 2 columns of scores_DL, got 3 names"),
        ([0, 1, 0], HALF, "ab", r"target_D must be integers of shape \(2,\), got int64 of \(3,\)"),
        ([0.0, 1.0], HALF, "ab", r"target_D must be integers of shape \(2,\), got float64 of \(2,\)"),
        ([0, 2], HALF, "ab", r"target_D must be between 0 and 1, got 1 other values \(row 1: 2\)"),
        ([0, -1], HALF, "ab", r"target_D must be between 0 and 1, got 1 other values \(row 1: -1\)"),
        ([0, 1], [[0.5, math.nan], [math.inf, 1]], "ab", "scores_DL must be finite, got 2 of 4 values"),
        ([0, 1], [[-2.5, 2.5], [0, 1]], "ab", r"scores_DL must be probabilities .* got 2 other .*first: -2.5"),
    ],
)
def test_classification_says_what_is_wrong(target: Any, scores: Any, labels: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        classification_metrics(target, scores, labels)


@pytest.mark.parametrize(
    ("target", "scores", "labels", "threshold", "message"),
    [
        (np.zeros((0, 2), bool), np.zeros((0, 2)), "ab", 0.5, "scores_DL must have 2 dimension"),
        ([[0, 1]], [[0.5, 0.5]], "ab", 0.5, r"target_DL must be bool of shape \(1, 2\), got int64 of \(1, 2\)"),
        ([[True]], [[0.5, 0.5]], "ab", 0.5, r"target_DL must be bool of shape \(1, 2\), got bool of \(1, 1\)"),
        ([[True, False]], [[0.5, 0.5]], "a", 0.5, "labels must name 2 columns of scores_DL, got 1 names"),
        ([[True, False]], [[0.5, 0.5]], "ab", 1.5, "threshold must be between 0 and 1, got 1.5"),
        ([[True, False]], [[0.5, math.nan]], "ab", 0.5, "scores_DL must be finite, got 1 of 2 values"),
    ],
)
def test_multilabel_says_what_is_wrong(
    target: Any,
    scores: Any,
    labels: str,
    threshold: float,
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        multilabel_metrics(target, scores, labels, threshold)


@pytest.mark.parametrize(
    ("target", "predicted", "message"),
    [
        ([], [], r"target_D must have 1 dimension\(s\) and rows, got \(0,\)"),
        ([1.0, 2.0], [1.0], "predicted_D must have target_D's 2 values, got 1"),
        ([1.0, math.nan], [1.0, 2.0], "target_D must be finite, got 1 of 2 values that are not"),
        ([1.0, 2.0], [[1.0], [2.0]], r"predicted_D must have 1 dimension\(s\) and rows, got \(2, 1\)"),
    ],
)
def test_regression_says_what_is_wrong(target: Any, predicted: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        regression_metrics(target, predicted)


@pytest.mark.parametrize(
    ("confidence", "correct", "num_bins", "message"),
    [
        ([], [], 15, r"confidence_N must have 1 dimension\(s\) and rows, got \(0,\)"),
        ([0.5], [True, False], 15, r"correct_N must be bool of shape \(1,\), got bool of \(2,\)"),
        ([0.5], [True], 0, "num_bins must be at least 1, got 0"),
        ([1.5], [True], 15, "confidence_N must be probabilities between 0 and 1, got 1 other values"),
    ],
)
def test_calibration_says_what_is_wrong(
    confidence: list[float], correct: list[bool], num_bins: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        expected_calibration_error(confidence, correct, num_bins)
