"""Calibration: fitted where there is something to gain, never worse where it was fitted, and equal to two oracles."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax
from sklearn.calibration import _SigmoidCalibration

from belt_tasks import calibration, heads, metrics
from belt_tasks.calibration import LEAST_DOCUMENTS, SLOPES, Calibration, fit
from belt_tasks.specs import Head

HEADS = {
    "binary": Head(task="binary", labels=("no", "yes")),
    "multiclass": Head(task="multiclass", labels=("a", "b", "c")),
    "multilabel": Head(task="multilabel", labels=("a", "b", "c")),
}


def honest(task, num_documents, seed, *, spread=2.0):
    """Logits whose probabilities are right, and targets drawn by them."""
    random, head = np.random.default_rng(seed), HEADS[task]
    logits = spread * random.normal(size=(num_documents, head.num_logits))
    if task == "multiclass":
        shares = softmax(logits, axis=1)
        return logits, np.array([random.choice(3, p=share) for share in shares])
    target = random.random(logits.shape) < expit(logits)
    return logits, target if task == "multilabel" else target[:, 0].astype(np.int64)


def measured(task, logits, target, found: Calibration | None):
    calibrated = torch.from_numpy(logits) if found is None else found.of(torch.from_numpy(logits))
    head = HEADS[task]
    return metrics.task_metrics(task, target, heads.scores(calibrated, head).numpy(), head.labels)


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("too_sure", [0.3, 1.0, 4.0])
def test_what_is_too_sure_or_too_unsure_becomes_honest(task, too_sure):
    logits, target = honest(task, 4_000, seed=1)

    found = fit(too_sure * logits, target, HEADS[task])

    slopes = (1.0,) if found is None else found.slope
    assert [slope * too_sure for slope in slopes] == pytest.approx([1.0] * len(slopes), abs=0.12)
    assert measured(task, too_sure * logits, target, found)["ece"] < 0.025
    if too_sure != 1.0:
        assert measured(task, too_sure * logits, target, None)["ece"] > 0.05


@pytest.mark.parametrize("task", HEADS)
@settings(max_examples=30)
@given(
    num_documents=st.integers(LEAST_DOCUMENTS, 60),
    seed=st.integers(0, 10**6),
    too_sure=st.floats(0.01, 100),
    offset=st.floats(-5, 5),
    is_wrong=st.booleans(),
)
def test_log_loss_is_never_worse_where_it_was_fitted_and_ranks_stay(
    task, num_documents, seed, too_sure, offset, is_wrong
):
    logits, target = honest(task, num_documents, seed)
    logits = too_sure * (-logits if is_wrong else logits) + offset

    found = fit(logits, target, HEADS[task])

    before, after = measured(task, logits, target, None), measured(task, logits, target, found)
    assert after["log_loss"] <= before["log_loss"] + 1e-12
    if found is not None:
        assert all(SLOPES[0] <= slope <= SLOPES[1] * (1 + 1e-9) for slope in found.slope)
        calibrated = found.of(torch.from_numpy(logits)).numpy()
        assert all((np.diff(calibrated[np.argsort(logits[:, i]), i]) >= 0).all() for i in range(logits.shape[1]))
    if task != "multilabel":
        assert after["accuracy"] == before["accuracy"]


@pytest.mark.parametrize("task", ["binary", "multiclass"])
@pytest.mark.parametrize("seed", range(5))
def test_the_temperature_is_the_best_of_a_fine_grid(task, seed):
    logits, target = honest(task, 200, seed)
    logits *= 3

    found = fit(logits, target, HEADS[task])

    grid = np.geomspace(*SLOPES, 2_000)
    losses = [measured(task, logits, target, Calibration(slope=(slope,)))["log_loss"] for slope in grid]
    assert found.slope[0] == pytest.approx(grid[np.argmin(losses)], rel=0.05)  # targets are smoothed by 1 / 202
    assert measured(task, logits, target, found)["log_loss"] == pytest.approx(min(losses), abs=2e-3)


@pytest.mark.parametrize("seed", range(5))
def test_slope_and_offset_are_those_of_scikit_learn(seed):
    logits, target = honest("multilabel", 300, seed)
    logits = 3 * logits - 1

    found = fit(logits, target, HEADS["multilabel"])

    for i in range(3):
        oracle = _SigmoidCalibration().fit(logits[:, i], target[:, i].astype(int))
        assert (found.slope[i], found.offset[i]) == pytest.approx((-oracle.a_, -oracle.b_), abs=1e-3)


@pytest.mark.parametrize("task", HEADS)
def test_documents_that_are_all_right_are_no_certainty(task):
    logits, target = honest(task, 40, seed=3)
    if task == "multiclass":
        target = logits.argmax(axis=1)
    else:
        target = (logits > 0) if task == "multilabel" else (logits[:, 0] > 0).astype(np.int64)

    found = fit(logits, target, HEADS[task])

    scores = heads.scores(found.of(torch.from_numpy(logits)), HEADS[task]).numpy()
    assert np.quantile(scores.max(axis=1), 0.5) < 0.9999


def test_where_there_is_nothing_to_learn_nothing_changes():
    logits, target = honest("binary", LEAST_DOCUMENTS - 1, seed=0)
    assert fit(9 * logits, target, HEADS["binary"]) is None

    numbers = np.arange(50.0)
    assert fit(numbers[:, None], numbers, Head(task="regression", labels=("stars",))) is None

    logits, target = honest("multilabel", 100, seed=0)
    target[:, 0], target[:, 1] = False, True
    found = fit(5 * logits, target, HEADS["multilabel"])
    assert (found.slope[:2], found.offset[:2]) == ((1.0, 1.0), (0.0, 0.0))
    assert found.slope[2] < 0.5


def test_the_loss_of_platt_has_its_gradient():
    """By finite differences, at the optimum: both parts vanish."""
    logits, target = honest("multilabel", 200, seed=4)
    slope, offset = calibration._platt(logits[:, 0] * 2, target[:, 0])
    num_true, num_false = target[:, 0].sum(), (~target[:, 0]).sum()
    shares = np.where(target[:, 0], (num_true + 1) / (num_true + 2), 1 / (num_false + 2))

    def loss(a, b):
        return calibration._loss(a * logits[:, 0] * 2 + b, shares)

    for by in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)):
        assert loss(slope + by[0], offset + by[1]) > loss(slope, offset)
