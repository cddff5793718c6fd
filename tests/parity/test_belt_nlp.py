"""Parity with belt-nlp 1.1.0, the reference implementation of the method.

Deliberate differences, each with its test: a document never loses all its chunks; special-token strings in a text are
text; special tokens and padding come from the model instead of being BERT's ids.
"""

import json
from functools import partial

import belt_nlp.bert
import numpy as np
import pytest
import torch
from belt_nlp.bert import BertNN
from belt_nlp.bert_classifier_with_pooling import BertClassifierWithPooling
from belt_nlp.bert_regressor_with_pooling import BertRegressorWithPooling
from belt_nlp.splitting import split_overlapping, transform_single_text
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.data import Sampler
from transformers import AutoConfig, AutoModel, AutoTokenizer

from belt_tasks import data_parallel, scoring, training_loop
from belt_tasks.batches import collate
from belt_tasks.checkpoint import Checkpoint
from belt_tasks.encoder import ChunkModel, load_body
from belt_tasks.specs import BatchSpec, ChunkSpec, Head, PoolingSpec, ScoreSpec, TrainSpec
from belt_tasks.tokens import load_tokenizer
from belt_tasks.trainer import Trainer
from belt_tasks.training_loop import TrainingLoop
from belt_tasks.training_set import TrainingSet
from belt_tasks.windows import chunk_windows
from tests.conftest import save_tiny_encoder, words

TEXTS = [words(n, seed=n) for n in (220, 12, 1, 60, 130, 40)]
WINDOWS = {"chunk_size": 100, "stride": 80, "minimal_chunk_length": 20}


@given(
    num_tokens=st.integers(0, 400),
    chunk_size=st.integers(1, 60),
    data=st.data(),
)
def test_windows_equal_wherever_belt_nlp_keeps_any(num_tokens, chunk_size, data):
    stride, minimum = data.draw(st.integers(1, chunk_size)), data.draw(st.integers(1, chunk_size))
    tokens = torch.arange(num_tokens)
    theirs = [chunk.tolist() for chunk in split_overlapping(tokens, chunk_size, stride, minimum)]
    assume(theirs)

    spec = ChunkSpec(chunk_size=chunk_size, stride=stride, minimal_chunk_length=minimum)
    windows = chunk_windows(np.array([num_tokens]), spec)

    ours = [list(range(start, stop)) for start, stop in zip(windows.start_C, windows.stop_C, strict=True)]
    assert ours == theirs


def test_where_belt_nlp_drops_every_chunk_belt_keeps_the_first():
    assert split_overlapping(torch.arange(8), 10, 5, 10) == []

    windows = chunk_windows(np.array([8]), ChunkSpec(chunk_size=10, stride=5, minimal_chunk_length=10))

    assert (windows.start_C.tolist(), windows.stop_C.tolist()) == ([0], [8])


@pytest.mark.parametrize("text", [*TEXTS, "", "Crème brûlée!!! 漢字 \x00 👩‍👩‍👧"])
@pytest.mark.parametrize("maximal_text_length", [None, 133])
def test_input_ids_equal_those_of_belt_nlp(minilm, text, maximal_text_length):
    their_tokenizer = AutoTokenizer.from_pretrained(minilm)
    their_ids, their_mask = transform_single_text(
        text, their_tokenizer, *WINDOWS.values(), maximal_text_length=maximal_text_length
    )

    tokenizer = load_tokenizer(minilm)
    tokens = tokenizer.tokenize([text])
    windows = chunk_windows(tokens.num_tokens_D, ChunkSpec(**WINDOWS, maximal_text_length=maximal_text_length))
    ours = collate(
        np.arange(windows.num_chunks),
        input_ids_T=tokens.input_ids_T,
        windows=windows,
        first_token_D=tokens.offsets[:-1],
        special=tokenizer.special,
    )

    input_ids_BT, attention_mask_BT = ours.padded()
    width = input_ids_BT.shape[1]  # they pad to 512, belt to the longest
    assert torch.equal(input_ids_BT, their_ids[:, :width])
    assert torch.equal(attention_mask_BT, their_mask[:, :width].long())
    assert not their_mask[:, width:].any()


def test_what_belt_nlp_reads_as_a_special_token_is_text_to_belt(minilm):
    theirs, _ = transform_single_text("a [SEP] b", AutoTokenizer.from_pretrained(minilm), *WINDOWS.values(), None)

    ours = load_tokenizer(minilm).tokenize(["a [SEP] b"]).input_ids_T.tolist()

    assert theirs[0].tolist().count(102) == 2
    assert 102 not in ours


