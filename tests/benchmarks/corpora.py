"""What is scored, and with what: corpora cut to size, and a checkpoint with a random head.

Probabilities of a random head mean nothing, but they cost what those of a trained one do, and can be compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers

from belt_tasks.demo_corpus import DemoCorpusSpec, build_demo_corpus
from belt_tasks.errors import ConfigError
from belt_tasks.specs import ChunkSpec, Head, PoolingSpec
from belt_tasks.tokens import load_tokenizer
from belt_tasks.windows import chunk_windows
from tests.benchmarks.documents import Int64

COLUMNS = ["doc_id", "text"]
LONG_WORDS = 300  # docstrings have some 1.9 tokens a word, so this is more than a chunk of 510
MAX_CHARACTERS = 8_000_000  # some two million tokens: more than is ever scored without asking for it
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents in the order in which they are drawn: the first N of them are a sample."""

    name: str
    table: pa.Table
    """doc_id, text."""
    num_tokens_D: Int64
    """Content tokens of each document."""

    def write(self, path: Path, num_documents: int) -> str:
        """Write the first documents as one Parquet file."""
        pq.write_table(self.table.slice(0, num_documents), path)
        return str(path)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How much a peer reads of a corpus."""

    num_content_tokens: int
    """Tokens of all windows, without special ones: what overlaps counts as often as it is read."""
    num_tokens_C: Int64
    """Tokens of each chunk, special ones included."""


def reading(num_tokens_D: Int64, chunks: ChunkSpec, *, num_special: int) -> Reading:
    """What windows make of documents."""
    windows = chunk_windows(num_tokens_D, chunks)
    content_C = windows.stop_C - windows.start_C
    return Reading(
        num_content_tokens=int(content_C.sum()),
        num_tokens_C=content_C + num_special,
    )


def read_corpus(path: Path) -> pa.Table:
    """The usable documents of a Parquet file.

    Raises:
        ConfigError: it is not there, is no Parquet file, or lacks a column.
    """
    if not path.is_file():
        raise ConfigError(f"--corpus must be a Parquet file, got {path}: there is no such file")
    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ConfigError(f"--corpus must be a Parquet file, got {path}: {str(error).splitlines()[0]}") from error
    missing = [name for name in COLUMNS if name not in schema.names]
    if missing:
        raise ConfigError(
            f"{path}: the corpus must have the columns doc_id and text, lacks {', '.join(missing)}; "
            f"it has {', '.join(schema.names)}"
        )
    table = usable(pq.read_table(path, columns=COLUMNS))
    if table.num_rows == 0:
        raise ConfigError(f"{path}: the corpus has no document with a doc_id and a text")
    return table


def usable(table: pa.Table) -> pa.Table:
    """Documents that are the same work for every peer: without what belt rejects, and without equal texts.

    belt encodes equal texts once, which is worth what a corpus makes of it; here it would hide how fast belt encodes.
    """
    frame = pl.DataFrame(table).select(pl.col("doc_id").cast(pl.String), pl.col("text").cast(pl.String)).drop_nulls()
    for column in COLUMNS:
        frame = frame.unique(column, keep="first", maintain_order=True)
    return frame.to_arrow()


def sample(table: pa.Table, num_documents: int, *, seed: int = SEED) -> pa.Table:
    """Whole documents, drawn without replacement; the same seed draws the same, and fewer are the first of more."""
    order = np.random.default_rng(seed).permutation(table.num_rows)
    return table.take(pa.array(order[:num_documents]))


def demo_cuts(*, documents_per_library: int) -> Iterator[tuple[str, pa.Table]]:
    """Two corpora of the docstrings of installed libraries: mostly beyond a chunk, and mostly well within one."""
    long = build_demo_corpus(
        DemoCorpusSpec(
            documents_per_library=documents_per_library,
            empty_per_library=0,
            minimal_words=600,
            maximal_words=5_000,
            num_long=0,
        )
    )
    num_words = pl.DataFrame(long)["text"].str.count_matches(r"\S+")
    yield "long", usable(long.filter(pa.array(num_words >= LONG_WORDS)))
    short = build_demo_corpus(
        DemoCorpusSpec(
            documents_per_library=documents_per_library,
            empty_per_library=1,
            minimal_words=25,
            maximal_words=1_500,
            num_long=0,
        )
    )
    yield "short", usable(short)


def drawn(name: str, table: pa.Table, encoder: str, *, num_documents: int | None) -> Corpus:
    """Draw documents and count their tokens; without a number, as many as could be scored in the time there is."""
    table = sample(table, table.num_rows if num_documents is None else num_documents)
    if num_documents is None:
        num_characters = np.cumsum(pl.DataFrame(table)["text"].str.len_chars().to_numpy())
        table = table.slice(0, int(np.searchsorted(num_characters, MAX_CHARACTERS)) + 1)
    num_tokens_D = load_tokenizer(encoder).tokenize(table["text"].to_pylist()).num_tokens_D
    return Corpus(name=name, table=table, num_tokens_D=num_tokens_D)


def num_documents_within(num_tokens_D: Int64, *, seconds_per_token: float, budget_s: float, at_least: int) -> int:
    """How many of the first documents can be scored in some time, if time goes by tokens."""
    num_affordable = int(np.searchsorted(np.cumsum(num_tokens_D) * seconds_per_token, budget_s, side="right"))
    return min(max(num_affordable, at_least), len(num_tokens_D))


def num_documents_with(num_tokens_D: Int64, num_tokens: int, *, at_least: int) -> int:
    """How many of the first documents have so many tokens together, or all where there are not so many."""
    num_enough = int(np.searchsorted(np.cumsum(num_tokens_D), num_tokens)) + 1
    return min(max(num_enough, at_least), len(num_tokens_D))


def save_random_head(encoder: str, folder: Path, *, seed: int = SEED) -> None:
    """A belt checkpoint: an encoder and a random head with two classes.

    Raises:
        ConfigError: there is no encoder that belt can load.
    """
    from belt_tasks import checkpoint
    from belt_tasks.encoder import ChunkModel, load_body

    transformers.utils.logging.disable_progress_bar()
    body = load_body(encoder)
    torch.manual_seed(seed)
    checkpoint.save_checkpoint(
        ChunkModel(body, num_logits=2, pooling=PoolingSpec()),
        str(folder),
        tokenizer_source=encoder,
        head=Head(task="multiclass", labels=("a", "b")),
        chunks=ChunkSpec(),
        pooling=PoolingSpec(),
        data_fingerprint="0" * 64,
        metrics={},
        training={},
    )
