"""Predictions: document scores to rows of the predictions table."""

from dataclasses import dataclass
from datetime import datetime

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

import data_contracts
from belt_tasks import evidence
from belt_tasks.prepare import TokenBlock
from belt_tasks.receipts import UNSCORED
from belt_tasks.specs import Head
from belt_tasks.tokens import Tokens
from belt_tasks.windows import Windows


@dataclass(frozen=True, kw_only=True)
class DocumentScores:
    """What the model says of D documents."""

    logits_DL: npt.NDArray[np.float32]
    """Pooled logits."""
    scores_DL: npt.NDArray[np.float64]
    """Probabilities of each label; of regression the value."""
    top_chunk_D: npt.NDArray[np.int64]
    """Which of the document's chunks, counted from its first, speaks most for its highest-scoring label."""


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """What every row of a run says of its origin."""

    run_id: str
    checkpoint_digest: str
    scoring_fingerprint: str
    scored_at: datetime


def build(
    block: TokenBlock,
    windows: Windows,
    scores: DocumentScores,
    *,
    head: Head,
    threshold: float,
    stamp: Stamp,
    source_uri: str,
) -> tuple[pa.Table, pl.DataFrame]:
    """Rows of the predictions contract, and rows put aside because the model gave no number.

    Args:
        block: the D documents.
        windows: their windows.
        scores: what the model says of them.
        head: task and labels.
        threshold: probability from which a multilabel document carries a label.
        stamp: origin.
        source_uri: the shard's file, for rejected rows.

    Returns:
        The predictions, and source_uri, row_index, doc_id, reason, detail of the others.
    """
    num_documents = len(block.documents)
    finite_D = np.isfinite(scores.logits_DL).all(axis=1)
    table = pa.table(
        {
            "doc_id": block.documents["doc_id"].to_arrow().cast(pa.string()),
            **_labels_and_scores(scores.scores_DL, head, threshold),
            "logits": _lists(scores.logits_DL.astype(np.float32)),
            "num_tokens": block.tokens.num_tokens_D.astype(np.int32),
            "num_tokens_scored": np.add.reduceat(windows.new_tokens_C(), windows.doc_offsets[:-1]).astype(np.int32),
            "num_chunks": np.diff(windows.doc_offsets).astype(np.int32),
            "top_chunk": _top_chunks(windows.doc_offsets[:-1] + scores.top_chunk_D, windows, block.tokens),
            "content_fingerprint": block.documents["content_fingerprint"].to_arrow().cast(pa.string()),
            "checkpoint_digest": pa.repeat(stamp.checkpoint_digest, num_documents),
            "scoring_fingerprint": pa.repeat(stamp.scoring_fingerprint, num_documents),
            "run_id": pa.repeat(stamp.run_id, num_documents),
            "scored_at": pa.repeat(pa.scalar(stamp.scored_at, pa.timestamp("us", "UTC")), num_documents),
            "removed_at": pa.nulls(num_documents, pa.timestamp("us", "UTC")),
        }
    )
    rejected = block.documents.filter(pl.Series(~finite_D)).select(
        pl.lit(source_uri).alias("source_uri"),
        "row_index",
        "doc_id",
        pl.lit(UNSCORED).alias("reason"),
        pl.lit("the model's output for this document is not a finite number").alias("detail"),
    )
    return table.filter(pa.array(finite_D)).cast(data_contracts.arrow_schema("predictions")), rejected


def _labels_and_scores(scores_DL: npt.NDArray[np.float64], head: Head, threshold: float) -> dict[str, pa.Array]:
    names = np.array(head.labels, dtype=object)
    num_documents = len(scores_DL)
    top_D = scores_DL.argmax(axis=1)
    score_D = scores_DL[np.arange(num_documents), top_D]
    match head.task:
        case "binary" | "multiclass":
            label = pa.array(names[top_D], pa.string())
            labels = _lists(names[top_D][:, None])
        case "multilabel":
            carried_DL = scores_DL >= threshold
            label = pa.array(np.where(carried_DL.any(axis=1), names[top_D], None), pa.string())
            labels = _lists(np.broadcast_to(names, scores_DL.shape), carried_DL)
        case "regression":
            label = pa.nulls(num_documents, pa.string())
            labels = _lists(np.empty((num_documents, 0), dtype=object))
    pairs = pa.StructArray.from_arrays(
        [pa.array(np.tile(names, num_documents), pa.string()), pa.array(scores_DL.reshape(-1))],
        ["label", "score"],
    )
    offsets = np.arange(num_documents + 1, dtype=np.int32) * len(names)
    return {
        "label": label,
        "labels": labels,
        "score": pa.array(score_D),
        "scores": pa.ListArray.from_arrays(offsets, pairs),
    }


def _lists(values_DL: npt.NDArray[np.generic], keep_DL: npt.NDArray[np.bool_] | None = None) -> pa.ListArray:
    """One list per row, of the kept values."""
    keep = np.ones(values_DL.shape, dtype=bool) if keep_DL is None else keep_DL
    offsets = np.concatenate([[0], np.cumsum(keep.sum(axis=1))]).astype(np.int32)
    kind = pa.string() if values_DL.dtype == object else None
    return pa.ListArray.from_arrays(offsets, pa.array(values_DL[keep], kind))


def _top_chunks(top_row_D: npt.NDArray[np.int64], windows: Windows, tokens: Tokens) -> pa.StructArray:
    """Index and characters of each document's top chunk; of an empty chunk the characters are [0, 0)."""
    start_D, stop_D = evidence.spans(top_row_D, np.arange(len(top_row_D)), windows, tokens)
    index_D = windows.chunk_index_C[top_row_D].astype(np.int32)
    return pa.StructArray.from_arrays(
        [pa.array(index_D), pa.array(start_D), pa.array(stop_D)], ["chunk_index", "start_char", "stop_char"]
    )
