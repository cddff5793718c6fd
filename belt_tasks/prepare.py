"""Prepare: a shard's documents to blocks of tokens. What scoring, chunking and fine-tuning all begin with.

A block is as many documents as fill BLOCK_TOKENS, so memory depends on neither shard nor corpus, and mini-batches are
planned over enough chunks that sorting leaves next to no padding.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import polars_hash as plh

from belt_tasks import corpus, progress, storage
from belt_tasks.corpus import LabelRole, ShardRef
from belt_tasks.receipts import Counts, Stopwatch
from belt_tasks.specs import CorpusSpec
from belt_tasks.tokens import DocumentTokenizer, Tokens
from belt_tasks.windows import Windows

BLOCK_TOKENS = 500_000
FIRST_BLOCK_TOKENS = 100_000  # so that the encoder does not wait long for its first work
ROW_TOKENS = 16  # a row takes memory however short its text is, and so does a rejected one: it counts as this many


@dataclass(frozen=True, kw_only=True)
class TokenBlock:
    """Tokenized documents of a shard, D of them, and the rows that were put aside on the way."""

    documents: pl.DataFrame
    """doc_id, content_fingerprint, label, labels, target, weight, row_index; D rows."""
    tokens: Tokens
    rejected: pl.DataFrame
    """source_uri, row_index, doc_id, reason, detail."""

    def document_seed_D(self) -> npt.NDArray[np.int64]:
        """A number that depends on the text alone."""
        return document_seeds(self.documents["content_fingerprint"])


def token_blocks(
    shard: ShardRef,
    spec: CorpusSpec,
    tokenizer: DocumentTokenizer,
    *,
    stopwatch: Stopwatch,
    duplicates_uri: str | None = None,
    rows: npt.NDArray[np.int64] | None = None,
    label_role: LabelRole = "none",
    vocabulary: frozenset[str] | None = None,
    keep_text: bool = False,
) -> Generator[TokenBlock]:
    """Read and tokenize a shard, block by block; the last block may hold rejected rows alone.

    Args:
        shard: what to read.
        spec: columns, and the split whose rows are wanted.
        tokenizer: of the encoder.
        stopwatch: gets the seconds of `read` and `tokenize`.
        duplicates_uri: table of rows whose doc_id came before; None where there is none.
        rows: positions in the file of the rows that are wanted; None wants all.
        label_role: how to read the label column.
        vocabulary: allowed class names; None allows all.
        keep_text: whether the documents keep their column `text`.

    Raises:
        ShardError: the file became unreadable after planning.
    """
    duplicates = duplicates_of(shard, duplicates_uri)
    batches = corpus.read_documents(
        shard, spec, duplicates=duplicates, label_role=label_role, vocabulary=vocabulary, rows=rows
    )
    documents: list[pl.DataFrame] = []
    tokens: list[Tokens] = []
    rejected: list[pl.DataFrame] = []
    num_tokens = 0
    enough = min(FIRST_BLOCK_TOKENS, BLOCK_TOKENS)
    while True:
        with stopwatch.time("read"):
            batch = next(batches, None)
        if batch is not None:
            with stopwatch.time("tokenize"):
                tokens.append(tokenizer.tokenize(batch.good["text"].to_list()))
                fingerprints = content_fingerprints(batch.good["text"])
                good = batch.good if keep_text else batch.good.drop("text")
                documents.append(good.with_columns(content_fingerprint=fingerprints))
            rejected.append(batch.rejected)
            num_rows = len(batch.good) + len(batch.rejected)
            num_tokens += len(tokens[-1].input_ids_T) + ROW_TOKENS * num_rows
            progress.advance("tokenize", num_rows)
        if documents and (batch is None or num_tokens >= enough):
            yield TokenBlock(
                documents=pl.concat(documents),
                tokens=Tokens.concatenate(tokens),
                rejected=pl.concat(rejected),
            )
            documents, tokens, rejected, num_tokens, enough = [], [], [], 0, BLOCK_TOKENS
        if batch is None:
            return


def duplicates_of(shard: ShardRef, duplicates_uri: str | None) -> npt.NDArray[np.int64]:
    """Positions in the shard's file of rows whose doc_id came before."""
    if duplicates_uri is None:
        return np.empty(0, dtype=np.int64)
    table = pl.DataFrame(storage.read_parquet(duplicates_uri))
    return table.filter(pl.col("source_uri") == shard.uri)["row_index"].to_numpy()


def content_fingerprints(texts: pl.Series | Sequence[str]) -> pl.Series:
    """BLAKE3 of each text's UTF-8 bytes, 64 lowercase hex digits."""
    return pl.DataFrame({"text": texts}, schema={"text": pl.String}).select(plh.col("text").chash.blake3()).to_series()


def document_seeds(content_fingerprints_D: pl.Series) -> npt.NDArray[np.int64]:
    """The first 60 bits of each fingerprint."""
    return content_fingerprints_D.str.slice(0, 15).str.to_integer(base=16, dtype=pl.Int64).to_numpy()


def count(windows: Windows, tokens: Tokens) -> Counts:
    """The documents, chunks and tokens of one block."""
    new_tokens_C = windows.new_tokens_C()
    return Counts(
        num_documents=len(tokens.num_tokens_D),
        num_chunks=windows.num_chunks,
        num_tokens=len(tokens.input_ids_T),
        num_unknown_tokens=tokens.num_unknown,
        num_tokens_scored=int(new_tokens_C.sum()),
        num_tokens_encoded=int((windows.stop_C - windows.start_C).sum()),
        num_redundant_chunks=int(((new_tokens_C == 0) & (windows.chunk_index_C > 0)).sum()),
    )
