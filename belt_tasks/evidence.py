"""Evidence: which chunks speak for a document's label, how much each gives to it, and where they lie in the text."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import data_contracts
from belt_tasks.prepare import TokenBlock
from belt_tasks.tokens import Tokens
from belt_tasks.windows import Windows

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

CHUNK = np.dtype([("position", np.int32), ("score", np.float64), ("contribution", np.float64)])
"""A chunk of a document: counted from its first, the probability that it gives to the label, what it adds."""


@dataclass(frozen=True, kw_only=True)
class ChunkEvidence:
    """What C chunks say about the labels of their documents."""

    score_C: npt.NDArray[np.float64]
    contribution_C: npt.NDArray[np.float64]
    order_C: npt.NDArray[np.float64]
    """What ranks them, the most first."""

    def ranked(self, doc_offsets: Int64, *, most: int | None) -> list[npt.NDArray[np.void]]:
        """Each document's chunks as rows of CHUNK, by their order, of equals the first chunk first.

        Args:
            doc_offsets: [D + 1], document d owns chunks doc_offsets[d] : doc_offsets[d + 1].
            most: chunks of a document; None gives all.
        """
        num_chunks_D = np.diff(doc_offsets)
        doc_of_chunk_C = np.repeat(np.arange(len(num_chunks_D)), num_chunks_D)
        order_C = np.lexsort((-self.order_C, doc_of_chunk_C))  # stable
        rows = np.empty(len(order_C), dtype=CHUNK)
        rows["position"] = order_C - doc_offsets[:-1][doc_of_chunk_C]
        rows["score"], rows["contribution"] = self.score_C[order_C], self.contribution_C[order_C]
        stops = doc_offsets[1:] if most is None else np.minimum(doc_offsets[:-1] + most, doc_offsets[1:])
        return [rows[start:stop] for start, stop in zip(doc_offsets[:-1], stops, strict=True)]


def spans(rows_E: Int64, doc_E: Int64, windows: Windows, tokens: Tokens) -> tuple[Int32, Int32]:
    """First character of some windows and one past their last; [0, 0) of an empty one.

    Args:
        rows_E: positions among the windows.
        doc_E: their documents, positions among those of `tokens`.
        windows: of these documents.
        tokens: the documents.
    """
    first_E, last_E = windows.start_C[rows_E], windows.stop_C[rows_E] - 1
    full_E = last_E >= first_E
    base_E = tokens.offsets[:-1][doc_E]
    start_E, stop_E = np.zeros(len(rows_E), dtype=np.int32), np.zeros(len(rows_E), dtype=np.int32)
    start_E[full_E] = tokens.start_char_T[(base_E + first_E)[full_E]]
    stop_E[full_E] = tokens.stop_char_T[(base_E + last_E)[full_E]]
    return start_E, stop_E


def build(
    block: TokenBlock,
    windows: Windows,
    ranked_D: list[npt.NDArray[np.void]],
    *,
    label_D: npt.NDArray[np.object_],
    keep_D: npt.NDArray[np.bool_],
    run_id: str,
) -> pa.Table:
    """Rows of the evidence contract.

    Args:
        block: the D documents; with a column `text`, passages are copied.
        windows: of all of them.
        ranked_D: the chunks to show of each.
        label_D: the label that is explained.
        keep_D: documents that have a prediction.
        run_id: the run.
    """
    number_D = np.where(keep_D, [len(rows) for rows in ranked_D], 0)
    doc_E = np.repeat(np.arange(len(ranked_D)), number_D)
    chunks = np.concatenate(
        [np.empty(0, dtype=CHUNK), *(rows for rows, keep in zip(ranked_D, keep_D, strict=True) if keep)]
    )
    rows_E = windows.doc_offsets[:-1][doc_E] + chunks["position"]
    start_char_E, stop_char_E = spans(rows_E, doc_E, windows, block.tokens)
    first_E = np.repeat(np.cumsum(number_D) - number_D, number_D)
    return pa.table(
        {
            "doc_id": block.documents["doc_id"].gather(doc_E).to_arrow().cast(pa.string()),
            "chunk_index": windows.chunk_index_C[rows_E].astype(np.int32),
            "rank": (np.arange(len(doc_E)) - first_E + 1).astype(np.int32),
            "label": pa.array(label_D[doc_E], pa.string()),
            "score": chunks["score"],
            "contribution": chunks["contribution"],
            "start_token": windows.start_C[rows_E].astype(np.int32),
            "stop_token": windows.stop_C[rows_E].astype(np.int32),
            "start_char": start_char_E,
            "stop_char": stop_char_E,
            "text": _passages(block, doc_E, start_char_E, stop_char_E),
            "run_id": pa.repeat(run_id, len(doc_E)),
        }
    ).cast(data_contracts.arrow_schema("evidence"))


def _passages(block: TokenBlock, doc_E: Int64, start_E: Int32, stop_E: Int32) -> pa.Array:
    if "text" not in block.documents.columns:
        return pa.nulls(len(doc_E), pa.string())
    texts = block.documents["text"].to_list()
    spans_E = zip(doc_E.tolist(), start_E.tolist(), stop_E.tolist(), strict=True)
    return pa.array([texts[document][start:stop] for document, start, stop in spans_E], pa.string())
