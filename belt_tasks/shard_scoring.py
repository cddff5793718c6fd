"""Shard scoring: a shard's documents to its predictions. Reading, encoding and writing run beside each other."""

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import torch

from belt_tasks import heads, predictions, prepare, progress, publishing, score_store
from belt_tasks.checkpoint import cache
from belt_tasks.corpus import ShardRef
from belt_tasks.memory import give_back
from belt_tasks.pipeline import ahead, behind
from belt_tasks.predictions import DocumentScores
from belt_tasks.prepare import TokenBlock
from belt_tasks.publishing import RunRef, ShardWriter
from belt_tasks.receipts import Counts, ShardReceipt, Stopwatch
from belt_tasks.score_store import ScoreStore, StoredScore
from belt_tasks.scoring import Scorer
from belt_tasks.specs import CorpusSpec, ScoreSpec
from belt_tasks.windows import Windows

# blocks that wait before and behind the encoder: enough that it never does, and a few megabytes each
MOST_WAITING = 2


@dataclass(frozen=True, kw_only=True)
class ScoredBlock:
    """A block and what the model says of its documents."""

    block: TokenBlock
    windows: Windows
    scores: DocumentScores | None
    """None where there is no document."""
    counts: Counts
    """What was scored, and what that took."""


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
        spec: how to score.
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
    scorer = Scorer.of(cache.get(checkpoint_uri, checkpoint_digest), spec)
    store = score_store.of_run(run.uri)
    stamp = predictions.Stamp(run_id=run.run_id, checkpoint_digest=checkpoint_digest, scored_at=datetime.now(UTC))
    stopwatch, counts = Stopwatch(), Counts()
    blocks = prepare.token_blocks(
        shard, corpus, scorer.checkpoint.tokenizer, duplicates_uri=duplicates_uri, stopwatch=stopwatch
    )

    def write(scored: ScoredBlock) -> None:
        nonlocal counts
        with stopwatch.time("write"):
            writer.reject(scored.block.rejected)
            if scored.scores is not None:
                good, bad = predictions.build(
                    scored.block,
                    scored.windows,
                    scored.scores,
                    head=scorer.checkpoint.head,
                    threshold=spec.threshold,
                    stamp=stamp,
                    source_uri=shard.uri,
                )
                writer.write(good)
                writer.reject(bad)
                counts += Counts(num_documents=good.num_rows)
        counts += scored.counts

    try:
        with (
            ShardWriter.open(run, shard, table="predictions") as writer,
            ahead(blocks, most=MOST_WAITING) as tokenized,
            behind(write, most=MOST_WAITING) as hand_over,
        ):
            for block in tokenized:
                with stopwatch.time("encode"):
                    scored = score_block(block, scorer, store)
                hand_over(scored)
                give_back()
        return writer.receipt(counts.model_copy(update=stopwatch.receipt()))
    except BaseException:
        score_store.forget()  # another attempt counts what it encodes anew
        raise


def score_block(block: TokenBlock, scorer: Scorer, store: ScoreStore) -> ScoredBlock:
    """Score a block, each different text once.

    Args:
        block: documents, possibly none.
        scorer: checkpoint and spec.
        store: scores of the run's earlier texts; those of this block are added.
    """
    fingerprints_D = block.documents["content_fingerprint"]
    windows = scorer.windows(block.tokens, fingerprints_D)
    if len(fingerprints_D) == 0:
        return ScoredBlock(block=block, windows=windows, scores=None, counts=Counts())
    known = store.get(fingerprints_D.unique().to_list())
    is_new_D = (fingerprints_D.is_first_distinct() & ~fingerprints_D.is_in(list(known))).to_numpy()
    new_documents = np.flatnonzero(is_new_D)
    counts = prepare.count(windows, block.tokens)
    encoded = Counts()
    if len(new_documents) > 0:
        fresh = scorer.score(block.tokens, windows, new_documents)
        rows = zip(fresh.logits_DL, fresh.top_chunk_D.tolist(), strict=True)
        scores = [StoredScore(logits_L=logits_L, top_chunk=top_chunk) for logits_L, top_chunk in rows]
        added = dict(zip(fingerprints_D.gather(new_documents), scores, strict=True))
        store.put(added)
        known |= added
        chosen = windows.of_documents(new_documents)
        encoded = prepare.count(chosen, block.tokens) + scorer.cost(chosen)
    stored = [known[fingerprint] for fingerprint in fingerprints_D]
    logits_DL = np.stack([score.logits_L for score in stored])
    return ScoredBlock(
        block=block,
        windows=windows,
        scores=DocumentScores(
            logits_DL=logits_DL,
            scores_DL=heads.scores(torch.from_numpy(logits_DL).double(), scorer.checkpoint.head).numpy(),
            top_chunk_D=np.array([score.top_chunk for score in stored]),
        ),
        counts=encoded.model_copy(
            update={
                "num_documents": 0,  # known when they are written
                "num_documents_reused": len(stored) - len(new_documents),
                "num_tokens": counts.num_tokens,
                "num_tokens_scored": counts.num_tokens_scored,
            }
        ),
    )
