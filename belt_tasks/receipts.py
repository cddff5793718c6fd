"""Receipts: what happened to a shard. Small enough to cross any process boundary; the tables stay in storage."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Self

from pydantic import Field

from belt_tasks.specs import Spec

UNSCORED = "output_not_finite"
"""Why a document that was fit for use has no prediction."""


class FileReceipt(Spec):
    """One object that was written."""

    table: str
    """The data contract that it satisfies."""
    path: str
    """Relative to the run's output."""
    num_rows: int


class Counts(Spec):
    """How much was done, and how long each part of it took. Counts of shards add up to those of a run.

    Parts run beside each other, so their seconds may exceed those on the clock.
    """

    num_documents: int = 0
    """Documents fit for use."""
    num_rejected: int = 0
    """Rows put aside."""
    rejected_by_reason: dict[str, int] = Field(default_factory=dict)
    num_chunks: int = 0
    num_tokens: int = 0
    """Content tokens of the documents."""
    num_unknown_tokens: int | None = 0
    """Those of them that stand for what the vocabulary lacks; None where the tokenizer has no such token."""
    num_tokens_scored: int = 0
    """Different content tokens that a chunk covers."""
    num_tokens_encoded: int = 0
    """Content tokens of all chunks: those in an overlap count each time."""
    num_documents_reused: int = 0
    """Documents with the text of another one of the run, whose scores they share: not encoded."""
    num_redundant_chunks: int = 0
    """Chunks that lie wholly inside those before them: `drop_contained_tail` omits them."""
    num_positions: int = 0
    """Token positions that the encoder computed: content, special tokens and padding."""
    num_padding: int = 0
    """Those of them that were padding."""
    needed_flops: float = 0.0
    """Floating-point operations that the scores need, whatever was computed; see `cost.needed_flops`."""
    read_s: float = 0.0
    tokenize_s: float = 0.0
    encode_s: float = 0.0
    write_s: float = 0.0

    def __add__(self, other: Self) -> "Counts":
        """Both together."""
        added = {
            name: getattr(self, name) + getattr(other, name)
            for name in Counts.model_fields
            if name not in ("rejected_by_reason", "num_unknown_tokens")
        }
        unknown = (self.num_unknown_tokens, other.num_unknown_tokens)
        added["num_unknown_tokens"] = None if None in unknown else sum(number or 0 for number in unknown)
        reasons = sorted(self.rejected_by_reason | other.rejected_by_reason)
        added["rejected_by_reason"] = {
            reason: self.rejected_by_reason.get(reason, 0) + other.rejected_by_reason.get(reason, 0)
            for reason in reasons
        }
        return Counts(**added)


class ShardReceipt(Spec):
    """A finished shard."""

    shard_key: str
    files: tuple[FileReceipt, ...]
    counts: Counts
    reused: bool = False
    """An earlier attempt at the same run had finished this shard."""
    is_shard: bool = True
    """False for what a run's plan wrote, which stands beside the shards."""

    def files_of(self, table: str) -> list[FileReceipt]:
        """The files of one table."""
        return [file for file in self.files if file.table == table]


def in_words(rejected_by_reason: Mapping[str, int]) -> str:
    """Reasons, and how many rows were put aside for each."""
    return ", ".join(f"{reason} {number:,}" for reason, number in sorted(rejected_by_reason.items()))


def total(receipts: Iterable[ShardReceipt]) -> Counts:
    """The counts of a run."""
    return sum((receipt.counts for receipt in receipts), start=Counts())


STAGES = ("read", "tokenize", "encode", "write")
"""What a run's seconds are told by."""


class Stopwatch:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add the seconds that the block takes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def receipt(self) -> dict[str, float]:
        """The seconds under the names that `Counts` gives them."""
        return {f"{stage}_s": seconds for stage, seconds in self.seconds.items()}
