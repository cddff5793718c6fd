"""Shard scoring: a shard's documents to its predictions.

Three stages run beside each other, so that the encoder never waits: reading, tokenizing and planning ahead of it,
pooling and writing behind it.
"""

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from belt_tasks import evidence, milestones, predictions, prepare, progress, publishing, score_store, storage
from belt_tasks.checkpoint import cache
from belt_tasks.corpus import ShardRef
from belt_tasks.memory import give_back
from belt_tasks.pipeline import ahead, behind
from belt_tasks.predictions import DocumentScores
from belt_tasks.prepare import TokenBlock
from belt_tasks.publishing import RunRef, ShardWriter
from belt_tasks.receipts import Counts, ShardReceipt, Stopwatch
from belt_tasks.score_store import Claims, StoredScore
from belt_tasks.scoring import Scorer
from belt_tasks.specs import CorpusSpec, ScoreSpec
from belt_tasks.windows import Windows

Int64 = npt.NDArray[np.int64]

# blocks that wait before and behind the encoder: enough that it never does, and a few megabytes each
MOST_WAITING = 2


@dataclass(frozen=True, kw_only=True)
class PlannedBlock:
    """A block, its windows, and the documents to encode."""

    block: TokenBlock
    windows: Windows
    """Of all its documents."""
    new_documents: Int64
    """Rows of those whose text has no score yet and none on its way."""
    new_windows: Windows | None
    """Theirs; None where there are none."""


@dataclass(frozen=True, kw_only=True)
class ScoredBlock:
    """What the model says of a block's documents."""

    scores: DocumentScores | None
    """None where there is no document."""
    ranked_D: list[npt.NDArray[np.void]]
    """The chunks of each document that are shown as evidence."""
    counts: Counts
    """What was scored, and what that took."""


@milestones.of_shard("score")
def score_shard(
    shard: ShardRef,
    corpus: CorpusSpec,
    spec: ScoreSpec,
    *,
    run: RunRef,
    checkpoint_uri: str,
    checkpoint_digest: str,
    scoring_fingerprint: str,
    rows_uri: str | None = None,
) -> ShardReceipt:
    """Score one shard and write its predictions and rejected rows, unless an earlier attempt did.

    Args:
        shard: what to read.
        corpus: columns, and the split whose rows are wanted.
        spec: how to score.
        run: where to write.
        checkpoint_uri: what to score with.
        checkpoint_digest: the checkpoint that the run began with.
        scoring_fingerprint: by which rules; what predictions say of theirs.
        rows_uri: a table whose `row_index` are the positions of the rows to score; None scores all.

    Raises:
        ShardError: the shard cannot be read.
        ConfigError: the checkpoint cannot be loaded, or changed during the run.
    """
    finished = publishing.finished_shard(run, shard)
    if finished is not None:
        num_rows = finished.counts.num_documents + finished.counts.num_rejected
        for stage in ("tokenize", "score"):
            progress.advance(stage, 0, num_more=-num_rows)  # nothing to do for this attempt
        return finished
    scorer = Scorer.of(cache.get(checkpoint_uri, checkpoint_digest), spec)
    claims = Claims(score_store.of_run(run.uri))
    stamp = predictions.Stamp(
        run_id=run.run_id,
        checkpoint_digest=checkpoint_digest,
        scoring_fingerprint=scoring_fingerprint,
        scored_at=datetime.now(UTC),
    )
    stopwatch, counts = Stopwatch(), Counts()
    rows = None if rows_uri is None else storage.read_parquet(rows_uri)["row_index"].to_numpy()
    blocks = prepare.token_blocks(
        shard,
        corpus,
        scorer.checkpoint.tokenizer,
        rows=rows,
        stopwatch=stopwatch,
        keep_text=spec.evidence_text and spec.evidence != "none",
    )
    planned = planned_blocks(blocks, scorer, claims, stopwatch)

    def finish(encoded: tuple[PlannedBlock, Tensor | None]) -> None:
        nonlocal counts
        with stopwatch.time("write"):
            block, windows = encoded[0].block, encoded[0].windows
            scored = score_block(*encoded, scorer, claims)
            writer.reject(block.rejected)
            if scored.scores is not None:
                good, bad = predictions.build(
                    block,
                    windows,
                    scored.scores,
                    head=scorer.checkpoint.head,
                    threshold=spec.threshold,
                    stamp=stamp,
                    source_uri=shard.uri,
                )
                writer.write(good)
                writer.reject(bad)
                if spec.evidence != "none":
                    writer.write(_evidence(block, windows, scored, scorer, run.run_id), "evidence")
                counts += Counts(num_documents=good.num_rows)
        counts += scored.counts
        is_counted = encoded[0].new_windows is not None  # by `encode_block`
        progress.advance("score", len(block.rejected) + (0 if is_counted else len(block.documents)))

    more = () if spec.evidence == "none" else ("evidence",)
    try:
        with (
            ShardWriter.open(run, shard, table="predictions", more=more) as writer,
            ahead(planned, most=MOST_WAITING) as ready,
            behind(finish, most=MOST_WAITING) as hand_over,
        ):
            for block in ready:
                with stopwatch.time("encode"):
                    outputs_CK = encode_block(block, scorer)
                hand_over((block, outputs_CK))
                give_back()
        return writer.receipt(counts.model_copy(update=stopwatch.receipt()))
    except BaseException:
        score_store.forget()  # another attempt counts what it encodes anew
        raise


