"""Heads: probabilities and losses against scikit-learn and definitions."""

import numpy as np
import pydantic
import pytest
import torch
from scipy.special import expit, softmax
from sklearn.metrics import log_loss

from belt_tasks import heads
from belt_tasks.specs import Head

LOGITS = torch.tensor([[0.3, -2.0, 1.0], [5.0, 0.0, -1.0]], dtype=torch.float64)


def test_binary_scores_are_of_the_negative_and_the_positive_label():
    head = Head(task="binary", labels=("no", "yes"))

    found = heads.scores(LOGITS[:, :1], head)

    np.testing.assert_allclose(found, np.stack([expit([-0.3, -5.0]), expit([0.3, 5.0])], axis=1))
    loss = heads.losses(LOGITS[:, :1], torch.tensor([1, 0]), head).mean().item()
    assert loss == pytest.approx(log_loss([1, 0], found[:, 1]))


def test_multiclass_scores_sum_to_one():
    head = Head(task="multiclass", labels=("a", "b", "c"))

    found = heads.scores(LOGITS, head)

    np.testing.assert_allclose(found, softmax(LOGITS.numpy(), axis=1))
    loss = heads.losses(LOGITS, torch.tensor([2, 0]), head).mean().item()
    assert loss == pytest.approx(log_loss([2, 0], found.numpy(), labels=[0, 1, 2]))


def test_multilabel_scores_are_independent():
    head = Head(task="multilabel", labels=("a", "b", "c"))
    target = torch.tensor([[True, False, True], [False, False, True]])

    found = heads.scores(LOGITS, head)

    np.testing.assert_allclose(found, expit(LOGITS.numpy()))
    expected = np.mean([log_loss(target[:, i], found[:, i].numpy(), labels=[False, True]) for i in range(3)])
    assert heads.losses(LOGITS, target, head).mean().item() == pytest.approx(expected)


def test_regression_scores_are_the_values():
    head = Head(task="regression", labels=("stars",))

    assert torch.equal(heads.scores(LOGITS[:, :1], head), LOGITS[:, :1])
    assert heads.losses(LOGITS[:, :1], torch.tensor([1.3, 3.0]), head).mean().item() == pytest.approx((1.0 + 4.0) / 2)


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_log_scores_are_the_logarithms_of_the_scores(task):
    head = Head(task=task, labels=("a", "b") if task == "binary" else ("a", "b", "c"))
    logits = LOGITS[:, : head.num_logits]

    torch.testing.assert_close(heads.log_scores(logits, head), heads.scores(logits, head).log())


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        ("binary", ("a",), "a binary head needs exactly 2 labels, got 1"),
        ("multiclass", ("a",), "a multiclass head needs at least 2 labels, got 1"),
        ("regression", ("a", "b"), "a regression head needs exactly 1 labels, got 2"),
        ("multiclass", ("a", "b", "a"), "labels must be unique"),
    ],
)
def test_labels_that_do_not_fit_the_task_are_refused(task, labels, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        Head(task=task, labels=labels)
