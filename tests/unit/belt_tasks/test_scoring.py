"""Scoring: each document's own result, whatever shares its mini-batch."""

import numpy as np
import pytest
import torch

from belt_tasks import progress, scoring
from belt_tasks.checkpoint import Checkpoint
from belt_tasks.encoder import ChunkModel, load_body
from belt_tasks.errors import ConfigError
from belt_tasks.specs import BatchSpec, ChunkSpec, Head, PoolingSpec, ScoreSpec
from belt_tasks.tokens import load_tokenizer
from belt_tasks.windows import Windows
from tests.conftest import FAMILIES, words

TEXTS = [words(n, seed=n) for n in (90, 0, 3, 41, 20, 130)]


def make_checkpoint(encoder, *, strategy="mean", space="logits", task="multiclass", chunks=None):
    labels = {"binary": ("no", "yes"), "regression": ("stars",)}.get(task, ("a", "b", "c"))
    head, pooling = Head(task=task, labels=labels), PoolingSpec(pooling_strategy=strategy, pooling_space=space)
    torch.manual_seed(1)
    return Checkpoint(
        model=ChunkModel(load_body(encoder), num_logits=head.num_logits, pooling=pooling).eval(),
        tokenizer=load_tokenizer(encoder),
        head=head,
        chunks=chunks or ChunkSpec(chunk_size=20, stride=13),
        pooling=pooling,
        digest="0" * 64,
        uri="memory",
    )


@pytest.mark.parametrize("strategy", ["mean", "max", "length_weighted_mean", "attention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_alone_scores_as_it_does_among_others(tiny_encoders, family, strategy):
    checkpoint = make_checkpoint(tiny_encoders(family), strategy=strategy)

    together = scoring.score_texts(TEXTS, checkpoint, ScoreSpec(batches=BatchSpec(max_batch_tokens=200)))

    for document, text in enumerate(TEXTS):
        for budget in (1, 100_000):
            alone = scoring.score_texts([text], checkpoint, ScoreSpec(batches=BatchSpec(max_batch_tokens=budget)))
            np.testing.assert_allclose(alone.logits_DL[0], together.logits_DL[document], atol=1e-5)


def test_documents_of_this_test_differ(tiny_encoder):
    found = scoring.score_texts(TEXTS, make_checkpoint(tiny_encoder), ScoreSpec()).scores_DL

    assert len(np.unique(found.round(4), axis=0)) == len(TEXTS)


def one_document(*spans):
    start, stop = np.array(spans).T
    return Windows(
        chunk_index_C=np.arange(len(spans)), start_C=start, stop_C=stop, doc_offsets=np.array([0, len(spans)])
    )


def test_the_top_chunk_gives_the_label_its_highest_probability():
    # the label is "b" (mean logit 5); chunk 0 has the larger logit for it, chunk 1 the larger probability
    outputs = torch.tensor([[6.0, 6.0], [0.0, 4.0]])
    head = Head(task="multiclass", labels=("a", "b"))
    windows = one_document((0, 10), (10, 20))

    mean = scoring.score_windows(outputs, windows, spec=PoolingSpec(), head=head)
    largest = scoring.score_windows(
        outputs + torch.tensor([0.0, 1.0]), windows, spec=PoolingSpec(pooling_strategy="max"), head=head
    )

    assert mean.scores_DL.argmax() == 1
    assert mean.top_chunk_D.tolist() == [1]
    assert largest.top_chunk_D.tolist() == [0]  # of max pooling, the chunk that won


def test_a_chunk_without_weight_is_never_the_top_chunk():
    head = Head(task="binary", labels=("no", "yes"))
    spec = PoolingSpec(pooling_strategy="length_weighted_mean")

    found = scoring.score_windows(
        torch.tensor([[1.0], [2.0], [9.0]]), one_document((0, 10), (5, 15), (10, 15)), spec=spec, head=head
    )

    assert found.top_chunk_D.tolist() == [1]


def test_the_top_chunk_of_a_negative_document_speaks_against():
    found = scoring.score_windows(
        torch.tensor([[1.0], [-9.0]]),
        one_document((0, 10), (10, 20)),
        spec=PoolingSpec(),
        head=Head(task="binary", labels=("no", "yes")),
    )

    assert found.scores_DL.argmax() == 0
    assert found.top_chunk_D.tolist() == [1]


def test_specs_that_do_not_fit_the_checkpoint_are_refused(tiny_encoder):
    with pytest.raises(ConfigError, match="chunk_size must be at most 62"):
        scoring.score_texts(TEXTS, make_checkpoint(tiny_encoder), ScoreSpec(chunks=ChunkSpec()))
    with pytest.raises(ConfigError, match="must not be 'attention' for memory, which was fine-tuned with 'mean'"):
        scoring.score_texts(
            TEXTS, make_checkpoint(tiny_encoder), ScoreSpec(pooling=PoolingSpec(pooling_strategy="attention"))
        )
    with pytest.raises(ConfigError, match="must be 'attention' for memory"):
        scoring.score_texts(
            TEXTS, make_checkpoint(tiny_encoder, strategy="attention"), ScoreSpec(pooling=PoolingSpec())
        )


def test_no_text_is_a_clear_error(tiny_encoder):
    with pytest.raises(ConfigError, match="at least one text, got none"):
        scoring.score_texts([], make_checkpoint(tiny_encoder), ScoreSpec())


def test_random_chunks_of_a_text_do_not_depend_on_its_neighbours(tiny_encoder):
    chunks = ChunkSpec(chunk_size=10, stride=10, selection="random_k", num_random_chunks=2)
    checkpoint = make_checkpoint(tiny_encoder, chunks=chunks)

    together = scoring.score_texts(TEXTS, checkpoint, ScoreSpec())
    alone = scoring.score_texts(TEXTS[-1:], checkpoint, ScoreSpec())

    np.testing.assert_allclose(alone.logits_DL[0], together.logits_DL[-1], atol=1e-5)


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_cpu(tiny_encoder):
    on_cpu = scoring.score_texts(TEXTS, make_checkpoint(tiny_encoder), ScoreSpec(device="cpu"))
    on_gpu = scoring.score_texts(TEXTS, make_checkpoint(tiny_encoder), ScoreSpec(device="cuda"))

    np.testing.assert_allclose(on_gpu.logits_DL, on_cpu.logits_DL, atol=1e-4)


def test_progress_announces_as_many_chunks_as_it_encodes(tiny_encoder):
    reports = []
    with progress.listen(lambda *report: reports.append(report)):
        scoring.score_texts(TEXTS, make_checkpoint(tiny_encoder), ScoreSpec())

    done, announced = (sum(report[i] or 0 for report in reports) for i in (1, 2))
    assert done == announced > len(TEXTS)
