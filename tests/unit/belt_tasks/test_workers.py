"""Workers: every chunk once, whoever encodes it; out of memory halves; the first error ends all."""

import threading
import time

import joblib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from belt_tasks.batches import MiniBatch, plan_batches
from belt_tasks.workers import encode_all

CPU = torch.device("cpu")


class FakeEncoder:
    """The output of a chunk is its first token and how long it is; mini-batches above `most_tokens` do not fit."""

    device, batch_tokens, pads = CPU, 64, False

    def __init__(self, most_tokens=10**9, error=None):
        self.most_tokens, self.error, self.sizes, self.threads = most_tokens, error, [], set()

    def encode(self, batch):
        self.threads.add(threading.get_ident())
        if self.error is not None:
            raise self.error
        self.sizes.append(len(batch.input_ids_T))
        if len(batch.input_ids_T) > self.most_tokens:
            raise torch.OutOfMemoryError("not that many")
        first_B = np.cumsum(batch.num_tokens_B) - batch.num_tokens_B
        return torch.stack([batch.input_ids_T[first_B], torch.from_numpy(batch.num_tokens_B)], dim=1).float()


def make_batch(rows_B, num_tokens_C):
    ids = np.repeat(rows_B, num_tokens_C[rows_B])
    return MiniBatch(rows_B=rows_B, input_ids_T=torch.from_numpy(ids), num_tokens_B=num_tokens_C[rows_B], pad_id=0)


def encode(encoder, num_tokens_C, *, budget=64, on_done=lambda _: None):
    plan = plan_batches(num_tokens_C, max_batch_tokens=budget)
    return encode_all(encoder, plan, lambda rows_B: make_batch(rows_B, num_tokens_C), on_done=on_done)


@pytest.fixture(autouse=True)
def many_cores(monkeypatch):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 64)


@pytest.fixture(params=[1, 3])
def cores(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("cores")
@pytest.mark.parametrize("most_tokens", [10, 20, 63, 10**9])
def test_every_chunk_is_encoded_into_its_row(most_tokens):
    num_tokens_C = np.random.default_rng(0).integers(1, 10, 200)
    done = []

    found = encode(FakeEncoder(most_tokens), num_tokens_C, on_done=done.append)

    expected = np.stack([np.arange(200), num_tokens_C], axis=1)
    np.testing.assert_array_equal(found.numpy(), expected)
    np.testing.assert_array_equal(np.sort(np.concatenate(done)), np.arange(200))


@given(num_tokens=st.lists(st.integers(1, 50), min_size=1, max_size=60).map(np.array), budget=st.integers(1, 500))
def test_no_budget_changes_a_row(num_tokens, budget):
    found = encode(FakeEncoder(), num_tokens, budget=budget)

    np.testing.assert_array_equal(found[:, 1].numpy(), num_tokens)


@pytest.mark.parametrize("share_of_container", [64, 4, 2])
def test_several_cores_have_several_workers(monkeypatch, share_of_container):
    monkeypatch.setattr(joblib, "cpu_count", lambda: share_of_container)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    encoder = FakeEncoder()
    plain = encoder.encode

    def slowly(batch):
        time.sleep(0.005)
        assert torch.get_num_threads() == 1
        return plain(batch)

    encoder.encode = slowly
    try:
        encode(encoder, np.full(200, 8))
    finally:
        torch.set_num_threads(before)

    assert len(encoder.threads) == min(4, share_of_container)


def test_out_of_memory_lowers_the_budget_of_all_that_follow(cores):
    encoder = FakeEncoder(most_tokens=20)

    encode(encoder, np.full(100, 8), budget=64)

    assert sum(size > 20 for size in encoder.sizes) <= 2 * cores  # not once more for every mini-batch


@pytest.mark.usefixtures("cores")
def test_one_chunk_that_does_not_fit_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        encode(FakeEncoder(most_tokens=7), np.full(10, 8))


@pytest.mark.usefixtures("cores")
def test_an_error_in_one_worker_ends_all_of_them():
    encoder = FakeEncoder(error=ValueError("broken"))

    with pytest.raises(ValueError, match="broken"):
        encode(encoder, np.full(10_000, 8))

    assert len(encoder.sizes) == 0
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("encode")]


def test_what_a_listener_raises_ends_all_of_them(cores):
    def stop(_):
        raise KeyboardInterrupt

    encoder = FakeEncoder()
    with pytest.raises(KeyboardInterrupt):
        encode(encoder, np.full(10_000, 8), on_done=stop)

    assert len(encoder.sizes) <= 2 * cores
