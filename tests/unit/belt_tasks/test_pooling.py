"""Pooling against an independent reference in numpy, one document at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, logsumexp, softmax

from belt_tasks.heads import scores
from belt_tasks.pooling import pool_chunks, winning_chunk
from belt_tasks.specs import Head, PoolingSpec

TASKS = {
    "binary": Head(task="binary", labels=("no", "yes")),
    "multiclass": Head(task="multiclass", labels=("a", "b", "c")),
    "multilabel": Head(task="multilabel", labels=("a", "b", "c")),
    "regression": Head(task="regression", labels=("stars",)),
}
STRATEGIES = ("mean", "max", "length_weighted_mean", "attention")


@st.composite
def chunk_outputs(draw):
    """Counts of chunks per document, outputs with an attention column, and new tokens (an empty document has none)."""
    counts_D = np.array(draw(st.lists(st.integers(1, 6), min_size=1, max_size=5)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.1, 3.0, 60.0]))
    outputs_CK = rng.normal(scale=scale, size=(counts_D.sum(), 4))
    new_tokens_C = rng.integers(0, 5, size=counts_D.sum())
    first_D = np.cumsum(counts_D) - counts_D
    new_tokens_C[first_D[counts_D > 1]] += 1  # only the single chunk of an empty document has no new token
    return counts_D, outputs_CK, new_tokens_C


def reference(outputs_CK, counts_D, new_tokens_C, spec, task):
    """Probabilities (or logits) of each document, by the definitions in words."""
    pooled = []
    for rows in np.split(np.arange(len(outputs_CK)), np.cumsum(counts_D)[:-1]):
        logits, attention = outputs_CK[rows, : TASKS[task].num_logits], outputs_CK[rows, -1]
        weights = {
            "mean": np.ones(len(rows)),
            "max": np.ones(len(rows)),
            "length_weighted_mean": new_tokens_C[rows] if new_tokens_C[rows].sum() else np.ones(len(rows)),
            "attention": softmax(attention),
        }[spec.pooling_strategy]
        values = logits
        if spec.pooling_space == "probabilities" and task != "regression":
            values = softmax(logits, axis=1) if task == "multiclass" else expit(logits)
        pooled.append(
            values.max(axis=0) if spec.pooling_strategy == "max" else np.average(values, axis=0, weights=weights)
        )
    return np.array(pooled)


def pool(outputs_CK, counts_D, new_tokens_C, spec, task):
    outputs_CK = torch.as_tensor(outputs_CK)
    logits_CL = outputs_CK[:, : TASKS[task].num_logits]
    with_attention = torch.cat([logits_CL, outputs_CK[:, -1:]], dim=1)
    return pool_chunks(
        with_attention if spec.pooling_strategy == "attention" else logits_CL,
        torch.from_numpy(np.repeat(np.arange(len(counts_D)), counts_D)),
        torch.from_numpy(new_tokens_C),
        num_documents=len(counts_D),
        spec=spec,
        task=task,
    )


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@given(chunks=chunk_outputs())
def test_pooled_logits_equal_the_reference(chunks, strategy, task):
    counts_D, outputs_CK, new_tokens_C = chunks
    spec = PoolingSpec(pooling_strategy=strategy)

    pooled_DL = pool(outputs_CK, counts_D, new_tokens_C, spec, task)

    np.testing.assert_allclose(
        pooled_DL, reference(outputs_CK, counts_D, new_tokens_C, spec, task), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@given(chunks=chunk_outputs())
def test_pooled_probabilities_equal_the_reference(chunks, strategy, task):
    counts_D, outputs_CK, new_tokens_C = chunks
    spec = PoolingSpec(pooling_strategy=strategy, pooling_space="probabilities")
    expected = reference(outputs_CK, counts_D, new_tokens_C, spec, task)
    if task == "multiclass":  # the largest of several softmaxes need not sum to one
        expected = expected / expected.sum(axis=1, keepdims=True)

    found = scores(pool(outputs_CK, counts_D, new_tokens_C, spec, task), TASKS[task]).numpy()
    found = found[:, 1:] if task == "binary" else found  # the positive label

    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("space", ["logits", "probabilities"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_gradients_are_those_of_finite_differences(task, strategy, space):
    rng = np.random.default_rng(0)
    counts_D = np.array([3, 1, 4])
    outputs_CK = torch.from_numpy(rng.normal(size=(8, 4))).requires_grad_()
    new_tokens_C = np.array([3, 1, 2, 5, 1, 1, 1, 1])
    spec = PoolingSpec(pooling_strategy=strategy, pooling_space=space)

    assert torch.autograd.gradcheck(lambda x: pool(x, counts_D, new_tokens_C, spec, task), outputs_CK)


def test_the_gradient_of_max_goes_to_one_of_equal_chunks():
    outputs_CK = torch.tensor([[1.0], [1.0], [0.0]], requires_grad=True)
    pooled = pool_chunks(
        outputs_CK,
        torch.tensor([0, 0, 0]),
        torch.tensor([1, 1, 1]),
        num_documents=1,
        spec=PoolingSpec(pooling_strategy="max"),
        task="binary",
    )
    pooled.sum().backward()

    assert outputs_CK.grad.flatten().tolist() == [1.0, 0.0, 0.0]


def test_probabilities_that_underflow_still_differ():
    outputs_CK = torch.tensor([[-800.0, 0.0, 0.0], [-900.0, 0.0, 0.0]], dtype=torch.float64)
    pooled = pool_chunks(
        outputs_CK,
        torch.tensor([0, 0]),
        torch.tensor([1, 1]),
        num_documents=1,
        spec=PoolingSpec(pooling_space="probabilities"),
        task="multiclass",
    )

    expected = logsumexp([-800 - np.log(2), -900 - np.log(2)]) - np.log(2)
    assert pooled[0, 0].item() == pytest.approx(expected)


def test_an_empty_document_weighs_its_only_chunk_fully():
    pooled = pool_chunks(
        torch.tensor([[2.0, -1.0]]),
        torch.tensor([0]),
        torch.tensor([0]),
        num_documents=1,
        spec=PoolingSpec(pooling_strategy="length_weighted_mean"),
        task="multiclass",
    )

    assert pooled.tolist() == [[2.0, -1.0]]


def test_the_winning_chunk_is_the_first_of_the_largest():
    winners = winning_chunk(torch.tensor([0.5, 2.0, 2.0, -3.0, -4.0]), torch.tensor([0, 0, 0, 1, 1]), 2)

    assert winners.tolist() == [1, 3]
