"""The packed forward on a CPU: an encoder's chunks one after the other, without padding, on oneDNN's matrix products.

What makes it faster than the module it stands for, with the same result:

- weights are reordered once for oneDNN, whose fp32 products are twice as fast as MKL's on an AMD processor; query, key
  and value are one product; bias, GELU and residual are added inside the products;
- in the last layer only the first token's row is computed, and keys and values are never formed: a query can be
  carried over to the inputs, q (W x) = (W' q) x, and so can a weighted sum, sum p (W x) = W (sum p x);
- the key's bias adds a constant to a row of scores, which softmax does not see, and the value's bias passes through it
  unchanged into the output's bias: neither is computed.

The operators are private to PyTorch: `supported` asks for them, and whoever uses this module checks it against the
plain forward first.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from belt_tasks.attention_cpu import attend
from belt_tasks.batches import MiniBatch
from belt_tasks.families import Affine, EncoderWeights, Layer

Int64 = npt.NDArray[np.int64]

PACKED_ROWS = 2048  # a hint of how many rows a product will have
ROW_STEP = 16  # products have a multiple of so many rows: oneDNN makes a kernel of 300 KiB for each number of them


def supported(dtype: torch.dtype) -> bool:
    """Whether this PyTorch has the operators, and this processor the instructions that make them fast."""
    has_operators = (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )
    return has_operators and (dtype == torch.float32 or has_bf16())


def has_bf16() -> bool:
    """Whether the processor multiplies bf16 numbers itself (avx512_bf16 or AMX); elsewhere bf16 is slower than fp32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())  # noqa: SLF001 - its home


class PackedCpuForward:
    """First tokens of packed chunks, in fp32 or bf16, on the CPU."""

    def __init__(self, weights: EncoderWeights, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._eps = weights.eps
        self._num_heads = weights.num_heads
        self._word_VH, self._position_PH = weights.word_VH, weights.position_PH
        self._embedding_norm = weights.embedding_norm
        bias_NPP = weights.position_bias_NPP
        self._bias_NPP = None if bias_NPP is None else (bias_NPP * math.log2(math.e)).float().contiguous()
        self._largest_bias = 0.0 if bias_NPP is None else float(bias_NPP.abs().max()) * math.log2(math.e)
        *inner, last = weights.layers
        self._layers = [_PackedLayer(layer, weights.num_heads, dtype) for layer in inner]
        self._last = _LastLayer(last, weights.num_heads, dtype)

    def first_tokens(self, batch: MiniBatch) -> Tensor:
        """The last hidden state of each chunk's first token, float32 [B, H]."""
        num_tokens_B = torch.from_numpy(batch.num_tokens_B)
        first_B = num_tokens_B.cumsum(0) - num_tokens_B
        position_T = torch.arange(len(batch.input_ids_T)) - first_B.repeat_interleave(num_tokens_B)
        x_TH = self._norm(self._word_VH[batch.input_ids_T] + self._position_PH[position_T], self._embedding_norm)
        x_TH = round_rows(x_TH.to(self.dtype))
        for layer in self._layers:
            x_TH = self._inner_layer(x_TH, batch.num_tokens_B, layer)
        return self._last_layer(x_TH, first_B, batch.num_tokens_B.tolist()).float()

    def _inner_layer(self, x_TH: Tensor, num_tokens_B: Int64, layer: "_PackedLayer") -> Tensor:
        query_TND, key_TND, value_TND = layer.qkv(x_TH).view(len(x_TH), 3, self._num_heads, -1).unbind(1)
        context_TND = attend(
            query_TND, key_TND, value_TND, num_tokens_B, bias_NPP=self._bias_NPP, largest_bias=self._largest_bias
        )
        x_TH = self._norm(layer.output.add_to(x_TH, context_TND.flatten(1)), layer.output_norm)
        return self._norm(layer.projection.add_to(x_TH, layer.feed_forward(x_TH)), layer.projection_norm)

    def _last_layer(self, x_TH: Tensor, first_B: Tensor, lengths: list[int]) -> Tensor:
        layer = self._last
        x_BH = round_rows(x_TH[first_B])
        query_BND = layer.query(x_BH)[: len(lengths)].float().view(len(lengths), self._num_heads, -1)
        # the query as it meets the inputs, before any key is formed
        query_BNH = torch.einsum("bnd,ndh->bnh", query_BND, layer.key_NDH)
        # few and small products, each of another shape: in fp32, which makes no kernel for every one
        x_TH = x_TH.float()
        seen_BNH = torch.empty_like(query_BNH)
        first = 0
        for chunk, length in enumerate(lengths):
            x_SH = x_TH[first : first + length]
            scores_NS = query_BNH[chunk] @ x_SH.T
            if self._bias_NPP is not None:
                scores_NS += self._bias_NPP[:, 0, :length]
            torch.mm(torch.softmax(scores_NS * math.log(2.0), dim=-1), x_SH, out=seen_BNH[chunk])
            first += length
        context_BH = torch.einsum("bnh,ndh->bnd", seen_BNH, layer.value_NDH).flatten(1).to(self.dtype)
        x_BH = self._norm(layer.output.add_to(x_BH, round_rows(context_BH)), layer.output_norm)
        x_BH = self._norm(layer.projection.add_to(x_BH, layer.feed_forward(x_BH)), layer.projection_norm)
        return x_BH[: len(lengths)]

    def _norm(self, x_TH: Tensor, norm: Affine) -> Tensor:
        return torch.layer_norm(x_TH, norm.weight.shape, norm.weight, norm.bias, self._eps)


class PackedLinear:
    """A linear map in oneDNN's own layout, with what follows it."""

    def __init__(self, affine: Affine, dtype: torch.dtype, *, then: str = "none") -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(  # noqa: SLF001 - see the module's docstring
            affine.weight.to(dtype).contiguous(), PACKED_ROWS
        )
        self._bias = affine.bias.to(dtype).contiguous()
        self._then = then

    def __call__(self, x_TH: Tensor) -> Tensor:
        """The map, and what follows it."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001
            x_TH, self._weight, self._bias, self._then, [], "none"
        )
        return result

    def add_to(self, residual_TH: Tensor, x_TH: Tensor) -> Tensor:
        """A new tensor: the map and the residual."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(  # noqa: SLF001
            x_TH, residual_TH, self._weight, self._bias, "add"
        )
        return result


