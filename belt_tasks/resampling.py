"""Resampling: how much a gain in a metric would vary, had other documents of the same kind been held out.

The paired bootstrap: documents are drawn with replacement, and both checkpoints are measured on the same draw, so that
what is hard for both cancels out. The interval holds the middle share of the gains (percentile interval: Efron and
Tibshirani 1993, An Introduction to the Bootstrap, chapter 13; for comparing two systems on one test set: Koehn 2004,
https://aclanthology.org/W04-3250).

A draw is kept as a count for each document, so that a metric of many draws is a few products of matrices.

Shape letters: B draws, D documents, K statistics, L labels, U different values.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from belt_tasks.errors import ConfigError
from belt_tasks.specs import Metric, TaskKind

Floats = NDArray[np.float64]
WeightedMetric = Callable[[Floats], Floats]
"""From how often each document was drawn [B, D] to the metric of each draw [B]; NaN where it has no definition."""
WeightedMetrics = Callable[[Floats], Floats]
"""The same of K metrics at once: [B, K]."""

BLOCK = 4_000_000  # numbers at once: some 32 MB an array
LOWER_IS_BETTER = {"log_loss", "mse", "mae"}
METRICS: dict[TaskKind, tuple[Metric, ...]] = {
    "binary": ("accuracy", "macro_f1", "auc", "log_loss"),
    "multiclass": ("accuracy", "macro_f1", "auc", "log_loss"),
    "multilabel": ("micro_f1", "macro_f1", "subset_accuracy", "auc", "log_loss"),
    "regression": ("mse", "mae", "r2", "spearman"),
}
"""What each task has; the first is its main one."""


def gain_interval(
    champion: WeightedMetric,
    challenger: WeightedMetric,
    *,
    num_documents: int,
    sign: int,
    confidence: float,
    num_resamples: int,
    seed: int,
) -> tuple[float, float]:
    """The ends of the interval of the gain; draws on which a metric has no definition are left out.

    Args:
        champion: its metric.
        challenger: its metric, of the same documents.
        num_documents: D.
        sign: 1 where higher is better, -1 where lower is.
        confidence: share of the draws between the ends.
        num_resamples: how many draws.
        seed: of the draws.

    Raises:
        ConfigError: the metric has no definition on any draw.
    """
    (lower,), (upper,) = intervals(
        lambda weights_BD: (sign * (challenger(weights_BD) - champion(weights_BD)))[:, None],
        num_documents=num_documents,
        confidence=confidence,
        num_resamples=num_resamples,
        seed=seed,
    )
    if np.isnan(lower):
        raise ConfigError(f"a metric has no definition on any of {num_resamples} draws of {num_documents} documents")
    return float(lower), float(upper)


def intervals(
    metrics: WeightedMetrics, *, num_documents: int, confidence: float, num_resamples: int, seed: int
) -> tuple[Floats, Floats]:
    """The ends [K] of the intervals of K metrics on the same draws; NaN of one that has no definition on any of them.

    Args:
        metrics: of a draw.
        num_documents: D, 1 or more.
        confidence: share of the draws between the ends.
        num_resamples: how many draws.
        seed: of the draws.
    """
    random, found = np.random.default_rng(seed), []
    block = max(1, BLOCK // num_documents)
    for first in range(0, num_resamples, block):
        size = min(block, num_resamples - first)
        drawn_BD = random.integers(0, num_documents, (size, num_documents))
        drawn_BD += np.arange(size)[:, None] * num_documents
        weights_BD = np.bincount(drawn_BD.ravel(), minlength=size * num_documents).reshape(size, num_documents)
        found.append(metrics(weights_BD.astype(np.float64)))
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]
    defined = [of_one[np.isfinite(of_one)] for of_one in np.concatenate(found).T]
    ends_K2 = np.array([np.quantile(of_one, ends) if len(of_one) else (np.nan, np.nan) for of_one in defined])
    return ends_K2[:, 0], ends_K2[:, 1]


def weighted_metric(
    task: TaskKind, metric: Metric, target: NDArray[np.generic], scores_DL: Floats, threshold: float
) -> WeightedMetric:
    """A metric of `metrics.task_metrics`, as a function of how often each document was drawn.

    Args:
        task: what the scores are.
        metric: which one.
        target: class positions [D], bools [D, L], or numbers [D].
        scores_DL: probabilities, or one column of numbers.
        threshold: of multilabel.

    Raises:
        ConfigError: the task has no such metric.
    """
    if metric not in METRICS[task]:
        raise ConfigError(f"metric of a {task} task must be one of {', '.join(METRICS[task])}, got {metric!r}")
    if task == "regression":
        return _of_numbers(metric, np.asarray(target, dtype=np.float64), scores_DL[:, 0])
    scores_DL = scores_DL.clip(0.0, 1.0)  # half precision may push a probability a little outside
    true_DL, predicted_DL = _decisions(task, target, scores_DL, threshold)
    match metric:
        case "accuracy" | "subset_accuracy":
            return _mean((true_DL == predicted_DL).all(axis=1))
        case "macro_f1" | "micro_f1":
            return _f1(true_DL, predicted_DL, is_micro=metric == "micro_f1")
        case "log_loss":
            return _mean(_log_loss(task, true_DL, scores_DL))
        case _:
            ranked = [1] if task != "multilabel" and scores_DL.shape[1] == 2 else range(scores_DL.shape[1])  # noqa: PLR2004 - two classes: the positive one
            of_labels = [_auc(true_DL[:, i], scores_DL[:, i]) for i in ranked]
            return lambda weights_BD: _mean_defined(np.stack([of_label(weights_BD) for of_label in of_labels], axis=1))


def weighted_recalls(
    task: TaskKind, target: NDArray[np.generic], scores_DL: Floats, threshold: float
) -> WeightedMetrics:
    """The recall of each label, K being L; parameters are those of `weighted_metric`, and the task has labels."""
    true_DL, predicted_DL = _decisions(task, target, scores_DL, threshold)
    hits_DL, weight_DL = (true_DL & predicted_DL).astype(np.float64), true_DL.astype(np.float64)
    return lambda weights_BD: _divided(weights_BD @ hits_DL, weights_BD @ weight_DL)


def _decisions(
    task: TaskKind, target: NDArray[np.generic], scores_DL: Floats, threshold: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    if task == "multilabel":
        return np.asarray(target, dtype=bool), scores_DL >= threshold
    labels = np.arange(scores_DL.shape[1])
    return np.asarray(target)[:, None] == labels, scores_DL.argmax(axis=1)[:, None] == labels


def _mean(value_D: NDArray[np.generic]) -> WeightedMetric:
    numbers = value_D.astype(np.float64)
    return lambda weights_BD: np.asarray(weights_BD @ numbers / weights_BD.sum(axis=1))


def _f1(true_DL: NDArray[np.bool_], predicted_DL: NDArray[np.bool_], *, is_micro: bool) -> WeightedMetric:
    hits_DL = (true_DL & predicted_DL).astype(np.float64)
    both_DL = true_DL.astype(np.float64) + predicted_DL

    def of(weights_BD: Floats) -> Floats:
        hits_BL, both_BL = weights_BD @ hits_DL, weights_BD @ both_DL
        if is_micro:
            hits_BL, both_BL = hits_BL.sum(axis=1, keepdims=True), both_BL.sum(axis=1, keepdims=True)
        return _mean_defined(_divided(2 * hits_BL, both_BL))

    return of


def _log_loss(task: TaskKind, true_DL: NDArray[np.bool_], scores_DL: Floats) -> Floats:
    """Of each document, as scikit-learn bounds it."""
    least = np.finfo(np.float64).eps
    if task == "multilabel":
        right_DL = np.where(true_DL, scores_DL, 1 - scores_DL).clip(least, 1 - least)
        return np.asarray(-np.log(right_DL).mean(axis=1))
    mass_DL = scores_DL.clip(min=np.finfo(np.float64).tiny)
    right_D = (mass_DL / mass_DL.sum(axis=1, keepdims=True))[true_DL]
    return np.asarray(-np.log(right_D.clip(least, 1 - least)))


def _auc(true_D: NDArray[np.bool_], scores_D: Floats) -> WeightedMetric:
    """The share of pairs of a positive and a negative document that the scores put in order; ties count half."""
    _, group_D = np.unique(scores_D, return_inverse=True)
    order = np.argsort(group_D, kind="stable")
    starts = np.flatnonzero(np.diff(group_D[order], prepend=-1))
    positive_D = true_D[order].astype(np.float64)

    def of(weights_BD: Floats) -> Floats:
        weights_BD = weights_BD[:, order]
        positive_BU = np.add.reduceat(weights_BD * positive_D, starts, axis=1)
        negative_BU = np.add.reduceat(weights_BD * (1 - positive_D), starts, axis=1)
        below_BU = negative_BU.cumsum(axis=1) - negative_BU / 2
        pairs_B = positive_BU.sum(axis=1) * negative_BU.sum(axis=1)
        return _divided((positive_BU * below_BU).sum(axis=1), pairs_B)

    return of


def _of_numbers(metric: Metric, target_D: Floats, predicted_D: Floats) -> WeightedMetric:
    error_D = predicted_D - target_D
    if metric in ("mse", "mae"):
        return _mean(error_D**2 if metric == "mse" else np.abs(error_D))
    if metric == "r2":
        return lambda weights_BD: 1 - _divided(weights_BD @ error_D**2, _variation(weights_BD, target_D[None]))

    def spearman(weights_BD: Floats) -> Floats:
        ranks = [_ranks(weights_BD, values_D) for values_D in (target_D, predicted_D)]
        first_BD, second_BD = (rank - _weighted_mean(weights_BD, rank)[:, None] for rank in ranks)
        together_B = (weights_BD * first_BD * second_BD).sum(axis=1)
        variation_B = _variation(weights_BD, ranks[0]) * _variation(weights_BD, ranks[1])
        return np.asarray(_divided(together_B, np.sqrt(variation_B)).clip(-1, 1))

    return spearman


def _ranks(weights_BD: Floats, values_D: Floats) -> Floats:
    """Of each document's value among those drawn; equal values share the mean of their ranks."""
    _, group_D = np.unique(values_D, return_inverse=True)
    order = np.argsort(group_D, kind="stable")
    starts = np.flatnonzero(np.diff(group_D[order], prepend=-1))
    count_BU = np.add.reduceat(weights_BD[:, order], starts, axis=1)
    return np.asarray((count_BU.cumsum(axis=1) - (count_BU - 1) / 2)[:, group_D])


