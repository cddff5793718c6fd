"""Pooling: C chunk outputs become D document outputs. One definition, differentiable, for training and scoring.

Mean and max are BELT's. `length_weighted_mean` weighs a chunk by the tokens that no earlier chunk covers, so that
overlap does not count the tail twice. `attention` weighs chunks by a learned score, softmaxed over the document
(the idea of Sun et al. 2019, arXiv 1905.05583, section 5.3.1; Yang et al. 2016). In `probabilities` space chunk
probabilities are pooled; the result is returned as logits whose probabilities are the pooled ones, computed from
log-probabilities so that nothing under- or overflows.
"""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

from belt_tasks.specs import PoolingSpec, TaskKind


def pool_chunks(
    outputs_CK: Tensor,
    doc_of_chunk_C: Tensor,
    new_tokens_C: Tensor,
    *,
    num_documents: int,
    spec: PoolingSpec,
    task: TaskKind,
) -> Tensor:
    """Pool each document's chunk outputs into one row of logits.

    Args:
        outputs_CK: float; L logits per chunk, and with attention pooling a last column of attention scores.
        doc_of_chunk_C: int64, ascending; every document 0 .. num_documents - 1 has at least one chunk.
        new_tokens_C: tokens of each chunk that no earlier chunk of its document covers.
        num_documents: D.
        spec: strategy and space.
        task: decides what a probability is: softmax for multiclass, sigmoid for binary and multilabel, and for
            regression there is none, so both spaces are the same.

    Returns:
        Pooled logits, [D, L].
    """
    logits_CL = outputs_CK[:, :-1] if spec.pooling_strategy == "attention" else outputs_CK
    if spec.pooling_strategy == "max":
        # probabilities of one label rise with its logit, so only softmax makes the two spaces differ
        softmaxed = spec.pooling_space == "probabilities" and task == "multiclass"
        return _segment_max(log_softmax(logits_CL, dim=-1) if softmaxed else logits_CL, doc_of_chunk_C, num_documents)
    weight_C1 = _weights(outputs_CK, doc_of_chunk_C, new_tokens_C, num_documents, spec)[:, None]
    if spec.pooling_space == "logits" or task == "regression":
        return _segment_sum(weight_C1 * logits_CL, doc_of_chunk_C, num_documents)
    if task == "multiclass":
        return _log_segment_mean(log_softmax(logits_CL, dim=-1), weight_C1, doc_of_chunk_C, num_documents)
    log_odds = _log_segment_mean(logsigmoid(logits_CL), weight_C1, doc_of_chunk_C, num_documents)
    return log_odds - _log_segment_mean(logsigmoid(-logits_CL), weight_C1, doc_of_chunk_C, num_documents)


def contributions(
    outputs_CK: Tensor,
    pooled_C: Tensor,
    value_C: Tensor,
    doc_of_chunk_C: Tensor,
    new_tokens_C: Tensor,
    *,
    num_documents: int,
    spec: PoolingSpec,
) -> Tensor:
    """What each chunk adds to what is pooled of some value: over a document, contributions add up to it.

    A mean adds weight times value. A maximum is its first winner's value, to which the others add nothing.

    Args:
        outputs_CK: as `pool_chunks` takes them.
        pooled_C: what is pooled of each chunk; decides which one wins.
        value_C: what is told of each chunk, in the pooling's space.
        doc_of_chunk_C: as `pool_chunks` takes it.
        new_tokens_C: as `pool_chunks` takes it.
        num_documents: D.
        spec: strategy and space.

    Returns:
        float64 [C].
    """
    if spec.pooling_strategy == "max":
        winner_D = winning_chunk(pooled_C, doc_of_chunk_C, num_documents)
        return torch.zeros_like(value_C).index_copy(0, winner_D, value_C[winner_D])
    return _weights(outputs_CK.double(), doc_of_chunk_C, new_tokens_C, num_documents, spec) * value_C


def winning_chunk(values_C: Tensor, doc_of_chunk_C: Tensor, num_documents: int) -> Tensor:
    """The row of each document's largest value, the first of equals: int64 [D]."""
    return _segment_argmax(values_C[:, None], doc_of_chunk_C, num_documents)[:, 0]


def _weights(
    outputs_CK: Tensor, doc_of_chunk_C: Tensor, new_tokens_C: Tensor, num_documents: int, spec: PoolingSpec
) -> Tensor:
    """Weights that sum to one over each document."""
    if spec.pooling_strategy == "attention":
        score_C1 = outputs_CK[:, -1:]
        largest_C1 = _segment_max(score_C1.detach(), doc_of_chunk_C, num_documents)[doc_of_chunk_C]
        raw_C1 = torch.exp(score_C1 - largest_C1)
    elif spec.pooling_strategy == "length_weighted_mean":
        raw_C1 = new_tokens_C.to(outputs_CK)[:, None]
    else:
        raw_C1 = torch.ones_like(outputs_CK[:, :1])
    total_C1 = _segment_sum(raw_C1, doc_of_chunk_C, num_documents)[doc_of_chunk_C]
    # an empty document has one chunk without tokens: it weighs everything
    return torch.where(total_C1 > 0, raw_C1 / total_C1.clamp_min(torch.finfo(raw_C1.dtype).tiny), 1.0)[:, 0]


def _segment_sum(values_CL: Tensor, doc_of_chunk_C: Tensor, num_documents: int) -> Tensor:
    zeros_DL = values_CL.new_zeros((num_documents, values_CL.shape[1]))
    return zeros_DL.index_add(0, doc_of_chunk_C, values_CL)


def _segment_argmax(values_CL: Tensor, doc_of_chunk_C: Tensor, num_documents: int) -> Tensor:
    index_CL = doc_of_chunk_C[:, None].expand_as(values_CL)
    smallest_DL = values_CL.new_full((num_documents, values_CL.shape[1]), -torch.inf)
    largest_DL = smallest_DL.scatter_reduce(0, index_CL, values_CL.detach(), "amax")
    row_CL = torch.arange(len(values_CL), device=values_CL.device)[:, None].expand_as(values_CL)
    loses_CL = values_CL.detach() < largest_DL[doc_of_chunk_C]
    beyond = len(values_CL)
    rows_DL = torch.full_like(largest_DL, beyond, dtype=torch.int64)
    return rows_DL.scatter_reduce(0, index_CL, row_CL.masked_fill(loses_CL, beyond), "amin")


def _segment_max(values_CL: Tensor, doc_of_chunk_C: Tensor, num_documents: int) -> Tensor:
    """Like `torch.max(dim=0)` per document: the gradient goes to one winner, never to several equals."""
    return values_CL.gather(0, _segment_argmax(values_CL, doc_of_chunk_C, num_documents))


def _log_segment_mean(log_values_CL: Tensor, weight_C1: Tensor, doc_of_chunk_C: Tensor, num_documents: int) -> Tensor:
    """log(sum of weight * exp(log_value)) per document, shifted by the largest value so that exp stays in range."""
    largest_DL = _segment_max(log_values_CL.detach(), doc_of_chunk_C, num_documents)
    shifted_CL = torch.exp(log_values_CL - largest_DL[doc_of_chunk_C])
    return torch.log(_segment_sum(weight_C1 * shifted_CL, doc_of_chunk_C, num_documents)) + largest_DL
