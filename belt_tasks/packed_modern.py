"""ModernBERT's packed forward on a CPU: norms before each map, rotated positions, local layers, gated feed-forward.

As in `packed_cpu`, chunks lie one after the other without padding, weights are reordered for oneDNN, and of the last
layer only first tokens are computed. Local layers compute scores within their window alone.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad
from transformers import PreTrainedModel

from belt_tasks.attention_cpu import attend
from belt_tasks.batches import MiniBatch
from belt_tasks.families import Affine
from belt_tasks.packed_cpu import ROW_STEP, PackedLinear, round_rows


def supported(body: PreTrainedModel) -> bool:
    """Whether the config asks for nothing but what this forward does."""
    config = body.config
    return (
        config.model_type == "modernbert"
        and config.hidden_activation == "gelu"
        and all(rope is None or rope["rope_type"] == "default" for rope in config.rope_parameters.values())
    )


class PackedModernForward:
    """First tokens of packed chunks, in fp32 or bf16, on the CPU."""

    def __init__(self, body: PreTrainedModel, dtype: torch.dtype) -> None:
        config = body.config
        self._dtype = dtype
        self._num_heads = config.num_attention_heads
        self._eps = config.norm_eps
        self._word_VH = body.get_parameter("embeddings.tok_embeddings.weight").detach()
        self._embedding_norm = _norm_of(body.get_submodule("embeddings.norm"), torch.float32)
        self._final_norm = _norm_of(body.get_submodule("final_norm"), dtype)
        self._rotary = body.get_submodule("rotary_emb")
        layers = zip(body.get_submodule("layers").children(), config.layer_types, strict=True)
        self._layers = [
            _ModernLayer(
                layer, kind, config.sliding_window if kind == "sliding_attention" else None, self._num_heads, dtype
            )
            for layer, kind in layers
        ]

    def first_tokens(self, batch: MiniBatch) -> Tensor:
        """The last hidden state of each chunk's first token, float32 [B, H]."""
        num_tokens_B = torch.from_numpy(batch.num_tokens_B)
        first_B = num_tokens_B.cumsum(0) - num_tokens_B
        position_T = torch.arange(len(batch.input_ids_T)) - first_B.repeat_interleave(num_tokens_B)
        position_T = pad(position_T, (0, -len(position_T) % ROW_STEP))
        rotations = {kind: self._rotation(position_T, kind) for kind in {layer.kind for layer in self._layers}}
        x_TH = round_rows(self._norm(self._word_VH[batch.input_ids_T], self._embedding_norm).to(self._dtype))
        *inner, last = self._layers
        for layer in inner:
            query_TND, key_TND, value_TND = self._qkv(layer, x_TH, rotations[layer.kind])
            context_TND = attend(query_TND, key_TND, value_TND, batch.num_tokens_B, window=layer.window)
            x_TH = self._behind_attention(layer, x_TH, context_TND.flatten(1))
        query_TND, key_TND, value_TND = self._qkv(last, x_TH, rotations[last.kind])
        x_BH = round_rows(x_TH[first_B])
        context_BH = torch.zeros_like(x_BH)
        for chunk, (first, length) in enumerate(zip(first_B.tolist(), batch.num_tokens_B.tolist(), strict=True)):
            seen = slice(first, first + (length if last.window is None else min(length, last.window + 1)))
            score_NS = torch.einsum("nd,snd->ns", query_TND[first].float(), key_TND[seen].float())
            weight_NS = torch.softmax(score_NS * math.log(2.0), dim=-1)
            context_BH[chunk] = torch.einsum("ns,snd->nd", weight_NS, value_TND[seen].float()).flatten()
        x_BH = self._behind_attention(last, x_BH, context_BH)[: len(first_B)]
        return self._norm(x_BH, self._final_norm).float()

    def _qkv(
        self, layer: "_ModernLayer", x_TH: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, [T, N, D] each."""
        normed_TH = x_TH if layer.attention_norm is None else self._norm(x_TH, layer.attention_norm)
        qkv_T3ND = layer.qkv(normed_TH).view(len(x_TH), 3, self._num_heads, -1)
        qk_T2ND, value_TND = qkv_T3ND[:, :2], qkv_T3ND[:, 2]
        cosine_T11D, sine_T11D = rotation
        half = qk_T2ND.shape[-1] // 2
        turned_T2ND = torch.cat([-qk_T2ND[..., half:], qk_T2ND[..., :half]], dim=-1)
        rotated_T2ND = (qk_T2ND.float() * cosine_T11D + turned_T2ND.float() * sine_T11D).to(self._dtype)
        return rotated_T2ND[:, 0], rotated_T2ND[:, 1], value_TND

    def _behind_attention(self, layer: "_ModernLayer", x_TH: Tensor, context_TH: Tensor) -> Tensor:
        x_TH = layer.output.add_to(x_TH, context_TH)
        activated_TI, gate_TI = layer.feed_forward(self._norm(x_TH, layer.feed_forward_norm)).chunk(2, dim=-1)
        return layer.projection.add_to(x_TH, gelu(activated_TI) * gate_TI)

    def _rotation(self, position_T: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        """Cosines and sines of each token's position, [T, 1, 1, D]."""
        like = torch.empty(0, dtype=torch.float32)
        cosine_1TD, sine_1TD = self._rotary(like, position_T[None], kind)
        return cosine_1TD[0, :, None, None], sine_1TD[0, :, None, None]

    def _norm(self, x_TH: Tensor, norm: tuple[Tensor, Tensor | None]) -> Tensor:
        weight, bias = norm
        return torch.layer_norm(x_TH, weight.shape, weight, bias, self._eps)


class _ModernLayer:
    def __init__(self, layer: nn.Module, kind: str, window: int | None, num_heads: int, dtype: torch.dtype) -> None:
        self.kind = kind
        self.window = window
        norm = layer.get_submodule("attn_norm")
        self.attention_norm = None if isinstance(norm, nn.Identity) else _norm_of(norm, dtype)
        self.feed_forward_norm = _norm_of(layer.get_submodule("mlp_norm"), dtype)
        qkv = _linear_of(layer.get_submodule("attn.Wqkv"))
        hidden_size = qkv.weight.shape[1]
        scale = torch.ones(3 * hidden_size)
        scale[:hidden_size] = math.log2(math.e) / math.sqrt(hidden_size // num_heads)
        self.qkv = PackedLinear(Affine(weight=qkv.weight * scale[:, None], bias=qkv.bias * scale), dtype)
        self.output = PackedLinear(_linear_of(layer.get_submodule("attn.Wo")), dtype)
        self.feed_forward = PackedLinear(_linear_of(layer.get_submodule("mlp.Wi")), dtype)
        self.projection = PackedLinear(_linear_of(layer.get_submodule("mlp.Wo")), dtype)


def _linear_of(module: nn.Module) -> Affine:
    """A linear map without a bias gets one of zeros, which costs nothing in a fused product."""
    parameters = dict(module.named_parameters())
    weight = parameters["weight"].detach()
    bias = parameters.get("bias")
    return Affine(weight=weight, bias=torch.zeros(len(weight)) if bias is None else bias.detach())


def _norm_of(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    parameters = dict(module.named_parameters())
    bias = parameters.get("bias")
    return parameters["weight"].detach().to(dtype), None if bias is None else bias.detach().to(dtype)
