"""The chunk table: one row per window, for people and tools that want belt's chunks without its model."""

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from torch import Tensor

import data_contracts
from belt_tasks import milestones, prepare, progress, publishing
from belt_tasks.corpus import ShardRef
from belt_tasks.publishing import RunRef, ShardWriter
from belt_tasks.receipts import Counts, ShardReceipt, Stopwatch
from belt_tasks.specs import ChunkSpec, CorpusSpec
from belt_tasks.tokens import Tokens, load_tokenizer
from belt_tasks.windows import Windows, chunk_windows


@milestones.of_shard("chunk")
def chunk_shard(
    shard: ShardRef,
    corpus: CorpusSpec,
    chunks: ChunkSpec,
    *,
    run: RunRef,
    encoder: str,
    duplicates_uri: str | None,
) -> ShardReceipt:
    """Tokenize and cut one shard, and write its chunk table and rejected rows, unless an earlier attempt did.

    Args:
        shard: what to read.
        corpus: columns, and the split whose rows are wanted.
        chunks: windows.
        run: where to write.
        encoder: local directory or hub name of the tokenizer.
        duplicates_uri: table of rows whose doc_id came before; None where there is none.
    """
    finished = publishing.finished_shard(run, shard)
    if finished is not None:
        progress.advance("tokenize", shard.num_rows)
        return finished
    stopwatch, counts = Stopwatch(), Counts()
    blocks = prepare.token_blocks(
        shard, corpus, load_tokenizer(encoder), duplicates_uri=duplicates_uri, stopwatch=stopwatch
    )
    with ShardWriter.open(run, shard, table="chunks") as writer:
        for block in blocks:
            writer.reject(block.rejected)
            if len(block.documents) == 0:
                continue
            windows = chunk_windows(block.tokens.num_tokens_D, chunks, document_seed_D=block.document_seed_D())
            with stopwatch.time("write"):
                writer.write(chunk_table(block.documents["doc_id"], block.tokens, windows))
            counts += prepare.count(windows, block.tokens)
    return writer.receipt(counts.model_copy(update=stopwatch.receipt()))


def chunk_table(doc_id_D: pl.Series, tokens: Tokens, windows: Windows) -> pa.Table:
    """Rows of the chunks contract, in document order.

    `input_ids` are content tokens only; a chunk's tokens are copied, so overlap costs space here and nowhere else.
    """
    doc_of_chunk_C = windows.doc_of_chunk_C
    start_T = tokens.offsets[:-1][doc_of_chunk_C] + windows.start_C
    length_C = windows.stop_C - windows.start_C
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(length_C)])
    taken_T = np.repeat(start_T - offsets[:-1], length_C) + np.arange(offsets[-1])
    input_ids = pa.ListArray.from_arrays(offsets.astype(np.int32), tokens.input_ids_T[taken_T])
    return pa.table(
        {
            "doc_id": doc_id_D.gather(doc_of_chunk_C).to_arrow().cast(pa.string()),
            "chunk_index": windows.chunk_index_C.astype(np.int32),
            "start": windows.start_C.astype(np.int32),
            "stop": windows.stop_C.astype(np.int32),
            "input_ids": input_ids,
            "num_tokens": length_C.astype(np.int32),
        },
        schema=data_contracts.arrow_schema("chunks"),
    )


def token_buffer(chunks: pa.ChunkedArray) -> list[tuple[Tensor, Tensor]]:
    """A chunk table's `input_ids` column as torch tensors that share its memory.

    Returns:
        For each Arrow chunk of the column, the token ids int32 [T] and offsets int32 [C + 1]: row c owns
        `ids[offsets[c] : offsets[c + 1]]`. Read-only: writing to them would write to the table.
    """
    return [(_shared(part.values), _shared(part.offsets)) for part in chunks.chunks]


def _shared(values: pa.Int32Array) -> Tensor:
    return torch.utils.dlpack.from_dlpack(values)