class _BehindAttention:
    """What every layer does with its context."""

    def __init__(self, layer: Layer, dtype: torch.dtype) -> None:
        self.output = PackedLinear(_output_with_value_bias(layer), dtype)
        self.output_norm = _cast(layer.output_norm, dtype)
        self.feed_forward = PackedLinear(layer.feed_forward, dtype, then="gelu")
        self.projection = PackedLinear(layer.projection, dtype)
        self.projection_norm = _cast(layer.projection_norm, dtype)


class _PackedLayer(_BehindAttention):
    """A layer whose tokens are all computed."""

    def __init__(self, layer: Layer, num_heads: int, dtype: torch.dtype) -> None:
        super().__init__(layer, dtype)
        query = _scaled_query(layer, num_heads)
        weight = torch.cat([query.weight, layer.key.weight, layer.value.weight])
        bias = torch.cat([query.bias, torch.zeros_like(layer.key.bias), torch.zeros_like(layer.value.bias)])
        self.qkv = PackedLinear(Affine(weight=weight, bias=bias), dtype)


class _LastLayer(_BehindAttention):
    """The layer of which only first tokens are computed."""

    def __init__(self, layer: Layer, num_heads: int, dtype: torch.dtype) -> None:
        super().__init__(layer, dtype)
        hidden_size = layer.key.weight.shape[1]
        self.query = PackedLinear(_scaled_query(layer, num_heads), dtype)
        self.key_NDH = layer.key.weight.view(num_heads, -1, hidden_size)
        self.value_NDH = layer.value.weight.view(num_heads, -1, hidden_size)


def round_rows(x_TH: Tensor) -> Tensor:
    """Rows of zeros behind the last, up to a multiple of ROW_STEP."""
    return pad(x_TH, (0, 0, 0, -len(x_TH) % ROW_STEP))


def _scaled_query(layer: Layer, num_heads: int) -> Affine:
    """So that softmax(q k / sqrt(D)) becomes 2^(q k) over its sum."""
    scale = math.log2(math.e) / math.sqrt(layer.query.weight.shape[0] // num_heads)
    return Affine(weight=layer.query.weight * scale, bias=layer.query.bias * scale)


def _output_with_value_bias(layer: Layer) -> Affine:
    """Weights of a softmax sum to one, so the value's bias arrives at the output as it is."""
    shift = layer.output.weight.double() @ layer.value.bias.double()
    return Affine(weight=layer.output.weight, bias=(layer.output.bias.double() + shift).float())


def _cast(affine: Affine, dtype: torch.dtype) -> Affine:
    return Affine(weight=affine.weight.to(dtype), bias=affine.bias.to(dtype))