@pytest.fixture(scope="module")
def wide_encoder(tmp_path_factory):
    """A tiny BERT that reads 512 tokens and has belt-nlp's hidden size of 768, which that has in its code."""
    sizes = {"max_position_embeddings": 512, "hidden_size": 768, "num_attention_heads": 12}
    folder = tmp_path_factory.mktemp("wide")
    return save_wide_encoder(folder, sizes)


def save_wide_encoder(folder, sizes):
    save_tiny_encoder(folder, "bert", dropout=0.0)
    config = json.loads((folder / "config.json").read_text())
    # the ids that belt-nlp has in its code have to exist
    config |= sizes | {"vocab_size": 500}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def their_special_ids(monkeypatch):
    """The tiny tokenizer's [CLS] and [SEP] are 2 and 3; belt-nlp's are 101 and 102 whatever the model."""

    def add(chunks, masks):
        if not chunks:
            chunks.append(torch.tensor([2.0, 3.0]))
            masks.append(torch.ones(2))
            return
        for i, chunk in enumerate(chunks):
            chunks[i] = torch.cat([torch.tensor([2.0]), chunk, torch.tensor([3.0])])
            masks[i] = torch.cat([torch.ones(1), masks[i], torch.ones(1)])

    monkeypatch.setattr(belt_nlp.splitting, "add_special_tokens_at_beginning_and_end", add)


@pytest.fixture
def ranks():
    with data_parallel.alone("cpu", "fp32") as alone:
        yield alone


def twins(encoder, ranks, *, strategy, num_labels, learning_rate=1e-4, epochs=1, batch_size=2, accumulation_steps=1):
    """belt-nlp's model and belt's trainer over the same weights."""
    torch.manual_seed(3)
    network = BertNN(AutoModel.from_pretrained(encoder, dtype=torch.float32), num_labels)
    kind = BertRegressorWithPooling if num_labels == 1 else partial(BertClassifierWithPooling, num_labels=num_labels)
    theirs = kind(
        batch_size=batch_size,
        learning_rate=learning_rate,
        epochs=epochs,
        accumulation_steps=accumulation_steps,
        pooling_strategy=strategy,
        tokenizer=AutoTokenizer.from_pretrained(encoder),
        neural_network=network,
        device="cpu",
        **WINDOWS,
    )
    spec = TrainSpec(
        chunks=ChunkSpec(**WINDOWS),
        pooling=PoolingSpec(pooling_strategy=strategy),
        batches=BatchSpec(max_batch_tokens=300),
        learning_rate=learning_rate,
        epochs=epochs,
        documents_per_batch=batch_size,
        accumulation_steps=accumulation_steps,
        schedule="constant",
        warmup_fraction=0.0,
        weight_decay=0.0,
        max_grad_norm=None,
        dropout=0.0,
    )
    if num_labels == 1:
        head, target = Head(task="regression", labels=("stars",)), np.array([0.5, 1.0, -1.0, 2.0, 0.0, 1.5])
    else:
        head = Head(task="multiclass", labels=tuple("abc"[:num_labels]))
        target = np.array([0, 1, 2, 0, 1, 1]) % num_labels
    tokenizer = load_tokenizer(encoder)
    tokens = tokenizer.tokenize(TEXTS)
    model = ChunkModel(load_body(encoder, dropout=0.0), num_logits=head.num_logits, pooling=spec.pooling)
    model.head.linear.load_state_dict(network.linear.state_dict())
    trainer = Trainer(
        model=model,
        training_set=TrainingSet(
            doc_ids=list(map(str, range(len(TEXTS)))),
            input_ids_T=tokens.input_ids_T,
            first_token_D=tokens.offsets[:-1],
            num_tokens_D=tokens.num_tokens_D,
            document_seed_D=np.arange(len(TEXTS)),
            target=target,
            head=head,
            fingerprint="",
        ),
        special=tokenizer.special,
        spec=spec,
        ranks=ranks,
    )
    return theirs, trainer, tokenizer


def predict(trainer, tokenizer):
    checkpoint = Checkpoint(
        model=trainer.model.eval(),
        tokenizer=tokenizer,
        head=trainer.training_set.head,
        chunks=trainer.spec.chunks,
        pooling=trainer.spec.pooling,
        digest="",
        uri="twin",
    )
    return scoring.score_texts(TEXTS, checkpoint, ScoreSpec(batches=BatchSpec(max_batch_tokens=900)))


