"""Cost: what a result needs, counted by hand and by PyTorch's own counter, and no guess where belt does not know."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import gelu, layer_norm
from torch.utils.flop_counter import FlopCounterMode

from belt_tasks.cost import GPU_PEAKS, needed_flops, peak_flops
from belt_tasks.encoder import load_body

SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
FAMILIES = {
    "bert": transformers.BertConfig,
    "roberta": transformers.RobertaConfig,
    "mpnet": transformers.MPNetConfig,
    "distilbert": lambda hidden_size, intermediate_size, num_attention_heads, num_hidden_layers, **more: (
        transformers.DistilBertConfig(
            dim=hidden_size,
            hidden_dim=intermediate_size,
            n_heads=num_attention_heads,
            n_layers=num_hidden_layers,
            **more,
        )
    ),
    # every layer sees everything
    "modernbert": lambda **sizes: transformers.ModernBertConfig(global_attn_every_n_layers=1, **sizes),
}


def needed(config, *num_tokens):
    return needed_flops(config, np.array(num_tokens, dtype=np.int64))


def counted(config, *num_tokens):
    """What PyTorch counts in the model's own forward, one chunk after the other; nothing is computed."""
    with torch.device("meta"):
        body = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
        if getattr(body, "pooler", None) is not None:
            body.pooler = None
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            for length in num_tokens:
                body(input_ids=torch.zeros(1, length, dtype=torch.long))
    return counter.get_total_flops()


# by hand

# One multiply-add is two operations. 3 layers; 5 tokens of 8 numbers, 16 inside the feed-forward, 2 heads:
#   an inner layer: query, key, value and output 4 x 5x8x8 = 1280, scores and their weighted sum 2 x 5x5x8 = 400,
#                   feed-forward 2 x 5x8x16 = 1280; together 2960
#   the last one:   query, key, value and output of one token 4 x 8x8 = 256, scores of 2 heads over 5 inputs of 8
#                   numbers and their weighted sum 2 x 2x5x8 = 160, feed-forward 2 x 8x16 = 256; together 672
FIVE_TOKENS = 2 * (2 * 2960 + 672)


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet", "distilbert"])
def test_a_tiny_encoder_needs_what_a_count_by_hand_gives(family):
    assert needed(FAMILIES[family](num_hidden_layers=3, **SIZES), 5) == FIVE_TOKENS


def test_a_gated_feed_forward_has_three_maps_and_rotations_need_keys():
    # an inner layer: one more map of 5x8x16; the last one: keys and values of all 2 x 5x8x8 = 640, query and output of
    # one token 2 x 8x8 = 128, its scores and weighted sum 2 x 5x8 = 80, feed-forward 3 x 8x16 = 384
    expected = 2 * (2 * (2960 + 5 * 8 * 16) + 640 + 128 + 80 + 384)

    assert needed(FAMILIES["modernbert"](num_hidden_layers=3, **SIZES), 5) == expected


def test_one_layer_is_the_last_one():
    assert needed(FAMILIES["bert"](num_hidden_layers=1, **SIZES), 5) == 2 * 672


def test_local_attention_that_reaches_every_token_costs_what_global_attention_does():
    local = transformers.ModernBertConfig(num_hidden_layers=3, global_attn_every_n_layers=3, local_attention=8, **SIZES)

    assert local.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert needed(local, 5) == needed(FAMILIES["modernbert"](num_hidden_layers=3, **SIZES), 5)


