"""Windows: half-open spans [start, stop) over a document's content tokens. Integers only, no text, no model.

The method is BELT's (Devlin, github.com/google-research/bert issue 27; belt-nlp 1.1.0), with two deliberate
differences: a document never loses its last window, and `drop_contained_tail` can omit windows that add nothing.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from belt_tasks.specs import ChunkSpec

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The windows of D documents, C in all, in document order.

    Document d owns rows `doc_offsets[d] : doc_offsets[d + 1]`, never none; an empty document has one empty window.
    """

    chunk_index_C: Int64
    """Position of the window in its document's own grid, from 0; a selection may skip some."""
    start_C: Int64
    """First content token, counted from the start of the document."""
    stop_C: Int64
    """One past the last content token."""
    doc_offsets: Int64
    """D + 1 row numbers; see above."""

    @property
    def num_chunks(self) -> int:
        """C."""
        return len(self.start_C)

    @cached_property
    def doc_of_chunk_C(self) -> Int64:
        """The document, 0 to D - 1, that each window belongs to."""
        return np.repeat(np.arange(len(self.doc_offsets) - 1), np.diff(self.doc_offsets))

    def of_documents(self, documents: Int64) -> "Windows":
        """The windows of some of the documents, in the order asked for."""
        counts_D = np.diff(self.doc_offsets)[documents]
        doc_offsets = _offsets(counts_D)
        rows_C = np.repeat(self.doc_offsets[:-1][documents] - doc_offsets[:-1], counts_D) + np.arange(doc_offsets[-1])
        return Windows(
            chunk_index_C=self.chunk_index_C[rows_C],
            start_C=self.start_C[rows_C],
            stop_C=self.stop_C[rows_C],
            doc_offsets=doc_offsets,
        )

    def new_tokens_C(self) -> Int64:
        """Tokens of each window that no earlier window of its document covers."""
        seen_C = np.zeros_like(self.stop_C)
        seen_C[1:] = self.stop_C[:-1]
        seen_C[self.doc_offsets[:-1]] = 0
        # stops never fall within a document, so the window before has seen the furthest
        return self.stop_C - np.maximum(self.start_C, seen_C)


def chunk_windows(num_tokens_D: Int64, spec: ChunkSpec, *, document_seed_D: Int64 | None = None) -> Windows:
    """Cut D documents into windows.

    Args:
        num_tokens_D: content tokens of each document, >= 0.
        spec: the method's parameters.
        document_seed_D: a number that depends on the document alone; needed by `selection: random_k`, so that the
            draw does not depend on a document's neighbours.
    """
    length_D = np.asarray(num_tokens_D, dtype=np.int64)
    if spec.maximal_text_length is not None:
        length_D = np.minimum(length_D, spec.maximal_text_length)
    num_windows_D = _num_windows(length_D, spec)
    match spec.selection:
        case "all":
            return _grid(length_D, num_windows_D, spec)
        case "head":
            return _grid(length_D, np.ones_like(num_windows_D), spec)
        case "head_tail":
            return _head_tail(length_D, spec)
        case "random_k":
            if document_seed_D is None:
                raise ValueError("selection 'random_k' needs document_seed_D")
            return _random_k(_grid(length_D, num_windows_D, spec), document_seed_D, spec)


def _num_windows(length_D: Int64, spec: ChunkSpec) -> Int64:
    """How many windows of each document's grid stay.

    Window k covers length - k * stride tokens or chunk_size of them, so lengths never grow along the grid and the
    windows that are too short are always its last ones.
    """
    # window k stays if length - k * stride >= minimum
    minimum = max(spec.minimal_chunk_length, 1)
    kept_D = (length_D - minimum) // spec.stride + 1
    if spec.drop_contained_tail:
        # window k lies inside window k - 1 if (k - 1) * stride + chunk_size >= length
        uncontained_D = np.maximum(length_D - spec.chunk_size + spec.stride - 1, 0) // spec.stride + 1
        kept_D = np.minimum(kept_D, uncontained_D)
    return np.maximum(kept_D, 1)  # the first window stays, however short


def _grid(length_D: Int64, num_windows_D: Int64, spec: ChunkSpec) -> Windows:
    doc_offsets = _offsets(num_windows_D)
    chunk_index_C = np.arange(doc_offsets[-1]) - np.repeat(doc_offsets[:-1], num_windows_D)
    start_C = chunk_index_C * spec.stride
    stop_C = np.minimum(start_C + spec.chunk_size, np.repeat(length_D, num_windows_D))
    return Windows(chunk_index_C=chunk_index_C, start_C=start_C, stop_C=stop_C, doc_offsets=doc_offsets)


def _head_tail(length_D: Int64, spec: ChunkSpec) -> Windows:
    """The first chunk_size tokens, and the last chunk_size where there are more."""
    num_windows_D = np.where(length_D > spec.chunk_size, 2, 1)
    doc_offsets = _offsets(num_windows_D)
    chunk_index_C = np.arange(doc_offsets[-1]) - np.repeat(doc_offsets[:-1], num_windows_D)
    length_C = np.repeat(length_D, num_windows_D)
    start_C = np.where(chunk_index_C == 0, 0, length_C - spec.chunk_size)
    stop_C = np.minimum(start_C + spec.chunk_size, length_C)
    return Windows(chunk_index_C=chunk_index_C, start_C=start_C, stop_C=stop_C, doc_offsets=doc_offsets)


def _random_k(grid: Windows, document_seed_D: Int64, spec: ChunkSpec) -> Windows:
    num_windows_D = np.diff(grid.doc_offsets)
    keep_C = np.ones(grid.num_chunks, dtype=bool)
    for d in np.flatnonzero(num_windows_D > spec.num_random_chunks):
        rng = np.random.default_rng([spec.seed, int(document_seed_D[d])])
        first, last = grid.doc_offsets[d], grid.doc_offsets[d + 1]
        keep_C[first:last] = False
        keep_C[first + rng.choice(last - first, size=spec.num_random_chunks, replace=False)] = True
    return Windows(
        chunk_index_C=grid.chunk_index_C[keep_C],
        start_C=grid.start_C[keep_C],
        stop_C=grid.stop_C[keep_C],
        doc_offsets=_offsets(np.minimum(num_windows_D, spec.num_random_chunks)),
    )


def _offsets(counts_D: Int64) -> Int64:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts_D, dtype=np.int64)])
