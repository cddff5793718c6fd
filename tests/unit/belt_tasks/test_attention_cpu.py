"""Attention on a CPU: the compiled kernel and the operators both equal softmax(q k') v, computed in float64."""

import logging
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from belt_tasks import attention_cpu
from belt_tasks.attention_cpu import attend, uses_kernel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# beside float64, of weighted means of values of about 1: bf16 rounds queries, weights and context
BOUND = {"fp32": 3e-6, "bf16": 4e-2}


@pytest.fixture(params=["compiled", "operators"])
def either_way(request, monkeypatch):
    if request.param == "operators":
        monkeypatch.setattr(attention_cpu, "uses_kernel", lambda *_: False)


def random_qkv(lengths, *, num_heads=3, head_size=32, dtype=torch.float32, scale=1.0, seed=0):
    """Queries, keys and values as one product leaves them: side by side, so that none is contiguous."""
    generator = torch.Generator().manual_seed(seed)
    qkv_T3ND = torch.randn(sum(lengths), 3, num_heads, head_size, generator=generator)
    qkv_T3ND[:, 0] *= scale / math.sqrt(head_size)
    return qkv_T3ND.to(dtype).unbind(1)


def expected_context(query_TND, key_TND, value_TND, lengths, *, bias_NPP=None, window=None):
    chunks = []
    for parts in zip(*(torch.split(part, lengths) for part in (query_TND, key_TND, value_TND)), strict=True):
        query_NSD, key_NSD, value_NSD = (part.double().transpose(0, 1) for part in parts)
        num_tokens = query_NSD.shape[1]
        scores_NSS = query_NSD @ key_NSD.transpose(1, 2)
        if bias_NPP is not None:
            scores_NSS += bias_NPP[:, :num_tokens, :num_tokens]
        if window is not None:
            position_S = torch.arange(num_tokens)
            scores_NSS = scores_NSS.masked_fill((position_S[:, None] - position_S).abs() > window, -math.inf)
        chunks.append((torch.softmax(scores_NSS * math.log(2.0), dim=-1) @ value_NSD).transpose(0, 1))
    return torch.cat(chunks)


@pytest.mark.usefixtures("either_way")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=6),
    num_heads=st.integers(1, 4),
    head_size=st.sampled_from([2, 8, 16, 20, 32, 48, 64, 80, 128]),
    precision=st.sampled_from(["fp32", "bf16"]),
    has_bias=st.booleans(),
    window=st.none() | st.integers(0, 80),
    seed=st.integers(0, 1000),
)
def test_the_context_is_that_of_softmax(lengths, num_heads, head_size, precision, has_bias, window, seed):
    query, key, value = random_qkv(
        lengths, num_heads=num_heads, head_size=head_size, dtype=DTYPES[precision], seed=seed
    )
    bias = torch.randn(num_heads, 70, 70, generator=torch.Generator().manual_seed(seed)) if has_bias else None

    found = attend(query, key, value, np.array(lengths), bias_NPP=bias, largest_bias=6.0, window=window)

    assert found.dtype == DTYPES[precision]
    expected = expected_context(query, key, value, lengths, bias_NPP=bias, window=window)
    assert float((found.double() - expected).abs().max()) < BOUND[precision]


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("window", [None, 0, 100, 300])
@pytest.mark.parametrize("num_tokens", [255, 256, 257, 511, 1030])
def test_long_chunks_are_taken_in_blocks(num_tokens, window, precision):
    query, key, value = random_qkv([num_tokens, 3], num_heads=2, head_size=64, dtype=DTYPES[precision])

    found = attend(query, key, value, np.array([num_tokens, 3]), window=window)

    expected = expected_context(query, key, value, [num_tokens, 3], window=window)
    assert float((found.double() - expected).abs().max()) < BOUND[precision]


@pytest.mark.usefixtures("either_way")
def test_few_heads_at_a_time_give_the_same(monkeypatch):
    query, key, value = random_qkv([40, 70], num_heads=4)
    monkeypatch.setattr(attention_cpu, "MOST_ROWS", 16)
    monkeypatch.setattr(attention_cpu, "MOST_SCORES", 2 * 16 * 40)  # two of the heads

    found = attend(query, key, value, np.array([40, 70]))

    torch.testing.assert_close(found.double(), expected_context(query, key, value, [40, 70]), atol=3e-6, rtol=0)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("window", [None, 20])
def test_scores_beyond_an_exponent_are_shifted_row_by_row(window):
    query, key, value = random_qkv([300, 33], scale=150.0)
    query[:64] /= 1000.0  # not these
    expected = expected_context(query, key, value, [300, 33], window=window)
    largest = float((query[64:300].transpose(0, 1) @ key[64:300].transpose(0, 1).transpose(1, 2)).max())
    assert largest > 200.0

    found = attend(query, key, value, np.array([300, 33]), window=window)

    # a float's noise in a score of hundreds is 1e-4 or so, and weights double from one score to the next
    assert float((found.double() - expected).abs().max()) < 1e-3


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_chunk_and_shows(wrong, precision):
    lengths = [20, 40, 20]
    query, key, value = random_qkv(lengths, dtype=DTYPES[precision])
    expected = attend(query, key, value, np.array(lengths))
    key[30] = wrong

    found = attend(query, key, value, np.array(lengths))

    assert torch.equal(found[:20], expected[:20])
    assert torch.equal(found[60:], expected[60:])
    assert not torch.isfinite(found[20:60]).all(dim=(1, 2)).any()


def test_the_kernel_serves_where_it_can_be_compiled():
    has_all = shutil.which("cc") is not None and torch.cpu._is_avx512_supported()

    assert uses_kernel(64, torch.float32) == has_all
    assert not uses_kernel(4096, torch.float32)
    assert not uses_kernel(33, torch.bfloat16)


def test_matrix_units_are_left_to_the_operators(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)

    assert not uses_kernel(64, torch.bfloat16)


def test_an_installation_without_the_kernel_works_and_says_so(monkeypatch, caplog):
    query, key, value = random_qkv([7, 30])
    expected = attend(query, key, value, np.array([7, 30]))
    attention_cpu.load_kernel.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)

    with caplog.at_level(logging.WARNING):
        found = attend(query, key, value, np.array([7, 30]))
    attention_cpu.load_kernel.cache_clear()

    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert "installed without a C compiler" in caplog.text
