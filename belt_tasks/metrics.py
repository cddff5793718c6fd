"""Metrics: how good scores are, given what is true. Pure functions of arrays with JSON-ready answers.

Knows nothing about files, models or plots. A value that has no definition for the given documents (AUC where
one class occurs, R2 of a constant target) is None: never NaN, never a stand-in zero, never a warning.
Precision is undefined for a label that is never predicted, recall for one that never occurs, F1 for one that
does neither; a macro average is over the labels where the value is defined.

Shape letters: D documents, L labels, N decisions (documents, or pairs of document and label), B bins.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from belt_tasks.errors import ConfigError
from belt_tasks.specs import TaskKind

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Counts = NDArray[np.int64]
Decisions = tuple[Floats, Bools]  # how sure of each, and whether it is correct
Metrics = dict[str, Any]

ROUNDING = 1e-3  # how far outside [0, 1] half precision may push a probability; logits lie further off
IN_WORDS = {
    "accuracy": "accuracy",
    "majority_baseline_accuracy": "accuracy of always guessing the commonest label",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "subset_accuracy": "subset accuracy",
    "auc": "AUC",
    "log_loss": "log loss",
    "ece": "expected calibration error",
    "mse": "mean squared error",
    "mae": "mean absolute error",
    "r2": "R2",
    "spearman": "Spearman's correlation",
}
"""What people read of a task's metrics, in the order in which it is shown."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReliabilityBins:
    """Decisions grouped by confidence into bins (edges[b], edges[b + 1]]; the first also holds zero."""

    edges: Floats
    """Borders of the bins, B + 1 of them."""
    num_decisions: Counts
    """How many decisions fall into each bin."""
    confidence: Floats
    """Mean confidence of a bin's decisions; zero in an empty bin."""
    accuracy: Floats
    """Share of a bin's decisions that are correct; zero in an empty bin."""

    @property
    def calibration_error(self) -> float:
        """Mean distance of accuracy and confidence, each bin weighted by its decisions."""
        gap_B = np.abs(self.accuracy - self.confidence)
        return min(1.0, float(gap_B @ self.num_decisions / self.num_decisions.sum()))


def task_metrics(
    task: TaskKind, target: ArrayLike, scores: ArrayLike, labels: Sequence[str], threshold: float = 0.5
) -> Metrics:
    """Compute the metrics of a task; `labels` and `threshold` are read only where the task has them.

    Scores are [D, L] in every task: of a regression, one column of predicted values.
    """
    match task:
        case "binary" | "multiclass":
            return classification_metrics(target, scores, labels)
        case "multilabel":
            return multilabel_metrics(target, scores, labels, threshold)
        case "regression":
            return regression_metrics(target, np.asarray(scores)[:, 0])


def classification_metrics(target_D: ArrayLike, scores_DL: ArrayLike, labels: Sequence[str]) -> Metrics:
    """Compare each document's class with probabilities of all classes; two classes are negative, positive.

    Rows that do not sum to one are renormalised for the log loss; AUC and calibration see them as they are.
    AUC is of the positive class for two classes, else the mean of one-vs-rest over the classes that occur.
    """
    from sklearn.metrics import log_loss  # noqa: PLC0415 - half a second of every command

    target_D, scores_DL = _checked_classes(target_D, scores_DL)
    num_documents, num_labels = scores_DL.shape
    confusion_LL = np.zeros((num_labels, num_labels), dtype=np.int64)
    np.add.at(confusion_LL, (target_D, scores_DL.argmax(axis=1)), 1)
    hits_L, true_L = confusion_LL.diagonal(), confusion_LL.sum(axis=1)
    per_class = _per_class(labels, hits_L, true_L, confusion_LL.sum(axis=0))
    ranked = [1] if num_labels == 2 else range(num_labels)  # noqa: PLR2004  # two classes: the positive one
    mass_DL = scores_DL.clip(min=np.finfo(np.float64).tiny)  # a row of zeros becomes uniform
    probability_DL = mass_DL / mass_DL.sum(axis=1, keepdims=True)
    return {
        "num_documents": num_documents,
        "accuracy": float(hits_L.sum() / num_documents),
        "majority_baseline_accuracy": float(true_L.max() / num_documents),
        "macro_f1": _mean_defined(row["f1"] for row in per_class),
        "auc": _mean_defined(_auc(target_D == i, scores_DL[:, i]) for i in ranked),
        "log_loss": float(log_loss(target_D, probability_DL, labels=np.arange(num_labels))),
        "ece": expected_calibration_error(*class_decisions(target_D, scores_DL)),
        "per_class": per_class,
        "confusion_matrix": confusion_LL.tolist(),  # rows are true, columns predicted
    }


