"""Attention of packed chunks on a CPU: softmax(q k') v of each chunk and head.

Queries come scaled by log2(e) / sqrt(D), so that softmax is 2^score over its sum. `attention_cpu.c` computes it where
belt was installed with a C compiler and the processor has AVX-512; elsewhere PyTorch's products do, chunk by chunk:
same numbers in fp32, while bf16 scores are rounded on the way, and a quarter fewer tokens/s, since scores go through
memory (MiniLM on two Zen 5 cores, chunks of 512 tokens).
"""

import ctypes
import functools
import importlib.util
import logging

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

log = logging.getLogger(__name__)

Int64 = npt.NDArray[np.int64]

LARGEST_SCORE = 100.0  # as a power of two; sums of 2^100 stay below 2^127, and 2^-100 above 2^-126
MOST_ROWS = 512  # queries at a time, so that scores of a long chunk stay in megabytes
WINDOW_ROWS = 256  # of a windowed layer, where a block of queries meets few keys
MOST_SCORES = 2**23  # numbers in a batch of heads


def attend(
    query_TND: Tensor,
    key_TND: Tensor,
    value_TND: Tensor,
    num_tokens_B: Int64,
    *,
    bias_NPP: Tensor | None = None,
    largest_bias: float = 0.0,
    window: int | None = None,
) -> Tensor:
    """The context of every token, [T, N, D] in the dtype of the values.

    Args:
        query_TND: scaled, fp32 or bf16; heads of a token lie side by side, as in key and value.
        key_TND: of the same dtype.
        value_TND: as well.
        num_tokens_B: tokens of each chunk, one after the other; rows behind the last get zeros.
        bias_NPP: fp32, added to scores by position, scaled by log2(e).
        largest_bias: no number of the bias is further from zero.
        window: tokens further apart than this do not see each other; None lets all.
    """
    context_TND = torch.empty(value_TND.shape, dtype=value_TND.dtype)
    context_TND[num_tokens_B.sum() :] = 0
    kernel = load_kernel()
    if kernel is not None and uses_kernel(value_TND.shape[-1], value_TND.dtype):
        _attend_by_kernel(
            kernel,
            query_TND,
            key_TND,
            value_TND,
            context_TND,
            num_tokens_B,
            bias_NPP,
            largest_bias=largest_bias,
            window=window,
        )
        return context_TND
    first = 0
    for num_tokens in num_tokens_B.tolist():
        parts = (part[first : first + num_tokens] for part in (query_TND, key_TND, value_TND, context_TND))
        query_NSD, key_NSD, value_NSD, context_NSD = (part.transpose(0, 1) for part in parts)
        bound_N = _score_bound(query_NSD, key_NSD) + largest_bias
        bias_NSS = None if bias_NPP is None else bias_NPP[:, :num_tokens, :num_tokens]
        _attend_chunk(query_NSD, key_NSD.contiguous(), value_NSD, context_NSD, bound_N, bias_NSS, window)
        first += num_tokens
    return context_TND


def uses_kernel(head_size: int, dtype: torch.dtype) -> bool:
    """Whether the compiled kernel serves: where bf16 has matrix units of its own (AMX), PyTorch's products use them."""
    kernel = load_kernel()
    if kernel is None or (dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()):  # noqa: SLF001 - its home
        return False
    return bool(kernel.belt_can_attend(head_size, dtype == torch.bfloat16))


@functools.cache
def load_kernel() -> ctypes.CDLL | None:
    """The compiled kernel; None where belt was installed without a C compiler."""
    spec = importlib.util.find_spec("belt_tasks._attention_cpu")
    if spec is None or spec.origin is None:
        log.warning(
            "belt was installed without a C compiler: attention on this CPU takes the slower way "
            "(install gcc or clang, then belt again)"
        )
        return None
    kernel = ctypes.CDLL(spec.origin)
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    kernel.belt_can_attend.argtypes = [number, ctypes.c_int]
    kernel.belt_attend.argtypes = [
        *[pointer] * 4,
        *[number] * 4,
        pointer,
        *[number] * 4,
        pointer,
        number,
        ctypes.c_float,
        ctypes.c_int,
    ]
    return kernel


