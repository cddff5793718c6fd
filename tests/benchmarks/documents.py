"""What peers have in common around their model: texts in, windows, mean pooling, probabilities out.

Shape letters: D documents, C chunks, T tokens, L labels.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from belt_tasks.specs import ChunkSpec
from belt_tasks.tokens import DocumentTokenizer, SpecialTokens, Tokens, load_tokenizer
from belt_tasks.windows import Windows, chunk_windows
from tests.benchmarks.protocol import Work

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """A corpus as belt's tokenizer and windows cut it."""

    doc_ids: list[str]
    texts: list[str]
    tokens: Tokens
    windows: Windows
    special: SpecialTokens

    @property
    def num_tokens_C(self) -> Int64:
        """Tokens of each chunk, special ones included."""
        return self.windows.stop_C - self.windows.start_C + self.special.num_tokens

    def padded(self, rows_B: Int64) -> tuple[Int64, Int64]:
        """Token ids and attention mask of some chunks, [B, T], padded to the longest."""
        first_C = self.tokens.offsets[:-1][self.windows.doc_of_chunk_C]
        longest = int(self.num_tokens_C[rows_B].max())
        input_ids_BT = np.full((len(rows_B), longest), self.special.pad_id, dtype=np.int64)
        attention_mask_BT = np.zeros((len(rows_B), longest), dtype=np.int64)
        for i, row in enumerate(rows_B):
            start, stop = first_C[row] + self.windows.start_C[row], first_C[row] + self.windows.stop_C[row]
            content = self.tokens.input_ids_T[start:stop]
            ids = np.concatenate([self.special.prefix_ids, content, self.special.suffix_ids]).astype(np.int64)
            input_ids_BT[i, : len(ids)] = ids
            attention_mask_BT[i, : len(ids)] = 1
        return input_ids_BT, attention_mask_BT

    def chunk_texts(self) -> list[str]:
        """The characters that each chunk's tokens cover."""
        texts = []
        doc_of_chunk_C = self.windows.doc_of_chunk_C
        for document, start, stop in zip(doc_of_chunk_C, self.windows.start_C, self.windows.stop_C, strict=True):
            base = self.tokens.offsets[document]
            if start == stop:
                texts.append("")
                continue
            first, last = self.tokens.start_char_T[base + start], self.tokens.stop_char_T[base + stop - 1]
            texts.append(self.texts[document][first:last])
        return texts


@cache
def tokenizer_of(checkpoint: str) -> DocumentTokenizer:
    """Belt's tokenizer, loaded once."""
    return load_tokenizer(checkpoint)


def num_labels(checkpoint: str) -> int:
    """L of a checkpoint."""
    from belt_tasks.checkpoint import read_head

    return read_head(checkpoint).num_logits


def read_texts(corpus: str) -> tuple[list[str], list[str]]:
    """Ids and texts of a corpus."""
    table = pq.read_table(corpus, columns=["doc_id", "text"])
    return table["doc_id"].to_pylist(), table["text"].to_pylist()


def cut(work: Work, checkpoint: str) -> Chunks:
    """Read a corpus and cut it."""
    doc_ids, texts = read_texts(work.corpus)
    tokenizer = tokenizer_of(checkpoint)
    tokens = tokenizer.tokenize(texts)
    spec = ChunkSpec(chunk_size=work.chunk_size, stride=work.stride)
    windows = chunk_windows(tokens.num_tokens_D, spec)
    return Chunks(doc_ids=doc_ids, texts=texts, tokens=tokens, windows=windows, special=tokenizer.special)


def pool(logits_CL: npt.NDArray[np.floating], doc_of_chunk_C: Int64, num_documents: int) -> Float64:
    """Probabilities [D, L] of the mean logits of each document's chunks."""
    sum_DL = np.zeros((num_documents, logits_CL.shape[1]))
    np.add.at(sum_DL, doc_of_chunk_C, logits_CL)
    mean_DL = sum_DL / np.bincount(doc_of_chunk_C, minlength=num_documents)[:, None]
    exp_DL = np.exp(mean_DL - mean_DL.max(axis=1, keepdims=True))
    return exp_DL / exp_DL.sum(axis=1, keepdims=True)


def write_scores(output: str, doc_ids: list[str], probabilities_DL: Float64) -> None:
    """Write a peer's result."""
    flat = pa.array(probabilities_DL.reshape(-1))
    lists = pa.FixedSizeListArray.from_arrays(flat, probabilities_DL.shape[1])
    pq.write_table(pa.table({"doc_id": doc_ids, "probabilities": lists}), output)


def read_scores(output: str) -> tuple[list[str], Float64]:
    """Ids in ascending order and their probabilities [D, L], of any peer."""
    if Path(output).is_dir():
        from belt_tasks import score_tables

        frame = score_tables.read_table(output, "predictions", columns=["doc_id", "scores"])
        frame = frame.with_columns(probabilities=pl.col("scores").list.eval(pl.element().struct.field("score")))
    else:
        frame = pl.DataFrame(pq.read_table(output))
    frame = frame.sort("doc_id")
    return frame["doc_id"].to_list(), np.array(frame["probabilities"].to_list(), dtype=np.float64)


def largest_difference(scores: tuple[list[str], Float64], reference: tuple[list[str], Float64]) -> float:
    """The largest difference in any probability of any document.

    Raises:
        ValueError: they are not about the same documents.
    """
    if scores[0] != reference[0]:
        raise ValueError(f"scored {len(scores[0])} documents, not the same {len(reference[0])} as the reference")
    return float(np.abs(scores[1] - reference[1]).max(initial=0.0))