def _weighted_mean(weights_BD: Floats, values_BD: Floats) -> Floats:
    return np.asarray((weights_BD * values_BD).sum(axis=1) / weights_BD.sum(axis=1))


def _variation(weights_BD: Floats, values_BD: Floats) -> Floats:
    """Sum of squared distances from the mean; zero where all that was drawn is the same value."""
    distance_BD = values_BD - _weighted_mean(weights_BD, values_BD)[:, None]
    is_drawn_BD = weights_BD > 0
    highest_B = np.where(is_drawn_BD, values_BD, -np.inf).max(axis=1)
    lowest_B = np.where(is_drawn_BD, values_BD, np.inf).min(axis=1)
    return np.asarray(np.where(highest_B > lowest_B, (weights_BD * distance_BD**2).sum(axis=1), 0.0))


def _divided(numerator: Floats, denominator: Floats) -> Floats:
    """NaN where there is nothing to divide by."""
    nothing: Floats = np.full(np.shape(numerator), np.nan)
    return np.divide(numerator, denominator, out=nothing, where=denominator != 0)


def _mean_defined(values_BL: Floats) -> Floats:
    """The mean over the labels where a value is defined."""
    is_defined_BL = ~np.isnan(values_BL)
    return _divided(np.where(is_defined_BL, values_BL, 0.0).sum(axis=1), is_defined_BL.sum(axis=1).astype(np.float64))
