"""Ways to compute the gradient of an optimizer step: the same weights, tokens, chunks and loss, and other memory.

Shape letters: B chunks of a mini-batch, C chunks, D documents, K outputs of a chunk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from belt_tasks import encoder
from belt_tasks.data_parallel import Ranks
from belt_tasks.encoder import ChunkModel
from belt_tasks.gradient import Chunks
from belt_tasks.specs import BatchSpec, ChunkSpec, Head, PoolingSpec, TrainSpec
from belt_tasks.tokens import load_tokenizer
from belt_tasks.trainer import Trainer
from belt_tasks.training_set import TrainingSet
from tests.benchmarks.documents import Int64
from tests.benchmarks.protocol import TrainingSetup, UnavailableError
from tests.benchmarks.torch_peers import BELT_NLP_IDS, BELT_NLP_POSITIONS

HEAD = Head(task="multiclass", labels=("a", "b", "c"))
SEED = 0

Pooling = Literal["mean", "max"]
AddGradient = Callable[[], float]
"""Adds the gradient of the mean loss of all documents to the weights; returns the loss."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to compute a gradient."""

    title: str
    pooling: Pooling
    prepare: Callable[[Trainer], AddGradient]
    is_bounded: bool = False
    """Whether its memory ends to grow with a document that fills one mini-batch."""
    padded_to: int | None = None
    """Tokens of every chunk; None pads to the longest."""


def build_model(setup: TrainingSetup, *, dropout: float) -> ChunkModel:
    """The encoder with a new head, the same in every process, in train mode."""
    torch.manual_seed(SEED)
    body = encoder.load_body(setup.encoder, dropout=dropout)
    model = ChunkModel(body, num_logits=HEAD.num_logits, pooling=PoolingSpec())
    return model.to(torch.device(setup.device)).train()


def build_trainer(
    setup: TrainingSetup, model: ChunkModel, ranks: Ranks, lengths: Sequence[int], *, pooling: Pooling, dropout: float
) -> Trainer:
    """A trainer of documents of random tokens, the same in every process.

    Args:
        setup: chunks and mini-batches.
        model: trained as it is.
        ranks: only one.
        lengths: content tokens of each document.
        pooling: of chunk logits.
        dropout: of the model.
    """
    special = load_tokenizer(setup.encoder).special
    ordinary = np.setdiff1d(
        np.arange(model.body.config.vocab_size), [*special.prefix_ids, *special.suffix_ids, special.pad_id]
    )
    num_tokens_D = np.array(lengths, dtype=np.int64)
    num_documents = len(num_tokens_D)
    return Trainer(
        model=model,
        training_set=TrainingSet(
            doc_ids=list(map(str, range(num_documents))),
            input_ids_T=np.random.default_rng(SEED).choice(ordinary, size=num_tokens_D.sum()).astype(np.int32),
            first_token_D=np.cumsum(num_tokens_D) - num_tokens_D,
            num_tokens_D=num_tokens_D,
            document_seed_D=np.arange(num_documents),
            target=np.arange(num_documents) % len(HEAD.labels),
            head=HEAD,
            fingerprint="",
        ),
        special=special,
        spec=TrainSpec(
            chunks=ChunkSpec(chunk_size=setup.chunk_size, stride=setup.chunk_size),
            pooling=PoolingSpec(pooling_strategy=pooling),
            batches=BatchSpec(max_batch_tokens=setup.max_batch_tokens),
            dropout=dropout,
        ),
        ranks=ranks,
    )


def belt(trainer: Trainer) -> AddGradient:
    """The exact step in bounded memory."""
    documents = _documents(trainer)
    trainer.module.train()  # made when it is first asked for
    return lambda: trainer.add_gradient(documents, epoch=0, weight=1.0, is_last=True)


def one_pass(trainer: Trainer) -> AddGradient:
    """One forward and one graph of all chunks: what one writes with PyTorch alone."""

    def add_gradient() -> float:
        _, chunks = trainer.chunks(_documents(trainer), epoch=0)
        return _backward(trainer, _forward(trainer, chunks, np.arange(len(chunks))))

    return add_gradient


def checkpointing(trainer: Trainer) -> AddGradient:
    """Activation checkpointing of every encoder layer: one graph of all chunks that keeps the layers' inputs alone."""

    def add_gradient() -> float:
        _, chunks = trainer.chunks(_documents(trainer), epoch=0)
        plan = chunks.plan(np.arange(len(chunks)))
        trainer.model.body.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        try:
            parts = [_forward(trainer, chunks, rows_B) for rows_B in plan]
            back_C = torch.from_numpy(np.argsort(np.concatenate(plan))).to(trainer.device)
            return _backward(trainer, torch.cat(parts)[back_C])
        finally:
            trainer.model.body.activation_checkpointing_disable()

    return add_gradient


