"""The bounded-memory step against one pass over everything: the same numbers."""

import weakref

import numpy as np
import pytest
import torch

from belt_tasks import heads
from belt_tasks.encoder import ChunkModel, load_body
from belt_tasks.fine_tuning import Trainer
from belt_tasks.scoring import pool_windows
from belt_tasks.specs import BatchSpec, ChunkSpec, Head, PoolingSpec, TrainSpec
from belt_tasks.tokens import load_tokenizer
from belt_tasks.training_set import TrainingSet
from belt_tasks.windows import chunk_windows
from tests.conftest import FAMILIES, words

TASKS = {
    "binary": (Head(task="binary", labels=("no", "yes")), np.array([0, 1, 1])),
    "multiclass": (Head(task="multiclass", labels=("a", "b", "c")), np.array([2, 0, 1])),
    "multilabel": (Head(task="multilabel", labels=("a", "b")), np.array([[True, False], [False, False], [True, True]])),
    "regression": (Head(task="regression", labels=("stars",)), np.array([0.5, -1.0, 3.0])),
}
TEXTS = [words(90, seed=1), "", words(40, seed=2)]


def make_trainer(
    encoder, *, task="multiclass", dropout=0.0, max_batch_tokens=40, dtype=torch.float64, texts=TEXTS, **pooling
):
    head, target = TASKS[task]
    spec = TrainSpec(
        chunks=ChunkSpec(chunk_size=12, stride=9),
        pooling=PoolingSpec(**pooling),
        batches=BatchSpec(max_batch_tokens=max_batch_tokens),
        dropout=dropout,
    )
    torch.manual_seed(0)
    tokenizer = load_tokenizer(encoder)
    tokens = tokenizer.tokenize(texts)
    model = ChunkModel(load_body(encoder, dropout=dropout), num_logits=head.num_logits, pooling=spec.pooling)
    return Trainer(
        model=model.to(dtype).train(),
        training_set=TrainingSet(
            doc_ids=["a", "b", "c"],
            input_ids_T=tokens.input_ids_T,
            offsets=tokens.offsets,
            document_seed_D=np.arange(3),
            target=target,
            head=head,
            fingerprint="",
        ),
        windows=chunk_windows(tokens.num_tokens_D, spec.chunks),
        special=tokenizer.special,
        spec=spec,
        device=torch.device("cpu"),
    )


def one_pass(trainer):
    """Loss and gradients from one graph over all mini-batches, with nothing of belt's gradient code."""
    documents = np.arange(3)
    batches = trainer._mini_batches(documents, trainer.windows)
    outputs = torch.cat([trainer.model(*batch.padded()) for batch in batches])
    order = torch.argsort(torch.cat([torch.from_numpy(batch.rows_B) for batch in batches]))
    head = trainer.training_set.head
    pooled = pool_windows(outputs[order], trainer.windows, spec=trainer.spec.pooling, head=head)
    loss = heads.loss(pooled, torch.from_numpy(trainer.training_set.target), head)
    loss.backward()
    return len(batches), loss.item(), gradients(trainer)


def gradients(trainer):
    found = {name: weight.grad for name, weight in trainer.model.named_parameters() if weight.grad is not None}
    trainer.model.zero_grad(set_to_none=True)
    return found


def bounded(trainer):
    loss = trainer.batch_loss(np.arange(3), weight=1.0, scale=lambda loss: loss)
    return loss, gradients(trainer)


def assert_same(found, expected, *, tolerance):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("space", ["logits", "probabilities"])
@pytest.mark.parametrize("strategy", ["mean", "max", "length_weighted_mean", "attention"])
@pytest.mark.parametrize("task", TASKS)
def test_the_gradient_equals_that_of_one_pass(tiny_encoder, monkeypatch, task, strategy, space):
    # outputs stay in float64 here, so that only the arithmetic is compared
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    trainer = make_trainer(tiny_encoder, task=task, pooling_strategy=strategy, pooling_space=space)

    num_batches, expected_loss, expected = one_pass(trainer)
    loss, found = bounded(trainer)

    assert num_batches > 3
    assert loss == pytest.approx(expected_loss, abs=1e-12)
    assert_same(found, expected, tolerance=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", ["mean", "max", "attention"])
def test_with_dropout_and_the_same_random_state_the_gradient_is_the_same(tiny_encoders, strategy, family):
    trainer = make_trainer(tiny_encoders(family), dropout=0.1, dtype=torch.float32, pooling_strategy=strategy)

    torch.manual_seed(5)
    _, expected_loss, expected = one_pass(trainer)
    after = torch.rand(3)
    torch.manual_seed(5)
    loss, found = bounded(trainer)

    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same(found, expected, tolerance=1e-5)
    assert torch.equal(torch.rand(3), after)  # what is random later does not see the second pass


def test_dropout_is_on_in_these_tests(tiny_encoder):
    trainer = make_trainer(tiny_encoder, dropout=0.1, dtype=torch.float32)

    assert bounded(trainer)[0] != bounded(trainer)[0]


def test_documents_add_up_by_their_weights(tiny_encoder):
    trainer = make_trainer(tiny_encoder, dtype=torch.float64)
    _, together = bounded(trainer)

    for document in range(3):
        trainer.batch_loss(np.array([document]), weight=1 / 3, scale=lambda loss: loss)

    assert_same(gradients(trainer), together, tolerance=1e-6)


def test_one_mini_batch_is_forwarded_once_and_several_at_most_twice(tiny_encoder):
    for budget, per_batch in ((100_000, 1), (40, 2)):
        trainer = make_trainer(tiny_encoder, max_batch_tokens=budget, dtype=torch.float32)
        num_batches = len(trainer._mini_batches(np.arange(3), trainer.windows))
        calls = []
        trainer.model.register_forward_hook(lambda *_, calls=calls: calls.append(1))

        bounded(trainer)

        assert len(calls) == num_batches * per_batch


def test_with_max_pooling_only_mini_batches_with_a_winner_are_forwarded_again(tiny_encoder):
    trainer = make_trainer(
        tiny_encoder, task="regression", max_batch_tokens=14, dtype=torch.float32, pooling_strategy="max"
    )
    num_batches = len(trainer._mini_batches(np.arange(3), trainer.windows))
    calls = []
    trainer.model.register_forward_hook(lambda *_: calls.append(1))

    bounded(trainer)

    assert num_batches > 10
    assert num_batches < len(calls) <= num_batches + 3  # one winner for each of three documents


class Saved:
    """A tensor that a graph holds for its backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor


def test_never_more_than_one_mini_batch_has_a_graph(tiny_encoder):
    """What the graph holds at most does not grow with the number of chunks."""
    most = {}
    for num_words in (50, 400):
        trainer = make_trainer(tiny_encoder, dtype=torch.float32, texts=[words(num_words), "", words(3)])
        held, counts = weakref.WeakSet(), []

        def pack(tensor, held=held, counts=counts):
            saved = Saved(tensor)
            held.add(saved)
            counts.append(len(held))
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            bounded(trainer)
            most["bounded", num_words] = max(counts)
            counts.clear()
            one_pass(trainer)
            most["one pass", num_words] = max(counts)

    # pooling holds a few more for itself
    assert most["bounded", 400] <= most["bounded", 50] + 10
    assert most["one pass", 400] > 3 * most["one pass", 50]