def multilabel_metrics(
    target_DL: ArrayLike, scores_DL: ArrayLike, labels: Sequence[str], threshold: float = 0.5
) -> Metrics:
    """Compare each document's labels with a probability of each; one at the threshold is predicted."""
    from sklearn.metrics import log_loss  # noqa: PLC0415 - half a second of every command

    scores_DL = _checked_scores("scores_DL", scores_DL, num_dimensions=2)
    target_DL = _checked_bools("target_DL", target_DL, like=scores_DL)
    decisions = label_decisions(target_DL, scores_DL, threshold)  # also checks the threshold
    predicted_DL = scores_DL >= threshold
    hits_L = (target_DL & predicted_DL).sum(axis=0)
    true_L, predicted_L = target_DL.sum(axis=0), predicted_DL.sum(axis=0)
    per_class = _per_class(labels, hits_L, true_L, predicted_L)
    return {
        "num_documents": len(scores_DL),
        "micro_f1": _ratio(2 * hits_L.sum(), true_L.sum() + predicted_L.sum()),
        "macro_f1": _mean_defined(row["f1"] for row in per_class),
        "subset_accuracy": float((target_DL == predicted_DL).all(axis=1).mean()),
        "auc": _mean_defined(_auc(target_DL[:, i], scores_DL[:, i]) for i in range(len(labels))),
        "log_loss": float(log_loss(target_DL.ravel(), scores_DL.ravel(), labels=[False, True])),
        "ece": expected_calibration_error(*decisions),
        "per_class": per_class,
    }


def regression_metrics(target_D: ArrayLike, predicted_D: ArrayLike) -> Metrics:
    """Compare numbers; R2 and Spearman need a target that varies, Spearman predictions that vary too."""
    from scipy.stats import rankdata  # noqa: PLC0415 - half a second of every command

    target_D = _checked_numbers("target_D", target_D, num_dimensions=1)
    predicted_D = _checked_numbers("predicted_D", predicted_D, num_dimensions=1)
    if predicted_D.shape != target_D.shape:
        raise ConfigError(f"predicted_D must have target_D's {len(target_D)} values, got {len(predicted_D)}")
    ranks = [rankdata(target_D), rankdata(predicted_D)]
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # what overflows is reported as None
        error_D = predicted_D - target_D
        mse, variance = np.mean(error_D**2), np.var(target_D)
        target_varies = np.ptp(target_D) > 0
        both_vary = target_varies and np.ptp(predicted_D) > 0
        return {
            "num_documents": len(target_D),
            "mse": _finite(mse),
            "mae": _finite(np.mean(np.abs(error_D))),
            "r2": _finite(1 - mse / variance) if target_varies and variance > 0 else None,
            "spearman": _finite(np.corrcoef(ranks)[0, 1].clip(-1, 1)) if both_vary else None,
        }


def expected_calibration_error(confidence_N: ArrayLike, correct_N: ArrayLike, num_bins: int = 15) -> float:
    """Mean distance between how sure decisions are and how often they are correct, over bins of equal width.

    Guo et al. 2017, On Calibration of Modern Neural Networks, equation 3: https://arxiv.org/abs/1706.04599.
    """
    return reliability_bins(confidence_N, correct_N, num_bins).calibration_error


def reliability_bins(confidence_N: ArrayLike, correct_N: ArrayLike, num_bins: int = 15) -> ReliabilityBins:
    """Group decisions by confidence into bins of equal width between zero and one."""
    confidence_N = _checked_scores("confidence_N", confidence_N, num_dimensions=1)
    correct_N = _checked_bools("correct_N", correct_N, like=confidence_N)
    if num_bins < 1:
        raise ConfigError(f"num_bins must be at least 1, got {num_bins}")
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    bin_N = np.searchsorted(edges[1:-1], confidence_N, side="left")
    num_decisions_B = np.bincount(bin_N, minlength=num_bins)
    divisor_B = num_decisions_B.clip(min=1)
    return ReliabilityBins(
        edges=edges,
        num_decisions=num_decisions_B,
        confidence=np.bincount(bin_N, weights=confidence_N, minlength=num_bins) / divisor_B,
        accuracy=np.bincount(bin_N, weights=correct_N, minlength=num_bins) / divisor_B,
    )


