"""Statistics of a scoring run: what it read and what the model said of it, as counts that add up.

    OUTPUT/runs/RUN_ID/statistics.json

Everything is additive: the statistics of shards, runs or steps are, added, exactly those of all their documents
together. Beside counts there is a sample, for tests that need numbers: the documents whose hashes are smallest. It is
as good as random, the same whenever it is drawn, and that of two runs follows from theirs. The hash covers id and
text: by the text alone, all copies of a repeated text would be drawn, or none.
"""

from collections.abc import Iterator
from functools import reduce
from operator import add
from typing import Any, Self

import numpy as np
import polars as pl
import polars_hash as plh

from belt_tasks import storage
from belt_tasks.histograms import Histogram
from belt_tasks.publishing import Manifest, RunRef
from belt_tasks.specs import Spec
from belt_tasks.stored import read_json
from belt_tasks.threads import Threads

SAMPLE_SIZE = 5_000
KEY_DIGITS = 16
NUM_THREADS = 4  # files at once, some row groups of each in memory
BATCH_ROWS = 65_536  # to draw a sample costs some milliseconds, however few the rows
SAMPLED = {"keys": pl.String, "scores": pl.Float64, "labels": pl.Int64, "num_tokens": pl.Int64}
COLUMNS = ["doc_id", "label", "labels", "score", "num_tokens", "content_fingerprint"]


class Sample(Spec):
    """The documents whose keys are smallest, SAMPLE_SIZE of them at most; columns of equal length, sorted by key."""

    keys: tuple[str, ...] = ()
    """KEY_DIGITS hexadecimal digits of a hash of id and text."""
    scores: tuple[float, ...] = ()
    labels: tuple[int, ...] = ()
    """Positions among the labels; -1 where a document has none."""
    num_tokens: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Documents."""
        return len(self.keys)

    @classmethod
    def of(cls, frame: pl.DataFrame) -> Self:
        """Draw from rows of keys, scores, labels and num_tokens."""
        order = list(SAMPLED)  # by all columns: of rows with equal keys it does not matter which came first
        drawn = frame.select(order).bottom_k(SAMPLE_SIZE, by=order).sort(order)
        return cls(**drawn.to_dict(as_series=False))

    def __add__(self, other: Self) -> Self:
        """What would be drawn from all documents of both."""
        return self.of(pl.concat([self.frame(), other.frame()]))

    def frame(self) -> pl.DataFrame:
        """The columns."""
        return pl.DataFrame({name: list(getattr(self, name)) for name in SAMPLED}, schema=SAMPLED)


class RunStatistics(Spec):
    """What runs by the same rules read, and what the model said of it."""

    scoring_fingerprint: str
    """By which rules."""
    labels: tuple[str, ...]
    """In the order of scores; of a regression the name of the target."""
    run_ids: tuple[str, ...] = ()
    """Sorted."""
    is_regression: bool = False
    """Whether scores are values and not probabilities."""
    num_documents: int = 0
    """That have a prediction."""
    label_counts: tuple[int, ...]
    """Documents that carry each label; with multilabel a document carries any number."""
    num_without_label: int = 0
    scores: Histogram = Histogram()
    """Of column `score`: the probability of the label, or the value."""
    lengths: Histogram = Histogram()
    """Of log2(1 + num_tokens)."""
    num_tokens: int = 0
    """Content tokens."""
    num_unknown_tokens: int | None = 0
    """Those of them that stand for what the vocabulary lacks; None where that is not known of all."""
    sample: Sample = Sample()

    @classmethod
    def of_rows(cls, rows: pl.DataFrame, labels: tuple[str, ...], *, scoring_fingerprint: str = "") -> Self:
        """Count predictions; how many tokens are unknown they do not say, so tokens are not counted.

        Args:
            rows: COLUMNS of predictions; with one label, `logits` too.
            labels: in the order of scores.
            scoring_fingerprint: by which rules they were made.
        """
        carried = dict(rows["labels"].explode().drop_nulls().value_counts().iter_rows())
        positions = {label: i for i, label in enumerate(labels)}
        drawn = rows.select(
            keys=plh.concat_str("doc_id", "content_fingerprint", separator="\0").chash.blake3().str.head(KEY_DIGITS),
            scores="score",
            labels=pl.col("label").replace_strict(positions, default=-1, return_dtype=pl.Int64),
            num_tokens=pl.col("num_tokens").cast(pl.Int64),
        )
        return cls(
            scoring_fingerprint=scoring_fingerprint,
            labels=labels,
            # a probability equals its own logit at one value only (about .659): all rows do so in a regression alone
            is_regression=len(labels) == 1 and bool((rows["score"] == rows["logits"].list.first()).all()),
            num_documents=len(rows),
            label_counts=tuple(carried.get(label, 0) for label in labels),
            num_without_label=int((rows["labels"].list.len() == 0).sum()),
            scores=Histogram.of(rows["score"].to_numpy()),
            lengths=Histogram.of(np.log2(1.0 + rows["num_tokens"].to_numpy())),
            sample=Sample.of(drawn),
        )

    def __add__(self, other: Self) -> Self:
        """Those of all documents of both.

        Raises:
            ValueError: they were scored by different rules, and do not compare.
        """
        for name in ("scoring_fingerprint", "labels"):
            mine, its = getattr(self, name), getattr(other, name)
            if mine != its:
                raise ValueError(f"{name} must be that of both, got {mine!r} and {its!r}")
        unknown = (self.num_unknown_tokens, other.num_unknown_tokens)
        return type(self)(
            scoring_fingerprint=self.scoring_fingerprint,
            labels=self.labels,
            run_ids=tuple(sorted({*self.run_ids, *other.run_ids})),
            is_regression=len(self.labels) == 1
            and all(each.is_regression for each in (self, other) if each.num_documents),
            num_documents=self.num_documents + other.num_documents,
            label_counts=tuple(map(add, self.label_counts, other.label_counts)),
            num_without_label=self.num_without_label + other.num_without_label,
            scores=self.scores + other.scores,
            lengths=self.lengths + other.lengths,
            num_tokens=self.num_tokens + other.num_tokens,
            num_unknown_tokens=None if None in unknown else sum(number or 0 for number in unknown),
            sample=self.sample + other.sample,
        )

    @property
    def unknown_share(self) -> float | None:
        """Of the tokens; None where it is not known, or there is none."""
        if self.num_unknown_tokens is None or self.num_tokens == 0:
            return None
        return self.num_unknown_tokens / self.num_tokens


def uri_of(run: RunRef) -> str:
    """Where a run's statistics are."""
    return storage.join(run.uri, "statistics.json")


