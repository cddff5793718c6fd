"""The bounded-memory step against one pass over everything: the same numbers, in one mini-batch's memory."""

import weakref

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from belt_tasks import data_parallel, dropout, heads
from belt_tasks.encoder import ChunkModel, load_body
from belt_tasks.errors import ConfigError
from belt_tasks.scoring import pool_windows
from belt_tasks.specs import BatchSpec, ChunkSpec, Head, PoolingSpec, TrainSpec
from belt_tasks.tokens import load_tokenizer
from belt_tasks.trainer import Trainer
from belt_tasks.training_set import TrainingSet
from tests.conftest import FAMILIES, words

TASKS = {
    "binary": Head(task="binary", labels=("no", "yes")),
    "multiclass": Head(task="multiclass", labels=("a", "b", "c")),
    "multilabel": Head(task="multilabel", labels=("a", "b")),
    "regression": Head(task="regression", labels=("stars",)),
}
TEXTS = [words(90, seed=1), "", words(40, seed=2)]
CHUNKS = ChunkSpec(chunk_size=12, stride=9)


@pytest.fixture
def ranks(request):
    with data_parallel.alone("cpu", getattr(request, "param", "fp32")) as alone:
        yield alone


def target_of(task, num_documents, seed=0):
    rng = np.random.default_rng(seed)
    match task:
        case "binary" | "multiclass":
            return rng.integers(len(TASKS[task].labels), size=num_documents)
        case "multilabel":
            return rng.random((num_documents, 2)) < 0.5
        case "regression":
            return rng.normal(size=num_documents)


def make_trainer(
    encoder,
    ranks,
    *,
    task="multiclass",
    dropout=0.0,
    max_batch_tokens=40,
    dtype=torch.float64,
    texts=TEXTS,
    chunks=CHUNKS,
    weights=None,
    **pooling,
):
    head = TASKS[task]
    spec = TrainSpec(
        chunks=chunks,
        pooling=PoolingSpec(**pooling),
        batches=BatchSpec(max_batch_tokens=max_batch_tokens),
        dropout=dropout,
        redraw_chunks=chunks.selection == "random_k",
    )
    torch.manual_seed(0)
    tokenizer = load_tokenizer(encoder)
    tokens = tokenizer.tokenize(texts)
    model = ChunkModel(load_body(encoder, dropout=dropout), num_logits=head.num_logits, pooling=spec.pooling)
    return Trainer(
        model=model.to(dtype).train(),
        training_set=TrainingSet(
            doc_ids=list(map(str, range(len(texts)))),
            input_ids_T=tokens.input_ids_T,
            first_token_D=tokens.offsets[:-1],
            num_tokens_D=tokens.num_tokens_D,
            document_seed_D=np.arange(len(texts)),
            target=target_of(task, len(texts)),
            head=head,
            fingerprint="",
        ),
        special=tokenizer.special,
        spec=spec,
        ranks=ranks,
        weight_D=weights,
    )


def one_pass(trainer, epoch=0):
    """Loss and gradients from one graph over one mini-batch of all chunks, with nothing of belt's gradient code."""
    documents = np.arange(len(trainer.training_set.doc_ids))
    windows, chunks = trainer.chunks(documents, epoch)
    batch, key_C = chunks.inputs(np.arange(len(chunks)))
    with dropout.keyed(key_C):
        outputs = trainer.model(*batch.padded())
    head = trainer.training_set.head
    pooled = pool_windows(outputs, windows, spec=trainer.spec.pooling, head=head)
    losses = heads.losses(pooled, torch.from_numpy(trainer.training_set.target), head)
    weights = torch.ones_like(losses) if trainer.weight_D is None else torch.from_numpy(trainer.weight_D)
    loss = (losses * weights).mean()
    loss.backward()
    return loss.item(), gradients(trainer)


def gradients(trainer):
    found = {name: weight.grad for name, weight in trainer.model.named_parameters() if weight.grad is not None}
    trainer.model.zero_grad(set_to_none=True)
    return found


def bounded(trainer, epoch=0):
    documents = np.arange(len(trainer.training_set.doc_ids))
    loss = trainer.add_gradient(documents, epoch=epoch, weight=1.0, is_last=True)
    return loss, gradients(trainer)


def count_forwards(trainer):
    """The number of chunks of every forward from now on."""
    sizes = []
    trainer.model.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    return sizes


