"""Resampling: a draw's metric is that of the drawn documents, and the interval is the one that two oracles find."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from belt_tasks import metrics, resampling
from belt_tasks.errors import ConfigError
from tests.random_scores import scored

CASES = [(task, metric) for task, names in resampling.METRICS.items() for metric in names]


@pytest.mark.parametrize(("task", "metric"), CASES)
@settings(max_examples=25)
@given(num_documents=st.integers(1, 25), seed=st.integers(0, 10**6))
def test_a_draws_metric_is_that_of_the_documents_drawn(task, metric, num_documents, seed):
    target, scores, labels = scored(task, num_documents, seed)
    drawn = np.random.default_rng(seed).integers(0, num_documents, (4, num_documents))
    weights = np.array([np.bincount(draw, minlength=num_documents) for draw in drawn], dtype=float)

    found = resampling.weighted_metric(task, metric, target, scores, 0.5)(weights)

    for value, draw in zip(found, drawn, strict=True):
        expected = metrics.task_metrics(task, target[draw], scores[draw], labels)[metric]
        if expected is None:
            assert np.isnan(value)
        else:
            assert value == pytest.approx(expected, abs=1e-9)


def interval(task, metric, target, one, other, **more):
    of = [resampling.weighted_metric(task, metric, target, scores, 0.5) for scores in (one, other)]
    settings = {"confidence": 0.9, "num_resamples": 400, "seed": 3, "num_documents": len(target)}
    sign = -1 if metric in resampling.LOWER_IS_BETTER else 1
    return resampling.gain_interval(*of, sign=sign, **(settings | more))


@pytest.mark.parametrize(("task", "metric"), CASES)
def test_the_interval_is_that_of_a_slow_loop_over_the_same_draws(task, metric, monkeypatch):
    monkeypatch.setattr(resampling, "BLOCK", 40 * 7)  # draws come in blocks of 7
    target, one, labels = scored(task, 40, 1)
    _, other, _ = scored(task, 40, 1, skill=1.5)
    random, gains, left = np.random.default_rng(3), [], 200
    while left:
        size = min(7, left)
        for draw in random.integers(0, 40, (size, 40)):
            now, before = (metrics.task_metrics(task, target[draw], it[draw], labels)[metric] for it in (other, one))
            gains.append(now - before)
        left -= size
    if metric in ("mse", "mae", "log_loss"):
        gains = [-gain for gain in gains]

    found = interval(task, metric, target, one, other, num_resamples=200)

    assert found == pytest.approx(np.percentile(gains, [5, 95]), abs=1e-9)


@pytest.mark.parametrize(
    ("task", "metric"), [("binary", "accuracy"), ("multiclass", "macro_f1"), ("regression", "mse")]
)
def test_the_interval_is_about_that_of_scipy(task, metric):
    target, one, labels = scored(task, 150, 5)
    _, other, _ = scored(task, 150, 5, skill=1.6)

    def gain(drawn):
        of = [metrics.task_metrics(task, target[drawn], scores[drawn], labels)[metric] for scores in (one, other)]
        return (of[1] - of[0]) * (-1 if metric == "mse" else 1)

    expected = scipy.stats.bootstrap(
        (np.arange(150),), gain, vectorized=False, method="percentile", confidence_level=0.9, n_resamples=600, rng=0
    ).confidence_interval
    found = interval(task, metric, target, one, other, num_resamples=4000)

    width = expected.high - expected.low
    assert found == pytest.approx((expected.low, expected.high), abs=0.2 * width)


@pytest.mark.parametrize(("task", "metric"), CASES)
def test_nothing_is_gained_by_the_same_scores(task, metric):
    target, scores, _ = scored(task, 30, 2)

    assert interval(task, metric, target, scores, scores.copy()) == (0.0, 0.0)


@pytest.mark.parametrize(("task", "metric"), CASES)
def test_what_one_gains_the_other_loses(task, metric):
    target, one, _ = scored(task, 60, 7)
    _, other, _ = scored(task, 60, 8, skill=2)

    there, back = interval(task, metric, target, one, other), interval(task, metric, target, other, one)

    assert there == pytest.approx((-back[1], -back[0]), abs=1e-12)


def test_the_seed_decides_and_nothing_else_does(monkeypatch):
    target, one, _ = scored("binary", 50, 1)
    _, other, _ = scored("binary", 50, 1, skill=2)
    first = interval("binary", "log_loss", target, one, other)

    assert interval("binary", "log_loss", target, one, other) == first
    assert interval("binary", "log_loss", target, one, other, seed=4) != first
    monkeypatch.setattr(resampling, "BLOCK", 1)
    assert interval("binary", "log_loss", target, one, other) == pytest.approx(first)


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
@settings(max_examples=25)
@given(num_documents=st.integers(1, 25), seed=st.integers(0, 10**6))
def test_a_draws_recalls_are_those_of_the_documents_drawn(task, num_documents, seed):
    target, scores, labels = scored(task, num_documents, seed)
    drawn = np.random.default_rng(seed).integers(0, num_documents, (4, num_documents))
    weights = np.array([np.bincount(draw, minlength=num_documents) for draw in drawn], dtype=float)

    found_BL = resampling.weighted_recalls(task, target, scores, 0.5)(weights)

    for found_L, draw in zip(found_BL, drawn, strict=True):
        rows = metrics.task_metrics(task, target[draw], scores[draw], labels)["per_class"]
        expected = [np.nan if row["recall"] is None else row["recall"] for row in rows]
        assert found_L.tolist() == pytest.approx(expected, nan_ok=True)


def test_draws_without_a_definition_are_left_out():
    target = np.array([1, 0, 0, 0])
    worst, best = np.array([[0.1, 0.9], [0, 1], [0, 1], [0, 1]]), np.array([[0, 1], [1, 0], [1, 0], [1, 0.0]])

    assert interval("binary", "auc", target, worst, best) == (1.0, 1.0)  # a third of the draws has one class only
    with pytest.raises(ConfigError, match="no definition on any of 400 draws of 4 documents"):
        interval("binary", "auc", np.zeros(4, dtype=int), worst, best)


@pytest.mark.parametrize("task", resampling.METRICS)
def test_a_metric_that_a_task_does_not_have(task):
    wrong = "spearman" if task != "regression" else "accuracy"

    with pytest.raises(ConfigError, match=f"metric of a {task} task must be one of .*, got '{wrong}'"):
        interval(task, wrong, *scored(task, 5, 0)[:2], scored(task, 5, 1)[1])
