"""Keyed dropout: which numbers a chunk loses depends on the chunk's key alone, not on who shares its mini-batch.

PyTorch draws masks from one stream of random numbers, so a chunk's mask depends on its neighbours in the mini-batch
and on everything drawn before. Here each number's fate is a hash of the chunk's key, the place in the model and the
place in the chunk. Whoever forwards the chunk again, alone, padded otherwise, on another device or after a crash,
drops the same numbers, and there is no state to keep.

`keyed` puts itself in the place of PyTorch's functions while a model runs, so any model that drops with
`torch.nn.functional.dropout` or inside `scaled_dot_product_attention` works as it is.

Shape letters: B chunks, N heads, S tokens of a chunk, R rows of a tensor (all but its last dimension).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from belt_tasks import keyed_attention
from belt_tasks.dropout_mask import dropped, mixed
from belt_tasks.errors import ConfigError


@contextmanager
def keyed(key_B: Tensor) -> Iterator[None]:
    """While the block runs, models drop by the keys of their chunks.

    Dropouts are told apart by their order, so the block holds one forward.

    Args:
        key_B: of the chunks that are forwarded, int64, on the model's device.
    """
    with _KeyedDropout(key_B):
        yield


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
        if is_causal or enable_gqa or query.dim() != 4:  # noqa: PLR2004 - [B, N, S, H]
            raise ConfigError(
                "this encoder's attention looks one way only, shares keys among heads or has no heads: belt knows no "
                "dropout for it, so fine-tune it with dropout: 0"
            )
        scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
        device = query.device.type
        if torch.is_autocast_enabled(device):
            query, key, value = (part.to(torch.get_autocast_dtype(device)) for part in (query, key, value))
        self._num_calls += 1
        key_BNS = self._row_keys(query).view(query.shape[:-1])
        return keyed_attention.attend(query * scale, key, value, attn_mask, key_BNS, dropout_p)

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
