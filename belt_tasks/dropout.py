"""Keyed dropout: which numbers a chunk loses depends on the chunk's key alone, not on who shares its mini-batch.

PyTorch draws masks from one stream of random numbers, so a chunk's mask depends on its neighbours in the mini-batch
and on everything drawn before. Here each number's fate is a hash of the chunk's key, the place in the model and the
place in the chunk. Whoever forwards the chunk again, alone, padded otherwise, on another device or after a crash,
drops the same numbers, and there is no state to keep. Random bits by counting instead of by a stream: Salmon et al.
2011, Parallel random numbers: as easy as 1, 2, 3; the mixing is multiply-and-shift hashing.

`keyed` puts itself in the place of PyTorch's functions while a model runs, so any model that drops with
`torch.nn.functional.dropout` or inside `scaled_dot_product_attention` works as it is.

Shape letters: B chunks, N heads, S tokens of a chunk, R rows of a tensor (all but its last dimension).
"""

import ctypes
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from belt_tasks.errors import ConfigError

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as int64, whose products wrap
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
_PLACE, _LOW, _HIGH = 0x9E3779B9 - 2**32, 0x21F0AAAD, 0x735A2D97  # as int32


@contextmanager
def keyed(key_B: Tensor) -> Iterator[None]:
    """While the block runs, models drop by the keys of their chunks.

    Dropouts are told apart by their order, so the block holds one forward.

    Args:
        key_B: of the chunks that are forwarded, int64, on the model's device.
    """
    with _KeyedDropout(key_B):
        yield


def mixed(*parts: Tensor | int) -> Tensor:
    """One int64 from several, by SplitMix64's finish after each (Steele et al. 2014); tensors broadcast."""
    found = torch.zeros((), dtype=torch.int64)
    for part in parts:
        found = (found.to(part.device) if isinstance(part, Tensor) else found) * 31 + part + _GOLDEN
        found = (found ^ _shifted(found, 30)) * _FIRST
        found = (found ^ _shifted(found, 27)) * _SECOND
        found = found ^ _shifted(found, 31)
    return found


class _KeyedDropout(TorchFunctionMode):
    """Stands in for dropout; every other function goes on to PyTorch."""

    def __init__(self, key_B: Tensor) -> None:
        super().__init__()
        self._key_B = key_B
        self._num_calls = 0

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the function returns
        kwargs = kwargs or {}
        if function is functional.dropout:
            return self._dropout(*args, **kwargs)
        if function is functional.scaled_dot_product_attention and _dropout_p(args, kwargs) > 0.0:
            return self._attention(*args, **kwargs)
        return function(*args, **kwargs)

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002, ARG002, FBT001, FBT002 - PyTorch's interface
        if not training or p == 0.0:
            return input
        self._num_calls += 1
        return _Drop.apply(input, self._row_keys(input), p)  # type: ignore[no-any-return, no-untyped-call]

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,  # noqa: FBT001, FBT002 - PyTorch's interface
        scale: float | None = None,
        enable_gqa: bool = False,  # noqa: FBT001, FBT002
    ) -> Tensor:
        if is_causal or enable_gqa:
            raise ConfigError(
                "this encoder's attention looks one way only, or shares keys among heads, where belt knows no dropout: "
                "fine-tune it with dropout: 0"
            )
        scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
        score_BNSS = (query * scale) @ key.transpose(-2, -1)
        if attn_mask is not None:
            least = torch.finfo(score_BNSS.dtype).min  # not infinite: a padded token may see no token at all
            if attn_mask.dtype == torch.bool:
                score_BNSS = score_BNSS.masked_fill(~attn_mask, least)
            else:
                score_BNSS = score_BNSS + attn_mask.clamp_min(least)
        return self._dropout(torch.softmax(score_BNSS, dim=-1), dropout_p) @ value

    def _row_keys(self, values: Tensor) -> Tensor:
        """Keys of a tensor's rows, int64 [R]: of the chunk, of this dropout, and of the place in the chunk.

        A tensor without a row for each chunk, as of positions that all share, has one key for all.
        """
        rows = values.shape[:-1]
        is_per_chunk = len(rows) > 0 and rows[0] == len(self._key_B)
        found = mixed(self._key_B if is_per_chunk else torch.zeros_like(self._key_B[:1]), self._num_calls)
        for size in rows[1:] if is_per_chunk else rows:
            found = mixed(found[..., None], torch.arange(size, device=found.device))
        return found.expand((1, *rows) if not is_per_chunk else rows).reshape(-1)


