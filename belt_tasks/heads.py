"""Heads: what the logits of a document mean. Probabilities and losses of the four tasks."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, logsigmoid, mse_loss

from belt_tasks.specs import Head


def scores(logits_DL: Tensor, head: Head) -> Tensor:
    """Probabilities of each label, [D, len(labels)]; of regression the predicted values."""
    match head.task:
        case "binary":
            return torch.cat([torch.sigmoid(-logits_DL), torch.sigmoid(logits_DL)], dim=1)
        case "multiclass":
            return torch.softmax(logits_DL, dim=1)
        case "multilabel":
            return torch.sigmoid(logits_DL)
        case "regression":
            return logits_DL


def log_scores(logits_CL: Tensor, head: Head) -> Tensor:
    """Logarithms of `scores` (regression: the values), safe where a probability underflows; [C, len(labels)]."""
    match head.task:
        case "binary":
            return logsigmoid(torch.cat([-logits_CL, logits_CL], dim=1))
        case "multiclass":
            return torch.log_softmax(logits_CL, dim=1)
        case "multilabel":
            return logsigmoid(logits_CL)
        case "regression":
            return logits_CL


def losses(logits_DL: Tensor, target: Tensor, head: Head, label_weight_L: Tensor | None = None) -> Tensor:
    """The loss of each document, [D]: cross entropy, or squared error for regression.

    Args:
        logits_DL: pooled logits.
        target: int64 [D] positions in `head.labels` (binary, multiclass), bool [D, L] (multilabel) or
            float [D] (regression).
        head: task and labels.
        label_weight_L: of documents by their label (binary, multiclass; one for each label), or of the documents that
            carry a label against those that do not (multilabel); not of regression. None is 1.
    """
    match head.task:
        case "binary":
            loss_D = binary_cross_entropy_with_logits(logits_DL[:, 0], target.to(logits_DL.dtype), reduction="none")
            return loss_D if label_weight_L is None else loss_D * label_weight_L[target]
        case "multiclass":
            loss_D = cross_entropy(logits_DL, target, reduction="none")
            return loss_D if label_weight_L is None else loss_D * label_weight_L[target]
        case "multilabel":
            return binary_cross_entropy_with_logits(
                logits_DL, target.to(logits_DL.dtype), pos_weight=label_weight_L, reduction="none"
            ).mean(dim=1)
        case "regression":
            return mse_loss(logits_DL[:, 0], target.to(logits_DL.dtype), reduction="none")