def belt_nlp(trainer: Trainer) -> AddGradient:
    """belt-nlp's own training step, but that its optimizer does not move: all chunks of the batch at once.

    Raises:
        UnavailableError: the model is not one that belt-nlp can run.
    """
    from belt_nlp.bert import BertNN, TokenizedDataset
    from belt_nlp.bert_classifier_with_pooling import BertClassifierWithPooling

    model, special, cut = trainer.model, trainer.special, trainer.spec.chunks
    if (*special.prefix_ids, *special.suffix_ids, special.pad_id) != BELT_NLP_IDS:
        raise UnavailableError("belt-nlp has the ids of BERT's special tokens in its code, and this model has others")
    if (encoder.num_positions(model) or BELT_NLP_POSITIONS) < BELT_NLP_POSITIONS:
        raise UnavailableError("belt-nlp pads every chunk to 512 tokens, more than this model reads")
    network = BertNN(model.body, HEAD.num_logits)
    network.linear = model.head.linear  # belt-nlp's is 768 wide whatever the encoder
    classifier = BertClassifierWithPooling(
        num_labels=HEAD.num_logits,
        batch_size=len(trainer.training_set.doc_ids),
        learning_rate=0.0,
        epochs=1,
        chunk_size=cut.chunk_size,
        stride=cut.stride,
        minimal_chunk_length=1,
        pooling_strategy=trainer.spec.pooling.pooling_strategy,
        tokenizer=_already_tokenized,
        neural_network=network,
        device=str(trainer.device),
    )
    data = TokenizedDataset(classifier._tokenize(_ids(trainer)), trainer.training_set.target.tolist())
    batch = classifier.collate_fn([data[document] for document in range(len(data))])

    def add_gradient() -> float:
        outputs: list[Tensor] = []
        hook = network.register_forward_hook(lambda _, __, output_CK: outputs.append(output_CK.detach()))
        try:
            classifier._train_single_epoch([batch], _Unmoved())
        finally:
            hook.remove()
        return _loss(trainer, outputs[0]).item()

    return add_gradient


WAYS = {
    "belt-mean": Way(title="belt, mean", pooling="mean", prepare=belt, is_bounded=True),
    "belt-max": Way(title="belt, max", pooling="max", prepare=belt, is_bounded=True),
    "one-pass": Way(title="one pass", pooling="mean", prepare=one_pass),
    "checkpointing": Way(title="activation checkpointing", pooling="mean", prepare=checkpointing),
    "belt-nlp": Way(title="belt-nlp 1.1.0", pooling="mean", prepare=belt_nlp, padded_to=BELT_NLP_POSITIONS),
}
REFERENCE = "one-pass"


def gradient_T(model: nn.Module) -> Tensor:
    """All gradients one after the other, on the CPU; they are taken away from the weights."""
    found = torch.cat([weight.grad.flatten().cpu() for weight in model.parameters() if weight.grad is not None])
    model.zero_grad(set_to_none=True)
    return found


class _Unmoved:
    """An optimizer that leaves weights and gradients as they are."""

    def step(self) -> None:
        """Do nothing."""

    def zero_grad(self) -> None:
        """Do nothing."""


def _already_tokenized(ids: Sequence[int], **_: object) -> dict[str, Tensor]:
    """What belt-nlp takes for a tokenizer: a text is a list of ids."""
    input_ids = torch.tensor([ids])
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def _ids(trainer: Trainer) -> list[list[int]]:
    """Content tokens of each document."""
    training_set = trainer.training_set
    spans = zip(training_set.first_token_D, training_set.num_tokens_D, strict=True)
    return [training_set.input_ids_T[first:][:number].tolist() for first, number in spans]


def _documents(trainer: Trainer) -> Int64:
    return np.arange(len(trainer.training_set.doc_ids))


def _forward(trainer: Trainer, chunks: Chunks, rows_B: Int64) -> Tensor:
    """Outputs [B, K] of some chunks, with a graph and the model's own dropout."""
    batch, _ = chunks.inputs(rows_B)
    input_ids_BT, attention_mask_BT = batch.padded()
    return trainer.model(input_ids_BT.to(trainer.device), attention_mask_BT.to(trainer.device))


def _backward(trainer: Trainer, outputs_CK: Tensor) -> float:
    loss = _loss(trainer, outputs_CK)
    loss.backward()
    return loss.item()


def _loss(trainer: Trainer, outputs_CK: Tensor) -> Tensor:
    """The mean loss in PyTorch's own words, with nothing of belt's."""
    parts = outputs_CK.split(np.diff(trainer.windows.doc_offsets).tolist())
    is_mean = trainer.spec.pooling.pooling_strategy == "mean"
    pooled_DL = torch.stack([part.mean(dim=0) if is_mean else part.max(dim=0).values for part in parts])
    return functional.cross_entropy(pooled_DL, torch.from_numpy(trainer.training_set.target).to(trainer.device))