@pytest.mark.usefixtures("their_special_ids")
@pytest.mark.parametrize("strategy", ["mean", "max"])
@pytest.mark.parametrize("num_labels", [1, 3])
def test_pooled_logits_equal_for_the_same_weights(wide_encoder, ranks, strategy, num_labels):
    theirs, trainer, tokenizer = twins(wide_encoder, ranks, strategy=strategy, num_labels=num_labels)

    ours = predict(trainer, tokenizer)

    np.testing.assert_allclose(ours.logits_DL, theirs._predict_logits(TEXTS, batch_size=2), atol=1e-4)
    assert np.ptp(ours.logits_DL, axis=0).min() > 1e-2  # the documents do differ
    if num_labels > 1:
        np.testing.assert_allclose(ours.scores_DL, theirs.predict_scores(TEXTS), atol=1e-4)
        assert ours.scores_DL.argmax(axis=1).tolist() == theirs.predict(TEXTS).tolist()


def test_pooled_logits_equal_for_real_weights(minilm):
    """belt-nlp's head is 768 wide, MiniLM 384: it gets a head of the right width from outside."""
    torch.manual_seed(0)
    network = BertNN(AutoModel.from_pretrained(minilm, dtype=torch.float32), 2)
    network.linear = torch.nn.Linear(384, 2)
    theirs = BertClassifierWithPooling(
        num_labels=2,
        batch_size=1,
        learning_rate=1e-5,
        epochs=1,
        tokenizer=AutoTokenizer.from_pretrained(minilm),
        neural_network=network,
        device="cpu",
        **WINDOWS,
    )
    model = ChunkModel(load_body(minilm), num_logits=2, pooling=PoolingSpec())
    model.head.linear.load_state_dict(network.linear.state_dict())
    checkpoint = Checkpoint(
        model=model.eval(),
        tokenizer=load_tokenizer(minilm),
        head=Head(task="multiclass", labels=("a", "b")),
        chunks=ChunkSpec(**WINDOWS),
        pooling=PoolingSpec(),
        digest="",
        uri="minilm",
    )

    ours = scoring.score_texts([*TEXTS, ""], checkpoint, ScoreSpec())

    np.testing.assert_allclose(ours.logits_DL, theirs._predict_logits([*TEXTS, ""]), atol=1e-4)


class GivenOrder(Sampler):
    """belt-nlp's data loader in the order of belt's epochs."""

    epoch = 0

    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        order = training_loop.epoch_order(len(self.dataset), seed=0, epoch=GivenOrder.epoch)
        GivenOrder.epoch += 1
        return iter(order.tolist())

    def __len__(self):
        return len(self.dataset)


@pytest.mark.parametrize("accumulation_steps", [1, 3])
@pytest.mark.usefixtures("their_special_ids")
@pytest.mark.parametrize("strategy", ["mean", "max"])
@pytest.mark.parametrize("num_labels", [1, 3])
def test_fine_tuning_gives_the_same_losses_and_weights(
    wide_encoder, ranks, monkeypatch, strategy, num_labels, accumulation_steps
):
    theirs, trainer, _ = twins(
        wide_encoder, ranks, strategy=strategy, num_labels=num_labels, epochs=2, accumulation_steps=accumulation_steps
    )
    monkeypatch.setattr(belt_nlp.bert, "RandomSampler", GivenOrder)
    monkeypatch.setattr(belt_nlp.bert, "AdamW", partial(torch.optim.AdamW, weight_decay=0.0))
    monkeypatch.setattr(GivenOrder, "epoch", 0)
    their_losses = []
    for name in ("CrossEntropyLoss", "MSELoss"):
        monkeypatch.setattr(belt_nlp.bert, name, partial(recorded, getattr(torch.nn, name), their_losses))

    target = trainer.training_set.target
    theirs.fit(TEXTS, target.tolist())
    our_losses = [
        loss for losses in TrainingLoop(trainer=trainer, documents=np.arange(len(TEXTS))).epochs() for loss in losses
    ]

    assert len(our_losses) == len(their_losses) == 6
    np.testing.assert_allclose(our_losses, their_losses, atol=1e-4)
    assert abs(our_losses[0] - our_losses[3]) > 1e-2  # something was learned
    torch.testing.assert_close(trainer.model.head.linear.weight, theirs.neural_network.linear.weight, atol=1e-4, rtol=0)


def recorded(kind, losses):
    loss_function = kind()

    def call(*args):
        loss = loss_function(*args)
        losses.append(loss.item())
        return loss

    return call