def _attend_by_kernel(
    kernel: ctypes.CDLL,
    query_TND: Tensor,
    key_TND: Tensor,
    value_TND: Tensor,
    context_TND: Tensor,
    num_tokens_B: Int64,
    bias_NPP: Tensor | None,
    *,
    largest_bias: float,
    window: int | None,
) -> None:
    parts = (query_TND, key_TND, value_TND, context_TND)
    num_heads, head_size = value_TND.shape[1:]
    num_tokens_B = np.ascontiguousarray(num_tokens_B, dtype=np.int64)
    # the kernel reads and writes where it is told to
    if any(part.shape != value_TND.shape or part.stride()[1:] != (head_size, 1) for part in parts):
        layouts = ", ".join(f"{tuple(part.shape)} by {part.stride()}" for part in parts)
        raise ValueError(f"query, key and value must have one shape, heads of a token side by side, got {layouts}")
    if num_tokens_B.sum() > len(value_TND):
        raise ValueError(f"chunks must have at most {len(value_TND):,} tokens in all, got {num_tokens_B.sum():,}")
    if bias_NPP is not None and not (bias_NPP.is_contiguous() and bias_NPP.shape[-1] >= num_tokens_B.max()):
        raise ValueError(f"bias must cover {num_tokens_B.max():,} positions, got {tuple(bias_NPP.shape)}")
    failed = kernel.belt_attend(
        *(part.data_ptr() for part in parts),
        *(part.stride(0) for part in parts),
        num_tokens_B.ctypes.data,
        len(num_tokens_B),
        num_heads,
        head_size,
        -1 if window is None else window,
        None if bias_NPP is None else bias_NPP.data_ptr(),
        0 if bias_NPP is None else bias_NPP.shape[-1],
        largest_bias,
        value_TND.dtype == torch.bfloat16,
    )
    if failed:
        raise MemoryError(f"no memory for the attention of {max(num_tokens_B):,} tokens")


def _score_bound(query_NSD: Tensor, key_NSD: Tensor) -> Tensor:
    """The largest score that each head may have, [N]: Cauchy and Schwarz."""
    query_N, key_N = (
        torch.linalg.vector_norm(part, dim=-1, dtype=torch.float32).amax(dim=1) for part in (query_NSD, key_NSD)
    )
    bound_N: Tensor = query_N * key_N
    return bound_N


def _attend_chunk(
    query_NSD: Tensor,
    key_NSD: Tensor,
    value_NSD: Tensor,
    context_NSD: Tensor,
    bound_N: Tensor,
    bias_NSS: Tensor | None,
    window: int | None,
) -> None:
    """One chunk, a block of queries at a time."""
    num_tokens = query_NSD.shape[1]
    size = MOST_ROWS if window is None else WINDOW_ROWS
    for first in range(0, num_tokens, size):
        rows = slice(first, min(first + size, num_tokens))
        columns = slice(0, num_tokens)
        bias = None if bias_NSS is None else bias_NSS[:, rows]
        if window is not None:
            columns = slice(max(first - window, 0), min(rows.stop + window, num_tokens))
            near = _window_bias(rows.stop - rows.start, columns.stop - columns.start, first - columns.start, window)
            bias = near[None] if bias is None else bias[:, :, columns] + near
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
    """As many heads at a time as keep their scores within megabytes."""
    num_heads, num_keys = key_NKD.shape[:2]
    step = max(1, MOST_SCORES // (query_NQD.shape[1] * num_keys))
    for first in range(0, num_heads, step):
        heads = slice(first, first + step)
        weights_NQK = torch.bmm(query_NQD[heads], key_NKD[heads].transpose(1, 2))
        if bias_NQK is not None:
            weights_NQK += bias_NQK if len(bias_NQK) == 1 else bias_NQK[heads]
        if not float(bound_N[heads].max()) <= LARGEST_SCORE:  # also where it is not a number
            weights_NQK -= weights_NQK.amax(dim=-1, keepdim=True)
        total_NQ1 = weights_NQK.exp2_().sum(dim=-1, keepdim=True)
        torch.div(torch.bmm(weights_NQK, value_NKD[heads]), total_NQ1, out=context_NQD[heads])


@functools.lru_cache(maxsize=64)
def _window_bias(num_rows: int, num_columns: int, offset: int, window: int) -> Tensor:
    """Zero where tokens see each other, else minus infinity; row r stands at column r + offset."""
    distance = torch.arange(num_rows)[:, None] + offset - torch.arange(num_columns)
    return torch.zeros(num_rows, num_columns).masked_fill(distance.abs() > window, -torch.inf)
