"""The packed forward on a GPU: chunks one after the other in half precision, attention over variable lengths.

PyTorch's own variable-length attention reads packed chunks, so no padding is computed anywhere. Query, key and value
are one product; in the last layer queries, output and feed-forward are computed of first tokens alone. On a CPU, where
that attention does not run, the same forward takes chunks one by one: that is how it is tested without a GPU.
"""

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention

from belt_tasks.batches import MiniBatch
from belt_tasks.families import Affine, EncoderWeights, Layer


def supported(weights: EncoderWeights, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether variable-length attention can run this encoder: half precision, no bias of scores, a recent GPU."""
    return (
        dtype in (torch.float16, torch.bfloat16)
        and weights.position_bias_NPP is None
        and (device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0))
    )


class PackedGpuForward:
    """First tokens of packed chunks."""

    def __init__(self, weights: EncoderWeights, *, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._eps = weights.eps
        self._num_heads = weights.num_heads
        self._word_VH = weights.word_VH.to(device, dtype)
        self._position_PH = weights.position_PH.to(device, dtype)
        self._embedding_norm = _move(weights.embedding_norm, device, dtype)
        self._layers = [_FusedLayer(layer, device, dtype) for layer in weights.layers]

    def first_tokens(self, batch: MiniBatch) -> Tensor:
        """The last hidden state of each chunk's first token, float32 [B, H], on the device; does not wait for it."""
        bounds = _Bounds(batch, self._device)
        ids_T = send(batch.input_ids_T, self._device)
        position_T = torch.arange(len(ids_T), device=self._device) - bounds.first_T
        x_TH = self._norm(self._word_VH[ids_T] + self._position_PH[position_T], self._embedding_norm)
        *inner, last = self._layers
        for layer in inner:
            query_TND, key_TND, value_TND = self._heads(layer.qkv, x_TH, 3).unbind(1)
            context_TH = _attend(query_TND, key_TND, value_TND, bounds, first_only=False)
            x_TH = self._behind_attention(layer, x_TH, context_TH)
        first_BH = x_TH[bounds.first_B]
        query_BND = self._heads(last.query, first_BH, 1)[:, 0]
        key_TND, value_TND = self._heads(last.key_value, x_TH, 2).unbind(1)
        context_BH = _attend(query_BND, key_TND, value_TND, bounds, first_only=True)
        return self._behind_attention(last, first_BH, context_BH).float()

    def _behind_attention(self, layer: "_FusedLayer", x_TH: Tensor, context_TH: Tensor) -> Tensor:
        x_TH = self._norm(_apply(layer.output, context_TH) + x_TH, layer.output_norm)
        hidden_TI = gelu(_apply(layer.feed_forward, x_TH))
        return self._norm(_apply(layer.projection, hidden_TI) + x_TH, layer.projection_norm)

    def _heads(self, affine: Affine, x_TH: Tensor, num_parts: int) -> Tensor:
        return _apply(affine, x_TH).view(len(x_TH), num_parts, self._num_heads, -1)

    def _norm(self, x_TH: Tensor, norm: Affine) -> Tensor:
        return torch.layer_norm(x_TH, norm.weight.shape, norm.weight, norm.bias, self._eps)


class _FusedLayer:
    def __init__(self, layer: Layer, device: torch.device, dtype: torch.dtype) -> None:
        self.qkv = _move(_stack(layer.query, layer.key, layer.value), device, dtype)
        # views of the same memory: the last layer takes its queries from other rows than its keys
        hidden_size = len(layer.query.bias)
        self.query = Affine(weight=self.qkv.weight[:hidden_size], bias=self.qkv.bias[:hidden_size])
        self.key_value = Affine(weight=self.qkv.weight[hidden_size:], bias=self.qkv.bias[hidden_size:])
        self.output = _move(layer.output, device, dtype)
        self.output_norm = _move(layer.output_norm, device, dtype)
        self.feed_forward = _move(layer.feed_forward, device, dtype)
        self.projection = _move(layer.projection, device, dtype)
        self.projection_norm = _move(layer.projection_norm, device, dtype)


class _Bounds:
    """Where the chunks of a mini-batch begin and end, on the device."""

    def __init__(self, batch: MiniBatch, device: torch.device) -> None:
        num_tokens_B = torch.from_numpy(batch.num_tokens_B)
        offsets = torch.zeros(len(batch) + 1, dtype=torch.int32)
        offsets[1:] = num_tokens_B.cumsum(0)
        self.longest = int(batch.num_tokens_B.max())
        self.lengths = batch.num_tokens_B.tolist()
        self.offsets = send(offsets, device)
        """int32 [B + 1]."""
        self.rows = torch.arange(len(batch) + 1, dtype=torch.int32, device=device)
        self.first_B = self.offsets[:-1].long()
        # output_size, since the sum of the lengths is known here and asking the device for it would wait for it
        self.first_T = self.first_B.repeat_interleave(send(num_tokens_B, device), output_size=len(batch.input_ids_T))


def _attend(query_QND: Tensor, key_TND: Tensor, value_TND: Tensor, bounds: _Bounds, *, first_only: bool) -> Tensor:
    """Context [Q, H]; queries are all tokens, or each chunk's first."""
    if query_QND.is_cuda:
        context_QND = varlen_attn(
            query_QND,
            key_TND,
            value_TND,
            bounds.rows if first_only else bounds.offsets,
            bounds.offsets,
            1 if first_only else bounds.longest,
            bounds.longest,
        )
        if not isinstance(context_QND, Tensor):
            raise AssertionError("nothing else was asked for")
        return context_QND.flatten(1)
    query_lengths = [1] * len(bounds.lengths) if first_only else bounds.lengths
    parts = [
        torch.split(part.transpose(0, 1), lengths, dim=1)
        for part, lengths in ((query_QND, query_lengths), (key_TND, bounds.lengths), (value_TND, bounds.lengths))
    ]
    contexts = [scaled_dot_product_attention(*chunk) for chunk in zip(*parts, strict=True)]
    return torch.cat([context_NSD.transpose(0, 1) for context_NSD in contexts]).flatten(1)


def send(values: Tensor, device: torch.device) -> Tensor:
    """A tensor's copy on a device, through pinned memory, so that the copy runs beside what the device does."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def _apply(affine: Affine, x_TH: Tensor) -> Tensor:
    return linear(x_TH, affine.weight, affine.bias)


def _stack(*affines: Affine) -> Affine:
    return Affine(
        weight=torch.cat([affine.weight for affine in affines]), bias=torch.cat([affine.bias for affine in affines])
    )


def _move(affine: Affine, device: torch.device, dtype: torch.dtype) -> Affine:
    return Affine(weight=affine.weight.to(device, dtype), bias=affine.bias.to(device, dtype))
