"""Attention of one chunk on a CPU: softmax(q k') v, head by head, on the fastest matrix products there are.

Queries come scaled by log2(e) / sqrt(D), so that softmax is 2^score over its sum; 2^x is four times as fast as e^x in
PyTorch on an AMD processor (measured). No shift is needed while |score| stays within what a float's exponent holds,
which the norms of queries and keys bound (Cauchy and Schwarz): only heads beyond the bound pay for the maximum.
"""

import functools

import torch
from torch import Tensor

LARGEST_SCORE = 100.0  # as a power of two; sums of 2^100 stay below 2^127, and 2^-100 above 2^-126
LONG = 256  # tokens from which a oneDNN product per head beats MKL's batched one (measured, fp32)
MOST_ROWS = 1024  # queries at a time, so that scores of a long chunk stay in megabytes
WINDOW_ROWS = 256  # of a windowed layer, where a block of queries meets few keys
MOST_SCORES = 2**23  # numbers in a batch of heads


def score_bound(qk_S2ND: Tensor) -> Tensor:
    """The largest score that each head may have, [N], from its queries and keys; rotations do not change it."""
    largest_2N: Tensor = torch.linalg.vector_norm(qk_S2ND, dim=-1, dtype=torch.float32).amax(dim=0)
    return largest_2N[0] * largest_2N[1]


def attend(
    query_NSD: Tensor,
    key_NSD: Tensor,
    value_NSD: Tensor,
    context_NSD: Tensor,
    *,
    bound_N: Tensor,
    bias_NSS: Tensor | None = None,
    window: int | None = None,
) -> None:
    """Write the context of N heads into `context_NSD`.

    Args:
        query_NSD: scaled.
        key_NSD: in the same order of tokens.
        value_NSD: as well.
        context_NSD: any layout.
        bound_N: no score of the head is larger, bias included.
        bias_NSS: added to scores, scaled by log2(e).
        window: tokens further apart than this do not see each other; None lets all.
    """
    num_tokens = query_NSD.shape[1]
    key_NSD = key_NSD.contiguous()
    if window is None and num_tokens <= MOST_ROWS:
        _attend_block(query_NSD, key_NSD, value_NSD, context_NSD, bound_N, bias_NSS)
        return
    size = MOST_ROWS // 2 if window is None else WINDOW_ROWS
    for first in range(0, num_tokens, size):
        rows = slice(first, min(first + size, num_tokens))
        columns = slice(0, num_tokens)
        bias = None if bias_NSS is None else bias_NSS[:, rows]
        if window is not None:
            columns = slice(max(first - window, 0), min(rows.stop + window, num_tokens))
            bias = _window_bias(
                rows.stop - rows.start, columns.stop - columns.start, first - columns.start, window, query_NSD.dtype
            )[None]
        _attend_block(
            query_NSD[:, rows], key_NSD[:, columns], value_NSD[:, columns], context_NSD[:, rows], bound_N, bias
        )


def _attend_block(
    query_NQD: Tensor,
    key_NKD: Tensor,
    value_NKD: Tensor,
    context_NQD: Tensor,
    bound_N: Tensor,
    bias_NQK: Tensor | None,
) -> None:
    num_heads, num_keys = key_NKD.shape[:2]
    if query_NQD.dtype != torch.float32 or num_keys < LONG:
        step = max(1, MOST_SCORES // (query_NQD.shape[1] * num_keys))
        for first in range(0, num_heads, step):
            heads = slice(first, first + step)
            scores_NQK = torch.bmm(query_NQD[heads], key_NKD[heads].transpose(1, 2))
            if bias_NQK is not None:
                scores_NQK += bias_NQK if len(bias_NQK) == 1 else bias_NQK[heads]
            total_NQ1 = _exponentiate(scores_NQK, float(bound_N[heads].max()))
            torch.div(torch.bmm(scores_NQK, value_NKD[heads]), total_NQ1, out=context_NQD[heads])
        return
    value_NDK = value_NKD.transpose(1, 2).contiguous()
    for head, bound in enumerate(bound_N.tolist()):
        scores_QK = _product(query_NQD[head], key_NKD[head])
        if bias_NQK is not None:
            scores_QK += bias_NQK[0 if len(bias_NQK) == 1 else head]
        total_Q1 = _exponentiate(scores_QK, bound)
        torch.div(_product(scores_QK, value_NDK[head]), total_Q1, out=context_NQD[head])


def _exponentiate(scores: Tensor, bound: float) -> Tensor:
    """Replace scores by 2^score, shifted where they may be too large; returns the sum of each row."""
    if not bound <= LARGEST_SCORE:  # also where it is not a number
        scores -= scores.amax(dim=-1, keepdim=True)
    total: Tensor = scores.exp2_().sum(dim=-1, keepdim=True)
    return total


def _product(x_SD: Tensor, y_RD: Tensor) -> Tensor:
    """The product x y' by oneDNN; y must be contiguous, or it falls back to a reference kernel."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x_SD, y_RD, None, "none", [], "")  # noqa: SLF001
    return result


@functools.lru_cache(maxsize=64)
def _window_bias(num_rows: int, num_columns: int, offset: int, window: int, dtype: torch.dtype) -> Tensor:
    """Zero where tokens see each other, else minus infinity; row r stands at column r + offset."""
    distance = torch.arange(num_rows)[:, None] + offset - torch.arange(num_columns)
    return torch.zeros(num_rows, num_columns, dtype=dtype).masked_fill(distance.abs() > window, -torch.inf)