@pytest.mark.parametrize("num_tokens", [6, 10, 33])
@pytest.mark.parametrize(("num_layers", "last"), [(4, "full_attention"), (3, "sliding_attention")])
def test_local_attention_costs_the_pairs_of_tokens_that_see_each_other(num_layers, last, num_tokens):
    config = transformers.ModernBertConfig(
        vocab_size=50,
        pad_token_id=0,
        num_hidden_layers=num_layers,
        global_attn_every_n_layers=3,
        local_attention=8,
        **SIZES,
    )
    assert config.layer_types[-1] == last
    body = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    with torch.inference_mode():
        attentions = body(input_ids=torch.ones(1, num_tokens, dtype=torch.long), output_attentions=True).attentions
    num_pairs = [int((weights_NTT[0, 0] > 0).sum()) for weights_NTT in attentions]
    seen_by_first = int((attentions[-1][0, 0, 0] > 0).sum())
    assert num_pairs[1] < num_pairs[0] == num_tokens**2

    inner_layers = num_tokens * (num_layers - 1) * (4 * 8 * 8 + 3 * 8 * 16) + sum(num_pairs[:-1]) * 2 * 8
    last_layer = seen_by_first * (2 * 8 * 8 + 2 * 8) + 2 * 8 * 8 + 3 * 8 * 16
    assert needed(config, num_tokens) == 2 * (inner_layers + last_layer)


def test_local_attention_makes_long_chunks_cheaper():
    sizes = {"num_hidden_layers": 4, "local_attention": 8, **SIZES}
    local = transformers.ModernBertConfig(global_attn_every_n_layers=3, **sizes)

    # two local layers; each of some 1000 tokens sees 9 instead of 1000
    saved = needed(FAMILIES["modernbert"](**sizes), 1000) - needed(local, 1000)

    assert saved == pytest.approx(2 * 2 * 2 * 8 * 1000 * (1000 - 9), rel=1e-3)


# laws

lengths = st.lists(st.integers(2, 600), max_size=8)


@pytest.mark.parametrize("family", FAMILIES)
@given(some=lengths, others=lengths)
def test_chunks_add_up_whatever_shares_their_mini_batch(family, some, others):
    config = FAMILIES[family](num_hidden_layers=3, **SIZES)

    together = needed(config, *some, *others)

    assert together == needed(config, *some) + needed(config, *others)
    assert together == needed(config, *others, *some)
    assert together == sum(needed(config, length) for length in [*some, *others])


def test_no_chunk_needs_nothing():
    assert needed(FAMILIES["bert"](num_hidden_layers=3, **SIZES)) == 0.0


# PyTorch's count


@pytest.mark.parametrize("family", FAMILIES)
def test_an_inner_layer_needs_what_pytorch_counts(family):
    few, more = (FAMILIES[family](num_hidden_layers=num_layers, **SIZES) for num_layers in (1, 3))

    assert needed(more, 2, 9, 40) - needed(few, 2, 9, 40) == counted(more, 2, 9, 40) - counted(few, 2, 9, 40)


@settings(deadline=None, max_examples=12)
@given(
    num_tokens=st.lists(st.integers(2, 200), min_size=1, max_size=4),
    num_layers=st.integers(1, 3),
    num_heads=st.integers(1, 6),
    head_size=st.integers(1, 20),
    inner=st.integers(1, 200),
)
def test_what_is_needed_is_what_pytorch_counts_without_what_the_last_layer_can_save(
    num_tokens, num_layers, num_heads, head_size, inner
):
    hidden = num_heads * head_size
    config = transformers.BertConfig(
        hidden_size=hidden, intermediate_size=inner, num_attention_heads=num_heads, num_hidden_layers=num_layers
    )

    # all tokens but the first of every linear map, and each head's scores and weighted sum: of n x n products with
    # keys and values of the head's size, n with whole inputs remain
    saved = sum(
        2 * (n - 1) * (4 * hidden**2 + 2 * hidden * inner) + 2 * 2 * n * hidden * (n - num_heads) for n in num_tokens
    )

    assert needed(config, *num_tokens) == counted(config, *num_tokens) - saved
    if min(num_tokens) >= num_heads:
        assert needed(config, *num_tokens) <= counted(config, *num_tokens)