def planned_blocks(
    blocks: Generator[TokenBlock], scorer: Scorer, claims: Claims, watch: Stopwatch
) -> Generator[PlannedBlock]:
    """Plan blocks as they come, and close their source at the end."""
    with closing(blocks):
        for block in blocks:
            with watch.time("tokenize"):
                planned = plan_block(block, scorer, claims)
            yield planned


def plan_block(block: TokenBlock, scorer: Scorer, claims: Claims) -> PlannedBlock:
    """Cut the documents of a block, possibly none, and choose those to encode: each different text once."""
    fingerprints_D = block.documents["content_fingerprint"]
    windows = scorer.windows(block.tokens, fingerprints_D)
    taken = claims.take(fingerprints_D.unique().to_list())
    is_new_D = fingerprints_D.is_first_distinct() & fingerprints_D.is_in(list(taken))
    new_documents = np.flatnonzero(is_new_D.to_numpy())
    return PlannedBlock(
        block=block,
        windows=windows,
        new_documents=new_documents,
        new_windows=windows.of_documents(new_documents) if len(new_documents) else None,
    )


def encode_block(planned: PlannedBlock, scorer: Scorer) -> Tensor | None:
    """Chunk outputs of the documents that are to be encoded; None where there are none.

    The documents of the block count as scored as its tokens are encoded.
    """
    if planned.new_windows is None:
        return None
    num_documents, num_told = len(planned.block.documents), 0

    def tell(share: float) -> None:
        nonlocal num_told
        num_done = int(share * num_documents)
        progress.advance("score", num_done - num_told)
        num_told = num_done

    return scorer.encode(planned.block.tokens, planned.new_documents, planned.new_windows, on_share=tell)


def score_block(planned: PlannedBlock, outputs_CK: Tensor | None, scorer: Scorer, claims: Claims) -> ScoredBlock:
    """Pool what was encoded, store it, and take the scores of all documents from the store."""
    block, fingerprints_D = planned.block, planned.block.documents["content_fingerprint"]
    if len(fingerprints_D) == 0:
        return ScoredBlock(scores=None, ranked_D=[], counts=Counts())
    encoded = Counts()
    if outputs_CK is not None and planned.new_windows is not None:
        fresh = scorer.pool(outputs_CK, planned.new_windows)
        ranked_D = scorer.evidence(outputs_CK, planned.new_windows, fresh)
        rows = zip(fresh.logits_DL, fresh.top_chunk_D.tolist(), ranked_D, strict=True)
        scores = [
            StoredScore(logits_L=logits_L, top_chunk=top_chunk, ranked=ranked) for logits_L, top_chunk, ranked in rows
        ]
        claims.settle(dict(zip(fingerprints_D.gather(planned.new_documents), scores, strict=True)))
        encoded = prepare.count(planned.new_windows, block.tokens) + scorer.cost(planned.new_windows)
    known = claims.store.get(fingerprints_D.unique().to_list())
    stored = [known[fingerprint] for fingerprint in fingerprints_D]
    logits_DL = np.stack([score.logits_L for score in stored])
    counts = prepare.count(planned.windows, block.tokens)
    return ScoredBlock(
        scores=DocumentScores(
            logits_DL=logits_DL,
            scores_DL=scorer.checkpoint.scores(torch.from_numpy(logits_DL)).numpy(),
            top_chunk_D=np.array([score.top_chunk for score in stored]),
        ),
        ranked_D=[score.ranked for score in stored],
        counts=encoded.model_copy(
            update={
                "num_documents": 0,  # known when they are written
                "num_documents_reused": len(stored) - len(planned.new_documents),
                "num_tokens": counts.num_tokens,
                "num_unknown_tokens": counts.num_unknown_tokens,
                "num_tokens_scored": counts.num_tokens_scored,
            }
        ),
    )


def _evidence(block: TokenBlock, windows: Windows, scored: ScoredBlock, scorer: Scorer, run_id: str) -> pa.Table:
    """Rows of the evidence table, of the documents that have a prediction."""
    if scored.scores is None:
        raise AssertionError("there are documents")
    names = np.array(scorer.checkpoint.head.labels, dtype=object)
    return evidence.build(
        block,
        windows,
        scored.ranked_D,
        label_D=names[scored.scores.scores_DL.argmax(axis=1)],
        keep_D=np.asarray(np.isfinite(scored.scores.logits_DL).all(axis=1)),
        run_id=run_id,
    )
