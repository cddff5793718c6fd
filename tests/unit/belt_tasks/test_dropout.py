"""Keyed dropout: the same numbers for a chunk whoever comes with it, by both implementations, and random enough."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from belt_tasks import dropout, dropout_mask, encoder
from belt_tasks.encoder import ChunkModel
from belt_tasks.specs import PoolingSpec


@pytest.fixture(params=["compiled", "PyTorch"])
def implementation(request, monkeypatch):
    if request.param == "PyTorch":
        monkeypatch.setattr(dropout_mask, "_load_kernel", lambda: None)
    else:
        assert dropout_mask._load_kernel() is not None
    return request.param


def keys(number, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(-(2**63), 2**63, size=number))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 0.9999])
def test_both_implementations_drop_the_same(monkeypatch, dtype, p):
    values = torch.randn(7, 5, 33, dtype=dtype)
    compiled = dropout_mask.dropped(values, keys(35), p)
    monkeypatch.setattr(dropout_mask, "_load_kernel", lambda: None)

    assert torch.equal(compiled, dropout_mask.dropped(values, keys(35), p))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_share_p_is_dropped_and_the_rest_scaled(p):
    found = dropout_mask.dropped(torch.ones(500, 400), keys(500), p)

    share = (found == 0).double().mean().item()
    assert share == pytest.approx(p, abs=5 * (p * (1 - p) / found.numel()) ** 0.5)
    assert found.unique().tolist() == [0.0, pytest.approx(1 / (1 - p))]


@pytest.mark.usefixtures("implementation")
def test_places_rows_calls_and_neighbouring_keys_are_independent():
    """Correlations of masks are those of coin flips: at most 5 standard deviations."""
    with dropout.keyed(torch.arange(64)):  # keys as alike as can be
        first, second = (functional.dropout(torch.ones(64, 32, 100)) != 0 for _ in range(2))
    mask = first.double() - 0.5
    limit = 5 / mask.numel() ** 0.5

    pairs = [
        (mask[1:], mask[:-1]),  # chunks with neighbouring keys
        (mask[:, 1:], mask[:, :-1]),  # neighbouring rows
        (mask[..., 1:], mask[..., :-1]),  # neighbouring places
        (mask[:, 1:, 1:], mask[:, :-1, :-1]),
        (mask, second.double() - 0.5),  # the next dropout of the model
    ]
    for left, right in pairs:
        assert abs((left * right).mean().item() * 4) < limit * 1.2
    for axis in (0, 1, 2):  # and no row or column has too many or too few
        others = [each for each in (0, 1, 2) if each != axis]
        means = mask.mean(dim=others)
        assert means.abs().max() < 6 * 0.5 / (mask.numel() / mask.shape[axis]) ** 0.5


@pytest.mark.usefixtures("implementation")
@given(st.data())
def test_a_chunk_drops_the_same_whoever_comes_with_it_and_however_it_is_padded(data):
    num_chunks, size = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 9))
    chosen = data.draw(st.permutations(range(num_chunks)))[: data.draw(st.integers(1, num_chunks))]
    length, padded = data.draw(st.integers(1, 8)), data.draw(st.integers(0, 5))
    key_B = keys(num_chunks, seed=1)

    with dropout.keyed(key_B):
        hidden = functional.dropout(torch.ones(num_chunks, length, size), 0.5)
        weights = functional.dropout(torch.ones(num_chunks, 2, length, length), 0.5)
    with dropout.keyed(key_B[chosen]):
        hidden_again = functional.dropout(torch.ones(len(chosen), length + padded, size), 0.5)
        weights_again = functional.dropout(torch.ones(len(chosen), 2, length + padded, length + padded), 0.5)

    assert torch.equal(hidden_again[:, :length], hidden[chosen])
    assert torch.equal(weights_again[:, :, :length, :length], weights[chosen])


@pytest.mark.usefixtures("implementation")
def test_the_gradient_is_that_of_the_mask():
    values = torch.randn(4, 3, 10, dtype=torch.float64, requires_grad=True)
    with dropout.keyed(keys(4)):
        output = functional.dropout(values, 0.4)
    weights = torch.randn_like(output)

    (gradient,) = torch.autograd.grad((output * weights).sum(), values)

    torch.testing.assert_close(gradient, weights * (output != 0) / 0.6)


@pytest.mark.parametrize("mask_kind", ["none", "bool", "float"])
def test_attention_without_dropped_weights_is_that_of_pytorch(mask_kind):
    query, key, value = torch.randn(3, 5, 2, 7, 8, dtype=torch.float64)
    seen = torch.rand(5, 1, 7, 7) < 0.8
    seen[..., 0] = True
    mask = {"none": None, "bool": seen, "float": torch.zeros(5, 1, 7, 7).double().masked_fill(~seen, -torch.inf)}[
        mask_kind
    ]
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    with dropout.keyed(keys(5)):
        found = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=1e-9)

    torch.testing.assert_close(found, expected)


def test_attention_drops_weights_as_its_mean_over_keys_says():
    query, key, value = torch.randn(3, 1, 2, 4, 8, dtype=torch.float64)
    found = []
    for seed in range(4000):
        with dropout.keyed(keys(1, seed)):
            found.append(functional.scaled_dot_product_attention(query, key, value, dropout_p=0.3))

    mean = torch.stack(found).mean(dim=0)
    error = torch.stack(found).std(dim=0) / len(found) ** 0.5
    expected = functional.scaled_dot_product_attention(query, key, value)
    assert ((mean - expected).abs() < 5 * error).all()


def test_a_padded_row_that_sees_nothing_has_a_finite_gradient():
    query, key, value = (torch.randn(1, 1, 3, 4, requires_grad=True) for _ in range(3))
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    mask[:, :, 2] = False

    with dropout.keyed(keys(1)):
        output = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=0.5)
    output[:, :, :2].sum().backward()

    assert all(part.grad.isfinite().all() for part in (query, key, value))


def test_what_all_chunks_share_drops_the_same_in_every_mini_batch():
    """As of positions: [1, S, H] or [S, H], whatever the number of chunks."""
    found = []
    for number in (3, 5):
        with dropout.keyed(keys(number, seed=number)):
            found.append((functional.dropout(torch.ones(1, 7, 8)), functional.dropout(torch.ones(7, 8))))

    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_a_model_drops_as_with_pytorchs_own(tiny_encoder):
    """Over 4,000 draws the mean and the spread of every output, and its gradient's, are alike: at most 5 errors."""
    torch.manual_seed(0)
    body = encoder.load_body(str(tiny_encoder), dropout=0.2)
    model = ChunkModel(body, num_logits=3, pooling=PoolingSpec()).train()
    number = 4000
    ids_BT = torch.randint(5, body.config.vocab_size, (1, 12)).expand(number, 12)
    mask_BT = torch.ones_like(ids_BT)

    def drawn():
        embedded = []
        hook = body.embeddings.register_forward_hook(
            lambda _, __, output: output.retain_grad() or embedded.append(output)
        )
        output_BL = model(ids_BT, mask_BT)
        hook.remove()
        output_BL[:, 0].sum().backward()
        return torch.cat([output_BL.detach(), embedded[0].grad[:, 0]], dim=1).double()

    own = drawn()
    with dropout.keyed(keys(number)):
        keyed = drawn()

    error = ((own.var(dim=0) + keyed.var(dim=0)) / number) ** 0.5
    assert ((own.mean(dim=0) - keyed.mean(dim=0)).abs() < 5 * error).all()
    squares = [(each - each.mean(dim=0)) ** 2 for each in (own, keyed)]
    error = ((squares[0].var(dim=0) + squares[1].var(dim=0)) / number) ** 0.5
    assert ((squares[0].mean(dim=0) - squares[1].mean(dim=0)).abs() < 5 * error).all()


def test_in_eval_mode_and_outside_of_the_block_nothing_is_replaced():
    values = torch.ones(3, 4)
    with dropout.keyed(keys(3)):
        assert torch.equal(functional.dropout(values, 0.5, training=False), values)
    torch.manual_seed(0)
    expected = torch.nn.Dropout(0.5)(values)
    torch.manual_seed(0)
    assert torch.equal(functional.dropout(values, 0.5), expected)


@pytest.mark.gpu
def test_a_gpu_drops_what_a_cpu_does():
    """Its twin on the CPU is `test_both_implementations_drop_the_same`."""
    values = torch.randn(7, 5, 33)

    found = dropout_mask.dropped(values.cuda(), keys(35).cuda(), 0.3)

    torch.testing.assert_close(found.cpu(), dropout_mask.dropped(values, keys(35), 0.3))