def class_decisions(target_D: ArrayLike, scores_DL: ArrayLike) -> Decisions:
    """Confidence and correctness of each document's most probable class."""
    target_D, scores_DL = _checked_classes(target_D, scores_DL)
    return scores_DL.max(axis=1), scores_DL.argmax(axis=1) == target_D


def label_decisions(target_DL: ArrayLike, scores_DL: ArrayLike, threshold: float = 0.5) -> Decisions:
    """Confidence and correctness of each yes or no; that of a no is one minus the label's score."""
    scores_DL = _checked_scores("scores_DL", scores_DL, num_dimensions=2)
    target_DL = _checked_bools("target_DL", target_DL, like=scores_DL)
    if not 0 <= threshold <= 1:
        raise ConfigError(f"threshold must be between 0 and 1, got {threshold}")
    predicted_DL = scores_DL >= threshold
    return np.where(predicted_DL, scores_DL, 1 - scores_DL).ravel(), (predicted_DL == target_DL).ravel()


def _per_class(labels: Sequence[str], hits_L: Counts, true_L: Counts, predicted_L: Counts) -> list[Metrics]:
    if len(labels) != len(true_L):
        raise ConfigError(f"labels must name {len(true_L)} columns of scores_DL, got {len(labels)} names")
    return [
        {
            "label": label,
            "num_documents": int(num_true),
            "precision": _ratio(num_hits, num_predicted),
            "recall": _ratio(num_hits, num_true),
            "f1": _ratio(2 * num_hits, num_true + num_predicted),
        }
        for label, num_hits, num_true, num_predicted in zip(labels, hits_L, true_L, predicted_L, strict=True)
    ]


def _auc(is_positive_D: Bools, scores_D: Floats) -> float | None:
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415 - half a second of every command

    both_occur = is_positive_D.any() and not is_positive_D.all()
    return float(roc_auc_score(is_positive_D, scores_D)) if both_occur else None


def _ratio(numerator: float, denominator: float) -> float | None:
    return None if denominator == 0 else float(numerator / denominator)


def _finite(value: np.floating[Any]) -> float | None:
    return float(value) if np.isfinite(value) else None


def _mean_defined(values: Iterable[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def _checked_classes(target_D: ArrayLike, scores_DL: ArrayLike) -> tuple[NDArray[np.int64], Floats]:
    scores_DL, target_D = _checked_scores("scores_DL", scores_DL, num_dimensions=2), np.asarray(target_D)
    num_documents, num_labels = scores_DL.shape
    if num_labels == 1:
        raise ConfigError("scores_DL must have a column per class (two: negative, positive), got 1 column")
    if target_D.shape != (num_documents,) or not np.issubdtype(target_D.dtype, np.integer):
        got = f"{target_D.dtype} of {target_D.shape}"
        raise ConfigError(f"target_D must be integers of shape ({num_documents},), got {got}")
    outside = np.flatnonzero((target_D < 0) | (target_D >= num_labels))
    if len(outside):
        got = f"{len(outside)} other values (row {outside[0]}: {target_D[outside[0]]})"
        raise ConfigError(f"target_D must be between 0 and {num_labels - 1}, got {got}")
    return target_D.astype(np.int64), scores_DL


def _checked_scores(name: str, value: ArrayLike, num_dimensions: int) -> Floats:
    scores = _checked_numbers(name, value, num_dimensions)
    outside = scores[(scores < -ROUNDING) | (scores > 1 + ROUNDING)]
    if outside.size:
        got = f"{outside.size} other values (first: {outside[0]:g})"
        raise ConfigError(f"{name} must be probabilities between 0 and 1, got {got}")
    return scores.clip(0.0, 1.0)


def _checked_numbers(name: str, value: ArrayLike, num_dimensions: int) -> Floats:
    numbers = np.asarray(value, dtype=np.float64)
    if numbers.ndim != num_dimensions or numbers.size == 0:
        raise ConfigError(f"{name} must have {num_dimensions} dimension(s) and rows, got {numbers.shape}")
    if num_bad := np.count_nonzero(~np.isfinite(numbers)):
        raise ConfigError(f"{name} must be finite, got {num_bad} of {numbers.size} values that are not")
    return numbers


def _checked_bools(name: str, value: ArrayLike, like: Floats) -> Bools:
    bools = np.asarray(value)
    if bools.dtype != np.bool_ or bools.shape != like.shape:
        raise ConfigError(f"{name} must be bool of shape {like.shape}, got {bools.dtype} of {bools.shape}")
    return bools
