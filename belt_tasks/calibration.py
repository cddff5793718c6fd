"""Calibration: pooled logits are scaled so that a probability says how often it is right, by documents not trained on.

Binary and multiclass tasks have one temperature for all documents (Guo et al. 2017, arXiv 1706.04599), which changes no
label. Multilabel has a slope and an offset for each label (Platt 1999, Probabilistic outputs for support vector
machines), fitted to Platt's smoothed targets, so that a label that the documents separate does not become a certainty.

Shape letters: D documents, L labels.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_softmax
from torch import Tensor

from belt_tasks.specs import Head, Spec

Floats = NDArray[np.float64]

LEAST_DOCUMENTS = 20  # with fewer the fit would be to chance
SLOPES = (0.05, 20.0)
MOST_OFFSET = 10.0


class Calibration(Spec):
    """What becomes of a document's pooled logits before they become probabilities: slope times logit plus offset."""

    slope: tuple[float, ...]
    """One for all logits, or one for each label; 1 / temperature."""
    offset: tuple[float, ...] = (0.0,)
    """Likewise."""

    def of(self, logits_DL: Tensor) -> Tensor:
        """Calibrated logits [D, L]."""
        return logits_DL * logits_DL.new_tensor(self.slope) + logits_DL.new_tensor(self.offset)


def calibrated(logits_DL: Tensor, calibration: Calibration | None) -> Tensor:
    """Calibrated logits [D, L]; as they are where there is no calibration."""
    return logits_DL if calibration is None else calibration.of(logits_DL)


def fit(logits_DL: Floats, target: NDArray[np.generic], head: Head) -> Calibration | None:
    """The calibration with the least log loss on some documents, whose log loss it never makes worse.

    Args:
        logits_DL: pooled logits, float64; of a binary task [D, 1].
        target: positions in the labels [D], or bool [D, L] of multilabel.
        head: task and labels.

    Returns:
        None where there is nothing to gain: a regression, fewer than LEAST_DOCUMENTS, or logits that are best as they
        are.
    """
    if head.task == "regression" or len(logits_DL) < LEAST_DOCUMENTS:
        return None
    if head.task == "multilabel":
        fitted = [_platt(logits_DL[:, i], np.asarray(target, dtype=bool)[:, i]) for i in range(logits_DL.shape[1])]
        found = Calibration(slope=tuple(a for a, _ in fitted), offset=tuple(b for _, b in fitted))
        return None if set(fitted) == {(1.0, 0.0)} else found
    loss = _binary_loss if head.task == "binary" else _multiclass_loss
    slope = _temperature(logits_DL, np.asarray(target, dtype=np.int64), loss)
    return None if slope == 1.0 else Calibration(slope=(slope,))


Loss = Callable[[Floats, NDArray[np.int64], float], float]
"""Mean log loss of calibrated logits [D, L] and targets, of which a share is given to the other labels."""


def _temperature(logits_DL: Floats, target_D: NDArray[np.int64], loss: Loss) -> float:
    """1 / temperature. Targets are smoothed as Platt's are: documents that are all right make no certainty."""
    smoothing = 1.0 / (len(logits_DL) + 2)
    found = minimize_scalar(
        lambda log_slope: loss(np.exp(log_slope) * logits_DL, target_D, smoothing),
        bounds=tuple(np.log(SLOPES)),
        method="bounded",
    )
    slope = float(np.exp(found.x))
    return slope if loss(slope * logits_DL, target_D, 0.0) < loss(logits_DL, target_D, 0.0) else 1.0


def _binary_loss(logits_D1: Floats, target_D: NDArray[np.int64], smoothing: float) -> float:
    return _loss(logits_D1[:, 0], np.where(target_D == 1, 1 - smoothing, smoothing))


def _multiclass_loss(logits_DL: Floats, target_D: NDArray[np.int64], smoothing: float) -> float:
    log_scores_DL = log_softmax(logits_DL, axis=1)
    right_D = log_scores_DL[np.arange(len(target_D)), target_D]
    wrong_D = (log_scores_DL.sum(axis=1) - right_D) / max(logits_DL.shape[1] - 1, 1)
    return float(-((1 - smoothing) * right_D + smoothing * wrong_D).mean())


def _platt(logits_D: Floats, is_true_D: NDArray[np.bool_]) -> tuple[float, float]:
    """Slope and offset of one label; those that change nothing where it has no document of one kind."""
    num_true, num_false = int(is_true_D.sum()), int((~is_true_D).sum())
    if num_true == 0 or num_false == 0:
        return 1.0, 0.0
    share_D = np.where(is_true_D, (num_true + 1) / (num_true + 2), 1 / (num_false + 2))

    def loss_and_gradient(parts: Floats) -> tuple[float, Floats]:
        calibrated_D = parts[0] * logits_D + parts[1]
        error_D = expit(calibrated_D) - share_D
        return _loss(calibrated_D, share_D), np.array([(error_D * logits_D).mean(), error_D.mean()])

    found = minimize(
        loss_and_gradient,
        x0=np.array([1.0, 0.0]),
        jac=True,
        method="L-BFGS-B",
        bounds=[SLOPES, (-MOST_OFFSET, MOST_OFFSET)],
    )
    slope, offset = map(float, found.x)
    as_it_is = _loss(logits_D, is_true_D.astype(np.float64))
    return (slope, offset) if _loss(slope * logits_D + offset, is_true_D.astype(np.float64)) < as_it_is else (1.0, 0.0)


def _loss(logits_D: Floats, share_D: Floats) -> float:
    """Mean log loss of sigmoids, for targets that are shares."""
    return float((np.logaddexp(0.0, logits_D) - share_D * logits_D).mean())
