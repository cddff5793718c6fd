"""Scoring: tokens to document scores. Chunks of many documents share mini-batches; results are written by index."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor
from transformers import PreTrainedModel

from belt_tasks import encoder, engine, heads, pooling, prepare, progress, workers
from belt_tasks.batches import collate, num_positions, plan_batches
from belt_tasks.calibration import Calibration, calibrated
from belt_tasks.checkpoint import Checkpoint
from belt_tasks.cost import needed_flops
from belt_tasks.engine import ChunkEncoder
from belt_tasks.errors import ConfigError
from belt_tasks.evidence import CHUNK, ChunkEvidence
from belt_tasks.predictions import DocumentScores
from belt_tasks.receipts import Counts
from belt_tasks.specs import BatchSpec, ChunkSpec, Head, PoolingSpec, ScoreSpec
from belt_tasks.tokens import SpecialTokens, Tokens
from belt_tasks.windows import Windows, chunk_windows

Int64 = npt.NDArray[np.int64]


def encode_windows(
    encoder: ChunkEncoder,
    input_ids_T: npt.NDArray[np.int32],
    windows: Windows,
    *,
    first_token_D: npt.NDArray[np.int64],
    special: SpecialTokens,
    batches: BatchSpec,
    on_share: Callable[[float], None] = lambda _: None,
) -> Tensor:
    """Chunk outputs of all windows: float32 [C, K] on the CPU, in the order of the windows.

    Out of memory on the device, a mini-batch is halved, down to one chunk.

    Args:
        encoder: chunks in, chunk outputs out.
        input_ids_T: content tokens of all documents.
        windows: of D documents, at least one.
        first_token_D: where each of these documents begins in `input_ids_T`.
        special: tokens to put around and behind the content.
        batches: the budget of a mini-batch.
        on_share: called with the share of the tokens that is encoded, after every mini-batch.

    Raises:
        torch.OutOfMemoryError: one chunk alone does not fit.
    """
    num_tokens_C = windows.stop_C - windows.start_C + special.num_tokens
    num_tokens, num_done = int(num_tokens_C.sum()), 0

    def tell(rows_B: Int64) -> None:
        nonlocal num_done
        num_more = int(num_tokens_C[rows_B].sum())
        num_done += num_more
        progress.advance("encode", num_more)
        on_share(num_done / num_tokens)

    progress.advance("encode", 0, num_more=num_tokens)
    return workers.encode_all(
        encoder,
        plan_batches(num_tokens_C, max_batch_tokens=batches.max_batch_tokens or encoder.batch_tokens),
        lambda rows_B: collate(
            rows_B, input_ids_T=input_ids_T, windows=windows, first_token_D=first_token_D, special=special
        ),
        on_done=tell,
    )


def pool_windows(outputs_CK: Tensor, windows: Windows, *, spec: PoolingSpec, head: Head) -> Tensor:
    """Pooled logits [D, L] of chunk outputs in the order of the windows, on their device."""
    return pooling.pool_chunks(
        outputs_CK,
        torch.from_numpy(windows.doc_of_chunk_C).to(outputs_CK.device),
        torch.from_numpy(windows.new_tokens_C()).to(outputs_CK.device),
        num_documents=len(windows.doc_offsets) - 1,
        spec=spec,
        task=head.task,
    )


def score_windows(
    outputs_CK: Tensor, windows: Windows, *, spec: PoolingSpec, head: Head, calibration: Calibration | None = None
) -> DocumentScores:
    """Pool chunk outputs, and find the chunk that speaks most for each document's label.

    With max pooling of logits that is the chunk that won; otherwise the one that gives the label its highest
    probability (regression: the highest value) among those that bring new tokens.
    """
    logits_DL = pool_windows(outputs_CK, windows, spec=spec, head=head)
    scores_DL = heads.scores(calibrated(logits_DL.double(), calibration), head)
    logits_CL = outputs_CK[:, : head.num_logits].double()
    evidence_CL = heads.log_scores(logits_CL, head)
    if spec.pooling_strategy == "max" and spec.pooling_space == "logits" and head.task == "multiclass":
        evidence_CL = logits_CL
    doc_of_chunk_C = torch.from_numpy(windows.doc_of_chunk_C)
    label_C = scores_DL.argmax(dim=1)[doc_of_chunk_C]
    evidence_C = evidence_CL.gather(1, label_C[:, None])[:, 0]
    if spec.pooling_strategy == "length_weighted_mean":
        # a chunk that brings no new token weighs nothing
        evidence_C = evidence_C.masked_fill(torch.from_numpy(windows.new_tokens_C()) == 0, -torch.inf)
    return DocumentScores(
        logits_DL=logits_DL.numpy(),
        scores_DL=scores_DL.numpy(),
        top_chunk_D=pooling.winning_chunk(evidence_C, doc_of_chunk_C, len(scores_DL)).numpy()
        - windows.doc_offsets[:-1],
    )


def chunk_evidence(
    outputs_CK: Tensor, windows: Windows, label_D: Int64, *, spec: PoolingSpec, head: Head
) -> ChunkEvidence:
    """What every chunk says about its document's label, and adds to what is pooled for it.

    Args:
        outputs_CK: chunk outputs in the order of the windows.
        windows: of D documents.
        label_D: position among the head's labels.
        spec: pooling.
        head: task and labels.
    """
    logits_CL = outputs_CK[:, : head.num_logits].double()
    scores_CL = heads.scores(logits_CL, head)
    doc_of_chunk_C = torch.from_numpy(windows.doc_of_chunk_C)
    label_C1 = torch.from_numpy(label_D)[doc_of_chunk_C][:, None]
    score_C = scores_CL.gather(1, label_C1)[:, 0]
    if head.task == "binary":  # one logit, that of the second label
        pooled_C, logit_C = logits_CL[:, 0], torch.where(label_C1[:, 0] == 1, logits_CL[:, 0], -logits_CL[:, 0])
    else:
        logit_C = logits_CL.gather(1, label_C1)[:, 0]
        is_softmaxed = head.task == "multiclass" and spec.pooling_space == "probabilities"
        pooled_C = score_C if is_softmaxed else logit_C
    contribution_C = pooling.contributions(
        outputs_CK,
        pooled_C,
        logit_C if spec.pooling_space == "logits" else score_C,
        doc_of_chunk_C,
        torch.from_numpy(windows.new_tokens_C()),
        num_documents=len(label_D),
        spec=spec,
    )
    # under max losers contribute nothing, which may be more than a winner does: the next would win without it
    order_C = pooled_C if spec.pooling_strategy == "max" else contribution_C
    return ChunkEvidence(score_C=score_C.numpy(), contribution_C=contribution_C.numpy(), order_C=order_C.numpy())


def resolve(checkpoint: Checkpoint, spec: ScoreSpec) -> ScoreSpec:
    """Fill what a spec leaves to the checkpoint and the device, and check that all of it fits.

    Raises:
        ConfigError: it does not, or the device is not there.
    """
    chunks, pooled = spec.chunks or checkpoint.chunks, spec.pooling or checkpoint.pooling
    check_scorable(checkpoint, chunks, pooled)
    precision = engine.choose_precision(spec.precision, encoder.choose_device(spec.device))
    return spec.model_copy(update={"chunks": chunks, "pooling": pooled, "precision": precision})


def check_scorable(checkpoint: Checkpoint, chunks: ChunkSpec, pooled: PoolingSpec) -> None:
    """Refuse windows and pooling that do not fit a checkpoint.

    Raises:
        ConfigError: chunks longer than the encoder reads, or attention pooling where none was learned.
    """
    encoder.check_chunk_size(
        chunks, checkpoint.tokenizer.special, encoder.num_positions(checkpoint.model), source=checkpoint.uri
    )
    learned = checkpoint.pooling.pooling_strategy == "attention"
    if (pooled.pooling_strategy == "attention") != learned:
        raise ConfigError(
            f"pooling_strategy must {'' if learned else 'not '}be 'attention' for {checkpoint.uri}, which was "
            f"fine-tuned with {checkpoint.pooling.pooling_strategy!r}, got {pooled.pooling_strategy!r}"
        )


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A checkpoint under one spec, ready to score."""

    checkpoint: Checkpoint
    encoder: ChunkEncoder
    chunks: ChunkSpec
    pooling: PoolingSpec
    batches: BatchSpec
    most_evidence: int | None
    """Chunks of a document to show as evidence; None is all."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, spec: ScoreSpec) -> Self:
        """Resolve a spec and choose the encoder.

        Raises:
            ConfigError: the spec does not fit the checkpoint or the device.
        """
        spec = resolve(checkpoint, spec)
        if spec.chunks is None or spec.pooling is None or spec.precision is None:
            raise AssertionError("resolve() leaves nothing open")
        return cls(
            checkpoint=checkpoint,
            encoder=checkpoint.encoder(encoder.choose_device(spec.device), spec.precision),
            chunks=spec.chunks,
            pooling=spec.pooling,
            batches=spec.batches,
            most_evidence={"none": 0, "top": spec.num_evidence_chunks, "all": None}[spec.evidence],
        )

    def windows(self, tokens: Tokens, content_fingerprints_D: pl.Series) -> Windows:
        """Cut documents; what is random depends on their contents alone."""
        seeds_D = prepare.document_seeds(content_fingerprints_D) if self.chunks.selection == "random_k" else None
        return chunk_windows(tokens.num_tokens_D, self.chunks, document_seed_D=seeds_D)

    def encode(
        self, tokens: Tokens, documents: Int64, windows: Windows, on_share: Callable[[float], None] = lambda _: None
    ) -> Tensor:
        """Chunk outputs, float32 [C, K] on the CPU, of the windows of some documents; see `encode_windows`."""
        return encode_windows(
            self.encoder,
            tokens.input_ids_T,
            windows,
            first_token_D=tokens.offsets[:-1][documents],
            special=self.checkpoint.tokenizer.special,
            batches=self.batches,
            on_share=on_share,
        )

    def pool(self, outputs_CK: Tensor, windows: Windows) -> DocumentScores:
        """Scores of the documents whose windows were encoded."""
        return score_windows(
            outputs_CK,
            windows,
            spec=self.pooling,
            head=self.checkpoint.head,
            calibration=self.checkpoint.calibration,
        )

    def evidence(self, outputs_CK: Tensor, windows: Windows, scores: DocumentScores) -> list[npt.NDArray[np.void]]:
        """The chunks to show for each document whose windows were encoded; see `ChunkEvidence.ranked`."""
        if self.most_evidence == 0:
            return [np.empty(0, CHUNK)] * len(scores.top_chunk_D)
        label_D = scores.scores_DL.argmax(axis=1)
        said = chunk_evidence(outputs_CK, windows, label_D, spec=self.pooling, head=self.checkpoint.head)
        return said.ranked(windows.doc_offsets, most=self.most_evidence)

    def cost(self, windows: Windows) -> Counts:
        """What it takes to encode some windows, besides seconds."""
        num_tokens_C = windows.stop_C - windows.start_C + self.checkpoint.tokenizer.special.num_tokens
        num_tokens = int(num_tokens_C.sum())
        plan = plan_batches(num_tokens_C, max_batch_tokens=self.batches.max_batch_tokens or self.encoder.batch_tokens)
        computed = num_positions(plan, num_tokens_C) if self.encoder.pads else num_tokens
        config = next(
            module for module in self.checkpoint.model.modules() if isinstance(module, PreTrainedModel)
        ).config
        return Counts(
            num_positions=computed,
            num_padding=computed - num_tokens,
            needed_flops=needed_flops(config, num_tokens_C) or 0.0,
        )


def score_texts(texts: Sequence[str], checkpoint: Checkpoint, spec: ScoreSpec) -> DocumentScores:
    """Score texts in memory: the same path as a shard's, without tables.

    Raises:
        ConfigError: there is no text, or the spec does not fit the checkpoint or the device.
    """
    if not texts:
        raise ConfigError("texts must hold at least one text, got none")
    scorer = Scorer.of(checkpoint, spec)
    tokens = checkpoint.tokenizer.tokenize(texts)
    windows = scorer.windows(tokens, prepare.content_fingerprints(texts))
    return scorer.pool(scorer.encode(tokens, np.arange(len(texts)), windows), windows)