def of_run(run: RunRef, manifest: Manifest) -> RunStatistics | None:
    """Count a complete run's predictions and write the statistics, unless an earlier attempt did.

    Some row groups of some files are in memory at a time.

    Returns:
        None where its files were cleaned up before they were counted.
    """
    uri = uri_of(run)
    if storage.exists(uri):
        return read_json(uri, RunStatistics, "statistics")
    uris = manifest.uris(run.output_uri, "predictions")
    if not all(map(storage.exists, uris)):
        return None
    counted = of_files(uris, manifest)
    storage.write_bytes(uri, counted.model_dump_json().encode())
    return counted


def of_files(uris: list[str], manifest: Manifest) -> RunStatistics:
    """Count predictions, and take from a manifest what they do not say."""
    fingerprint, labels = str(manifest.run["scoring_fingerprint"]), manifest.labels
    none = RunStatistics(scoring_fingerprint=fingerprint, labels=labels, label_counts=(0,) * len(labels))

    def count(uri: str) -> RunStatistics:
        parts = (RunStatistics.of_rows(rows, labels, scoring_fingerprint=fingerprint) for rows in _batches(uri, labels))
        return reduce(add, parts, none)

    with Threads(NUM_THREADS) as threads:
        counted = reduce(add, threads.map(count, uris), none)
    run: dict[str, Any] = manifest.run
    told = {"num_tokens": run["num_tokens"], "num_unknown_tokens": run.get("num_unknown_tokens")}
    return counted.model_copy(update=told | {"run_ids": (run["run_id"],)})


def _batches(uri: str, labels: tuple[str, ...]) -> Iterator[pl.DataFrame]:
    columns = [*COLUMNS, *(["logits"] if len(labels) == 1 else [])]
    with storage.open_parquet(uri) as file, storage.errors_of(f"read {uri}"):
        yield from map(pl.DataFrame, file.iter_batches(BATCH_ROWS, columns=columns))
