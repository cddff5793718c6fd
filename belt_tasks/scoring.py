"""Scoring: tokens to predictions. Chunks of many documents share mini-batches; results are written by index."""

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from belt_tasks import encoder, heads, pooling, predictions, prepare, progress, publishing
from belt_tasks.batches import MiniBatch, collate, plan_batches
from belt_tasks.checkpoint import Checkpoint, cache
from belt_tasks.corpus import ShardRef
from belt_tasks.errors import ConfigError
from belt_tasks.predictions import DocumentScores
from belt_tasks.publishing import RunRef, ShardWriter
from belt_tasks.receipts import Counts, ShardReceipt, Stopwatch
from belt_tasks.specs import BatchSpec, ChunkSpec, CorpusSpec, Head, PoolingSpec, ScoreSpec
from belt_tasks.tokens import SpecialTokens, Tokens
from belt_tasks.windows import Windows, chunk_windows


def encode_windows(
    model: nn.Module,
    input_ids_T: npt.NDArray[np.int32],
    windows: Windows,
    *,
    first_token_D: npt.NDArray[np.int64],
    special: SpecialTokens,
    batches: BatchSpec,
    device: torch.device,
) -> Tensor:
    """Chunk outputs of all windows: float32 [C, K] on the CPU, in the order of the windows.

    Out of memory on the device, a mini-batch is halved, down to one chunk.

    Args:
        model: maps (input_ids [B, T], attention_mask [B, T]) to chunk outputs [B, K].
        input_ids_T: content tokens of all documents.
        windows: of D documents, at least one.
        first_token_D: where each of these documents begins in `input_ids_T`.
        special: tokens to put around and behind the content.
        batches: the budget of a mini-batch.
        device: where the model is.

    Raises:
        torch.OutOfMemoryError: one chunk alone does not fit.
    """
    num_tokens_C = windows.stop_C - windows.start_C + special.num_tokens
    outputs_CK: Tensor | None = None
    progress.advance("encode", 0, num_more=windows.num_chunks)
    todo = plan_batches(num_tokens_C, max_batch_tokens=batches.max_batch_tokens)[::-1]
    with torch.inference_mode():
        while todo:
            rows_B = todo.pop()
            batch = collate(
                rows_B, input_ids_T=input_ids_T, windows=windows, first_token_D=first_token_D, special=special
            )
            try:
                outputs_BK = forward(model, batch, device).float().cpu()
            except torch.OutOfMemoryError:
                if len(rows_B) == 1:
                    raise
                torch.cuda.empty_cache()
                todo += [rows_B[len(rows_B) // 2 :], rows_B[: len(rows_B) // 2]]
                continue
            if outputs_CK is None:
                outputs_CK = torch.empty((windows.num_chunks, outputs_BK.shape[1]))
            outputs_CK[torch.from_numpy(rows_B)] = outputs_BK
            progress.advance("encode", len(rows_B))
    if outputs_CK is None:
        raise AssertionError("every document has a chunk, so there is a mini-batch")
    return outputs_CK


def forward(model: nn.Module, batch: MiniBatch, device: torch.device) -> Tensor:
    """Chunk outputs of one mini-batch, [B, K] on the device."""
    outputs_BK: Tensor = model(
        batch.input_ids_BT.to(device, non_blocking=True),
        batch.attention_mask_BT.to(device, non_blocking=True),
    )
    return outputs_BK


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


def score_windows(outputs_CK: Tensor, windows: Windows, *, spec: PoolingSpec, head: Head) -> DocumentScores:
    """Pool chunk outputs, and find the chunk that speaks most for each document's label.

    With max pooling of logits that is the chunk that won; otherwise the one that gives the label its highest
    probability (regression: the highest value) among those that bring new tokens.
    """
    logits_DL = pool_windows(outputs_CK, windows, spec=spec, head=head)
    scores_DL = heads.scores(logits_DL.double(), head)
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
        top_row_D=pooling.winning_chunk(evidence_C, doc_of_chunk_C, len(scores_DL)).numpy(),
    )


def resolve(spec: ScoreSpec, chunks: ChunkSpec, pooled: PoolingSpec) -> ScoreSpec:
    """Fill what a spec leaves to the checkpoint."""
    return spec.model_copy(update={"chunks": spec.chunks or chunks, "pooling": spec.pooling or pooled})


def check_scorable(checkpoint: Checkpoint, spec: ScoreSpec) -> None:
    """Refuse specs that do not fit a checkpoint.

    Raises:
        ConfigError: chunks longer than the encoder reads, or attention pooling where none was learned.
    """
    chunks, pooled = _windows_and_pooling(spec)
    encoder.check_chunk_size(
        chunks, checkpoint.tokenizer.special, encoder.num_positions(checkpoint.model), source=checkpoint.uri
    )
    learned = checkpoint.pooling.pooling_strategy == "attention"
    if (pooled.pooling_strategy == "attention") != learned:
        raise ConfigError(
            f"pooling_strategy must {'' if learned else 'not '}be 'attention' for {checkpoint.uri}, which was "
            f"fine-tuned with {checkpoint.pooling.pooling_strategy!r}, got {pooled.pooling_strategy!r}"
        )


def score_texts(texts: Sequence[str], checkpoint: Checkpoint, spec: ScoreSpec) -> DocumentScores:
    """Score texts in memory: the same path as a shard's, without tables.

    Raises:
        ConfigError: there is no text, or the spec does not fit the checkpoint.
    """
    if not texts:
        raise ConfigError("texts must hold at least one text, got none")
    spec = resolve(spec, checkpoint.chunks, checkpoint.pooling)
    check_scorable(checkpoint, spec)
    chunks, pooled = _windows_and_pooling(spec)
    device = encoder.choose_device(spec.device)
    checkpoint.model.to(device)
    tokens = checkpoint.tokenizer.tokenize(texts)
    seeds_D = prepare.document_seeds(prepare.content_fingerprints(texts)) if chunks.selection == "random_k" else None
    windows = chunk_windows(tokens.num_tokens_D, chunks, document_seed_D=seeds_D)
    outputs_CK = _encode(checkpoint, tokens, windows, spec, device)
    return score_windows(outputs_CK, windows, spec=pooled, head=checkpoint.head)


def score_shard(
    shard: ShardRef,
    corpus: CorpusSpec,
    spec: ScoreSpec,
    *,
    run: RunRef,
    checkpoint_uri: str,
    checkpoint_digest: str,
    duplicates_uri: str | None,
) -> ShardReceipt:
    """Score one shard and write its predictions and rejected rows, unless an earlier attempt did.

    Args:
        shard: what to read.
        corpus: columns, and the split whose rows are wanted.
        spec: resolved, that is with chunks and pooling.
        run: where to write.
        checkpoint_uri: what to score with.
        checkpoint_digest: the checkpoint that the run began with.
        duplicates_uri: table of rows whose doc_id came before; None where there is none.

    Raises:
        ShardError: the shard cannot be read.
        ConfigError: the checkpoint cannot be loaded, or changed during the run.
    """
    finished = publishing.finished_shard(run, shard)
    if finished is not None:
        progress.advance("tokenize", shard.num_rows)
        return finished
    device = encoder.choose_device(spec.device)
    checkpoint = cache.get(checkpoint_uri, checkpoint_digest, device)
    chunks, pooled = _windows_and_pooling(spec)
    stopwatch, counts = Stopwatch(), Counts()
    blocks = prepare.token_blocks(
        shard, corpus, checkpoint.tokenizer, duplicates_uri=duplicates_uri, stopwatch=stopwatch
    )
    with ShardWriter.open(run, shard, table="predictions") as writer:
        for block in blocks:
            writer.reject(block.rejected)
            if len(block.documents) == 0:
                continue
            windows = chunk_windows(block.tokens.num_tokens_D, chunks, document_seed_D=block.document_seed_D())
            with stopwatch.time("encode"):
                outputs_CK = _encode(checkpoint, block.tokens, windows, spec, device)
                scores = score_windows(outputs_CK, windows, spec=pooled, head=checkpoint.head)
            with stopwatch.time("write"):
                good, bad = predictions.build(
                    block,
                    windows,
                    scores,
                    head=checkpoint.head,
                    threshold=spec.threshold,
                    stamp=predictions.Stamp(
                        run_id=run.run_id, checkpoint_digest=checkpoint_digest, scored_at=datetime.now(UTC)
                    ),
                    source_uri=shard.uri,
                )
                writer.write(good)
                writer.reject(bad)
            counts += prepare.count(windows, block.tokens).model_copy(update={"num_documents": good.num_rows})
    return writer.receipt(counts.model_copy(update=stopwatch.receipt()))


def _encode(checkpoint: Checkpoint, tokens: Tokens, windows: Windows, spec: ScoreSpec, device: torch.device) -> Tensor:
    return encode_windows(
        checkpoint.model,
        tokens.input_ids_T,
        windows,
        first_token_D=tokens.offsets[:-1],
        special=checkpoint.tokenizer.special,
        batches=spec.batches,
        device=device,
    )


def _windows_and_pooling(spec: ScoreSpec) -> tuple[ChunkSpec, PoolingSpec]:
    if spec.chunks is None or spec.pooling is None:
        raise AssertionError("resolve() the spec first")
    return spec.chunks, spec.pooling