def assert_same(found, expected, *, tolerance):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("space", ["logits", "probabilities"])
@pytest.mark.parametrize("strategy", ["mean", "max", "length_weighted_mean", "attention"])
@pytest.mark.parametrize("task", TASKS)
def test_the_gradient_equals_that_of_one_pass(tiny_encoder, ranks, task, strategy, space):
    trainer = make_trainer(tiny_encoder, ranks, task=task, pooling_strategy=strategy, pooling_space=space)
    sizes = count_forwards(trainer)

    loss, found = bounded(trainer)
    assert len(sizes) > 3
    expected_loss, expected = one_pass(trainer)

    assert loss == pytest.approx(expected_loss, abs=1e-12)
    assert_same(found, expected, tolerance=1e-10)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_words=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    chunk_size=st.integers(1, 20),
    stride_share=st.floats(0.1, 1.0),
    selection=st.sampled_from(["all", "head", "head_tail", "random_k"]),
    task=st.sampled_from(list(TASKS)),
    strategy=st.sampled_from(["mean", "max", "length_weighted_mean", "attention"]),
    space=st.sampled_from(["logits", "probabilities"]),
    max_batch_tokens=st.integers(1, 120),
    dropped=st.sampled_from([0.0, 0.3]),
    epoch=st.integers(0, 3),
    is_weighted=st.booleans(),
)
def test_it_does_for_every_shape_selection_and_dropout(
    tiny_encoder,
    ranks,
    num_words,
    chunk_size,
    stride_share,
    selection,
    task,
    strategy,
    space,
    max_batch_tokens,
    dropped,
    epoch,
    is_weighted,
):
    trainer = make_trainer(
        tiny_encoder,
        ranks,
        task=task,
        dropout=dropped,
        max_batch_tokens=max_batch_tokens,
        texts=[words(number, seed=seed) for seed, number in enumerate(num_words)],
        chunks=ChunkSpec(
            chunk_size=chunk_size,
            stride=max(1, int(chunk_size * stride_share)),
            selection=selection,
            num_random_chunks=2,
        ),
        weights=np.linspace(0.5, 2.0, len(num_words)) if is_weighted else None,
        pooling_strategy=strategy,
        pooling_space=space,
    )

    loss, found = bounded(trainer, epoch)
    expected_loss, expected = one_pass(trainer, epoch)

    assert loss == pytest.approx(expected_loss, abs=1e-12)
    assert_same(found, expected, tolerance=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", ["mean", "max", "attention"])
def test_with_dropout_every_family_of_encoders_has_the_same_gradient(tiny_encoders, ranks, strategy, family):
    trainer = make_trainer(tiny_encoders(family), ranks, dropout=0.1, dtype=torch.float32, pooling_strategy=strategy)
    torch.manual_seed(5)
    expected_after = torch.rand(3)

    torch.manual_seed(5)
    loss, found = bounded(trainer)
    after = torch.rand(3)
    expected_loss, expected = one_pass(trainer)

    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_same(found, expected, tolerance=1e-5)
    assert torch.equal(after, expected_after)  # nothing was drawn from PyTorch's stream
    assert bounded(trainer, epoch=1)[0] != loss  # dropout is on, and another epoch drops other numbers


@pytest.mark.parametrize("ranks", ["bf16"], indirect=True)
@pytest.mark.parametrize("max_batch_tokens", [40, 100_000], ids=["two passes", "one pass"])
def test_bf16_autocast_has_the_gradient_of_one_pass_under_autocast(tiny_encoder, ranks, max_batch_tokens):
    trainer = make_trainer(tiny_encoder, ranks, dropout=0.1, dtype=torch.float32, max_batch_tokens=max_batch_tokens)
    kinds = set()
    trainer.model.head.linear.register_forward_hook(lambda _, __, output: kinds.add(output.dtype))

    loss, found = bounded(trainer)
    assert kinds == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        expected_loss, expected = one_pass(trainer)

    assert loss == pytest.approx(expected_loss, rel=1e-2)
    difference = torch.stack([(found[name] - gradient).norm() for name, gradient in expected.items()]).norm()
    assert difference < 0.03 * torch.stack([gradient.norm() for gradient in expected.values()]).norm()


def test_documents_add_up_by_their_weights(tiny_encoder, ranks):
    trainer = make_trainer(tiny_encoder, ranks)
    _, together = bounded(trainer)

    for document in range(3):
        trainer.add_gradient(np.array([document]), epoch=0, weight=1 / 3, is_last=document == 2)

    assert_same(gradients(trainer), together, tolerance=1e-10)


def test_a_document_that_weighs_twice_counts_as_two(tiny_encoder, ranks):
    weighted = make_trainer(tiny_encoder, ranks, weights=np.array([2.0, 0.5, 0.5]))
    _, found = bounded(weighted)

    plain = make_trainer(tiny_encoder, ranks)
    for document, weight in enumerate([2.0, 0.5, 0.5]):
        plain.add_gradient(np.array([document]), epoch=0, weight=weight / 3, is_last=True)

    assert_same(found, gradients(plain), tolerance=1e-10)


def test_one_mini_batch_is_forwarded_once_and_several_twice(tiny_encoder, ranks):
    for budget, times in ((100_000, 1), (40, 2)):
        trainer = make_trainer(tiny_encoder, ranks, max_batch_tokens=budget, dtype=torch.float32)
        sizes = count_forwards(trainer)

        bounded(trainer)

        assert sum(sizes) == trainer.windows.num_chunks * times


@pytest.mark.parametrize("dropped", [0.0, 0.3])
def test_with_max_pooling_only_chunks_that_won_are_forwarded_again(tiny_encoder, ranks, dropped):
    """Two labels of three documents have six winners at most, whatever shares their mini-batches."""
    trainer = make_trainer(
        tiny_encoder, ranks, task="multilabel", dropout=dropped, max_batch_tokens=56, pooling_strategy="max"
    )
    sizes = count_forwards(trainer)

    bounded(trainer)

    assert trainer.windows.num_chunks > 15
    assert trainer.windows.num_chunks < sum(sizes) <= trainer.windows.num_chunks + 6


def test_redrawn_chunks_are_others_in_every_epoch_and_the_same_again(tiny_encoder, ranks):
    chunks = CHUNKS.model_copy(update={"selection": "random_k", "num_random_chunks": 2})
    trainer = make_trainer(tiny_encoder, ranks, chunks=chunks)

    drawn = [tuple(trainer.chunks(np.array([0]), epoch)[0].chunk_index_C) for epoch in (0, 1, 2, 3, 0)]

    assert all(len(indexes) == 2 for indexes in drawn)
    assert len(set(drawn)) > 1
    assert drawn[0] == drawn[-1]
    kept = trainer.windows.of_documents(np.array([0])).chunk_index_C
    assert len(kept) == 2  # evaluation draws as scoring does


def test_every_chunk_of_every_document_has_a_key_of_its_own_in_every_epoch_and_seed(tiny_encoder, ranks):
    seen = []
    for seed in (0, 1):
        trainer = make_trainer(tiny_encoder, ranks)
        trainer.spec = trainer.spec.model_copy(update={"seed": seed})
        for epoch in range(3):
            for documents in ([0, 1, 2], [2, 0]):  # whoever comes with it
                _, chunks = trainer.chunks(np.array(documents), epoch)
                _, key_C = chunks.inputs(np.arange(len(chunks)))
                seen.append(key_C.tolist())
            assert set(seen[-1]) < set(seen[-2])

    keys = [key for together in seen[::2] for key in together]
    assert len(set(keys)) == len(keys) == 2 * 3 * trainer.windows.num_chunks


def test_an_encoder_that_draws_on_its_own_is_refused(tiny_encoder, ranks):
    trainer = make_trainer(tiny_encoder, ranks, dtype=torch.float32)
    trainer.model.body.embeddings.register_forward_hook(lambda _, __, output: output + torch.rand_like(output))

    with pytest.raises(ConfigError, match="draws random numbers that belt cannot repeat"):
        bounded(trainer)


class Saved:
    """A tensor that a graph holds for its backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize("dropped", [0.0, 0.1])
def test_never_more_than_one_mini_batch_has_a_graph(tiny_encoder, ranks, dropped):
    """What the graph holds at most does not grow with the number of chunks."""
    most = {}
    for num_words in (50, 400):
        trainer = make_trainer(
            tiny_encoder, ranks, dtype=torch.float32, dropout=dropped, texts=[words(num_words), "", words(3)]
        )
        held, counts = weakref.WeakSet(), []

        def pack(tensor, held=held, counts=counts):
            saved = Saved(tensor)
            held.add(saved)
            counts.append(sum(each.tensor.numel() for each in held))
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            bounded(trainer)
            most["bounded", num_words] = max(counts)
            counts.clear()
            one_pass(trainer)
            most["one pass", num_words] = max(counts)

    assert most["bounded", 400] <= 1.1 * most["bounded", 50]
    assert most["one pass", 400] > 3 * most["one pass", 50]
