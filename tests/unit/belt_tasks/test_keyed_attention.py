"""Attention by blocks: outputs and gradients are those of the formula, whatever the blocks, masks and dtypes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from belt_tasks import dropout, dropout_mask, keyed_attention
from belt_tasks.errors import ConfigError

MASKS = ("none", "padding", "rows", "float", "bias")


def by_formula(query, key, value, mask, key_BNS, p):
    score = query @ key.mT
    if mask is not None:
        score = score.masked_fill(~mask, torch.finfo(score.dtype).min) if mask.dtype == torch.bool else score + mask
    kept = dropout_mask.dropped(torch.ones_like(score), key_BNS.reshape(-1), p)
    return (score.softmax(dim=-1) * kept) @ value


def drawn(shape, kind, *, dtype=torch.float64, seed=0):
    """Leaves in the memory order of an encoder, a mask and keys."""
    num_chunks, num_heads, num_tokens, size = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)

    leaves = [
        normal(num_chunks, num_tokens, num_heads, each).transpose(1, 2).requires_grad_()
        for each in (size, size, size + 1)
    ]
    seen = torch.rand(num_chunks, 1, 1, num_tokens, generator=generator) < 0.7
    seen[..., 0] = True
    rows = (torch.rand(num_chunks, 1, num_tokens, num_tokens, generator=generator) < 0.7) | torch.eye(
        num_tokens, dtype=torch.bool
    )
    mask = {
        "none": None,
        "padding": seen,
        "rows": rows,
        "float": torch.zeros(rows.shape, dtype=dtype).masked_fill(~rows, -1e30),
        "bias": normal(num_heads, num_tokens, num_tokens).requires_grad_(),  # all chunks share it
    }[kind]
    keys = torch.randint(-(2**62), 2**62, (num_chunks, num_heads, num_tokens), generator=generator)
    return leaves, mask, keys


def outputs_and_gradients(attention, leaves, mask, keys, p):
    output = attention(*leaves, mask, keys, p)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape).to(output)
    wanted = [*leaves, *([mask] if mask is not None and mask.requires_grad else [])]
    return [output, *torch.autograd.grad((output * weights).sum(), wanted)]


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.integers(1, 5)),
    kind=st.sampled_from(MASKS),
    p=st.sampled_from([1e-9, 0.1, 0.6]),
    block_bytes=st.integers(1, 6000),
    seed=st.integers(0, 99),
)
def test_outputs_and_gradients_are_those_of_the_formula_whatever_the_blocks(shape, kind, p, block_bytes, seed):
    leaves, mask, keys = drawn(shape, kind, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keyed_attention, "_BLOCK_BYTES", block_bytes)
        found = outputs_and_gradients(keyed_attention.attend, leaves, mask, keys, p)

    torch.testing.assert_close(found, outputs_and_gradients(by_formula, leaves, mask, keys, p))


@pytest.mark.parametrize("kind", MASKS)
def test_gradients_are_those_of_finite_differences(kind):
    leaves, mask, keys = drawn((2, 2, 4, 3), kind)

    assert torch.autograd.gradcheck(lambda *given: keyed_attention.attend(*given, mask, keys, 0.3), leaves)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("is_autocast", [True, False])
def test_bf16_is_near_fp32(kind, is_autocast):
    """8 bits of a number are left: outputs and gradients differ by 2 % of the largest."""
    leaves, mask, keys = drawn((3, 2, 16, 8), kind, dtype=torch.float32)
    expected = outputs_and_gradients(by_formula, leaves, mask, keys, 0.1)
    given = leaves if is_autocast else [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]

    def attention(*given):
        if not is_autocast:
            return keyed_attention.attend(*given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return keyed_attention.attend(*(part.to(torch.bfloat16) for part in given[:3]), *given[3:])

    found = outputs_and_gradients(attention, given, mask, keys, 0.1)

    assert found[0].dtype == torch.bfloat16
    for mine, other in zip(found, expected, strict=True):
        assert (mine.float() - other).abs().max() < 0.02 * other.abs().max()


def test_under_autocast_products_are_bf16_whatever_comes():
    leaves, _, _ = drawn((2, 2, 8, 4), "none", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), dropout.keyed(torch.arange(2)):
        output = functional.scaled_dot_product_attention(*leaves, dropout_p=0.1)

    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


def test_memory_of_weights_is_that_of_a_block():
    """Nothing of S^2 is kept for the gradient: saved tensors are those of the inputs and the output."""
    leaves, _, keys = drawn((4, 3, 64, 2), "none")
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: sizes.append(saved.numel()) or saved, lambda it: it):
        keyed_attention.attend(*leaves, None, keys, 0.1)

    assert max(sizes) <= max(leaf.numel() for leaf in leaves)


@pytest.mark.parametrize(
    "changed",
    [{"is_causal": True}, {"enable_gqa": True}, {"query": torch.ones(2, 3, 4)}],
    ids=lambda it: next(iter(it)),
)
def test_attention_whose_dropout_belt_does_not_know_is_refused(changed):
    given = {name: torch.ones(2, 1, 3, 4) for name in ("query", "key", "value")} | changed
    with (
        dropout.keyed(torch.arange(2)),
        pytest.raises(ConfigError, match="fine-tune it with dropout: 0"),
    ):
        functional.scaled_dot_product_attention(**given, dropout_p=0.1)


@pytest.mark.gpu
def test_a_gpu_attends_as_a_cpu_does():
    """Its twin on the CPU is `test_outputs_and_gradients_are_those_of_the_formula_whatever_the_blocks`."""
    leaves, mask, keys = drawn((3, 2, 16, 8), "rows")
    on_gpu = [leaf.detach().cuda().requires_grad_() for leaf in leaves]

    found = outputs_and_gradients(keyed_attention.attend, on_gpu, mask.cuda(), keys.cuda(), 0.1)

    expected = outputs_and_gradients(keyed_attention.attend, leaves, mask, keys, 0.1)
    torch.testing.assert_close([each.cpu() for each in found], expected)