def first_token_of_one_layer(body, input_ids_T):
    """What the last layer does to the first token, from the layer's inputs and with nothing that can be left out."""
    layer = body.encoder.layer[0]
    attention = layer.attention
    x_TH = body.embeddings(input_ids=input_ids_T[None])[0]
    num_heads = body.config.num_attention_heads

    def per_head(linear):
        return linear.weight.view(num_heads, -1, x_TH.shape[1])

    query_ND = attention.self.query(x_TH[0]).view(num_heads, 1, -1)
    # the key's bias is the same for all tokens, so the softmax forgets it; the value's passes through it
    query_NH = (query_ND @ per_head(attention.self.key))[:, 0] / query_ND.shape[-1] ** 0.5
    seen_NH = torch.softmax(query_NH @ x_TH.T, dim=1) @ x_TH
    context_ND = (per_head(attention.self.value) @ seen_NH[:, :, None])[:, :, 0]
    context_H = context_ND.reshape(-1) + attention.self.value.bias
    y_H = normalise(attention.output, attention.output.dense(context_H) + x_TH[0])
    return normalise(layer.output, layer.output.dense(gelu(layer.intermediate.dense(y_H))) + y_H)


def normalise(output, x_H):
    norm = output.LayerNorm
    return layer_norm(x_H, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


@pytest.mark.parametrize("num_tokens", [2, 7, 60])
def test_the_last_layer_needs_what_a_forward_of_its_first_token_does(tiny_encoder, num_tokens):
    config = transformers.AutoConfig.from_pretrained(tiny_encoder, num_hidden_layers=1)
    whole = load_body(tiny_encoder).eval()
    body = transformers.AutoModel.from_config(config).eval()
    body.load_state_dict(
        {name: whole.state_dict()[name] for name in body.state_dict() if "pooler" not in name}, strict=False
    )
    input_ids_T = torch.arange(10, 10 + num_tokens)

    with torch.inference_mode():
        expected_H = body(input_ids=input_ids_T[None]).last_hidden_state[0, 0]
        with FlopCounterMode(display=False) as counter:
            found_H = first_token_of_one_layer(body, input_ids_T)

    torch.testing.assert_close(found_H, expected_H, atol=1e-5, rtol=0)
    assert needed(config, num_tokens) == counter.get_total_flops()


# what belt does not know


@pytest.mark.parametrize("missing", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"])
def test_a_config_without_sizes_gives_no_number(missing):
    sizes = {"num_hidden_layers": 3, **SIZES}
    assert needed(SimpleNamespace(**sizes), 5) == FIVE_TOKENS

    del sizes[missing]

    assert needed(SimpleNamespace(**sizes), 5) is None
    assert needed(SimpleNamespace(**sizes, **{missing: None}), 5) is None


def test_an_encoder_of_another_form_gives_no_number():
    assert needed(transformers.XLNetConfig(), 5) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10", 125e12),
        ("Tesla T4", 65e12),
    ],
)
def test_peaks_by_the_name_of_the_device(name, peak):
    assert peak_flops(name, "bf16") == peak_flops(name, "fp16") == peak


@pytest.mark.parametrize("name", ["cpu", "NVIDIA GeForce RTX 4090", "NVIDIA V100-SXM2-16GB", ""])
def test_a_device_that_belt_has_no_figure_of_has_no_peak(name):
    assert peak_flops(name, "fp16") is None


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("NVIDIA L40", "L4"),
        ("NVIDIA A10G", "A10"),
        ("NVIDIA RTX A1000", "A100"),
        ("NVIDIA T400 4GB", "T4"),
        ("NVIDIA T4G", "T4"),
        ("NVIDIA H100 NVL", "H100"),
        ("NVIDIA H200 NVL", "H200"),
    ],
)
def test_a_device_has_not_the_peak_of_another_one_whose_name_is_in_its_own(name, other):
    assert peak_flops(name, "fp16") != GPU_PEAKS[other]


@pytest.mark.parametrize("device", [None, "cpu", *(f"NVIDIA {name}" for name in GPU_PEAKS)])
@pytest.mark.parametrize("precision", [None, "fp32"])
def test_only_16_bits_have_a_peak(device, precision):
    assert peak_flops(device, precision) is None


def test_no_device_has_no_peak():
    assert peak_flops(None, "bf16") is None