def _dropout_p(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    position = 4  # of scaled_dot_product_attention's dropout_p
    return float(args[position] if len(args) > position else kwargs.get("dropout_p", 0.0))


class _Drop(torch.autograd.Function):
    """Zero some numbers and scale the others; the mask is made again for the gradient instead of kept."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, key_R: Tensor, p: float) -> Tensor:  # noqa: ANN401 - autograd's
        ctx.save_for_backward(key_R)
        ctx.p = p
        return dropped(values, key_R, p)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401 - autograd's
        (key_R,) = ctx.saved_tensors
        return dropped(gradients[0], key_R, ctx.p), None, None


def dropped(values: Tensor, key_R: Tensor, p: float) -> Tensor:
    """Numbers divided by 1 - p, or zero with probability p.

    Args:
        values: any float dtype; R is the product of all its dimensions but the last.
        key_R: of its rows, int64.
        p: from 0 to 1.
    """
    scale, threshold = 1.0 / (1.0 - p), min(round(p * 2**32), 2**32 - 1)
    kernel = _load_kernel() if values.device.type == "cpu" else None
    values = values.contiguous()
    size = values.shape[-1]
    if kernel is None:
        is_kept = (_bits(key_R, size) >= threshold - 2**31).view(values.shape)
        kept: Tensor = values * scale * is_kept
        return kept
    key_R = key_R.contiguous()
    if values.dtype == torch.float32:
        output = torch.empty_like(values)
        kernel.belt_drop(
            values.data_ptr(), output.data_ptr(), key_R.data_ptr(), len(key_R), size, threshold, ctypes.c_float(scale)
        )
        return output
    mask = torch.empty(values.shape, dtype=torch.bool)
    kernel.belt_keep(mask.data_ptr(), key_R.data_ptr(), len(key_R), size, threshold)
    return values * scale * mask


def _bits(key_R: Tensor, size: int) -> Tensor:
    """32 bits of each number, as int32 whose order is that of the unsigned number less 2^31: [R, size]."""
    low_R1 = key_R.to(torch.int32)[:, None]
    high_R1 = (key_R >> 32).to(torch.int32)[:, None]
    bits = low_R1 + torch.arange(size, dtype=torch.int32, device=key_R.device) * _PLACE
    bits = (bits ^ (bits >> 16 & 0xFFFF)) * _LOW ^ high_R1
    bits = (bits ^ (bits >> 15 & 0x1FFFF)) * _HIGH
    return torch.bitwise_xor(bits ^ (bits >> 15 & 0x1FFFF), -(2**31))


def _shifted(values: Tensor, by: int) -> Tensor:
    """Shifted right as if it were unsigned."""
    return torch.bitwise_and(torch.bitwise_right_shift(values, by), 2 ** (64 - by) - 1)


@functools.cache
def _load_kernel() -> ctypes.CDLL | None:
    """The compiled kernel; None where belt was installed without a C compiler."""
    spec = importlib.util.find_spec("belt_tasks._dropout_cpu")
    if spec is None or spec.origin is None:
        return None
    kernel = ctypes.CDLL(spec.origin)
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    kernel.belt_drop.argtypes = [pointer, pointer, pointer, number, number, ctypes.c_uint32, ctypes.c_float]
    kernel.belt_keep.argtypes = [pointer, pointer, number, number, ctypes.c_uint32]
    return kernel
