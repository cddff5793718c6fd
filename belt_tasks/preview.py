"""Preview: what a scoring would do and how long it would take, without changing anything at the output."""

import tempfile
import time
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import polars as pl

from belt_tasks import checkpoint as checkpoints
from belt_tasks import comparison, inventory, planning, prepare, score_tables, storage
from belt_tasks import corpus as corpora
from belt_tasks.changes import ChangeCounts, CorpusState
from belt_tasks.comparison import Comparison, Question
from belt_tasks.inventory import Inventories
from belt_tasks.scoring import Scorer
from belt_tasks.specs import CorpusSpec, ScoreSpec, Spec
from belt_tasks.threads import Threads

T = TypeVar("T")
Int64 = npt.NDArray[np.int64]

SAMPLE_FILES = 8
SAMPLE_DOCUMENTS = 64
SAMPLE_BYTES = 200_000  # some 50,000 tokens: seconds on a CPU


class ScorePreview(Spec):
    """What a scoring would do."""

    counts: ChangeCounts
    num_files: int
    num_files_read: int
    """Files that are new or changed, or whose documents would be scored again."""
    num_rows_read: int
    """Rows, good and bad, of these files."""
    rejected_by_reason: dict[str, int]
    """Rows of these files that would be put aside."""
    max_rejected_share: float
    num_documents_to_score: int
    num_tokens_to_score: int
    """Estimated from a sample."""
    estimated_s: float
    """Seconds that the model would take on this machine, estimated from a sample."""

    @property
    def num_rejected(self) -> int:
        """Rows that would be put aside."""
        return sum(self.rejected_by_reason.values())

    @property
    def is_refused(self) -> bool:
        """Whether nothing would be published, since too many rows are put aside."""
        return self.num_rejected > self.max_rejected_share * self.num_rows_read


def preview_scoring(
    corpus_uri: str, checkpoint_uri: str, output_uri: str, corpus: CorpusSpec, spec: ScoreSpec
) -> ScorePreview:
    """Say what scoring would do; parameters are those of `plan_scoring`, and nothing is written to the output.

    Raises:
        ConfigError: the corpus, the checkpoint, the output or a parameter is wrong.
    """
    whole = spec.model_copy(update={"publish_every": None})  # all of the steps that it would be published in
    planning.check_apart(corpus_uri, output_uri)
    asked = comparison.ask(corpus_uri, checkpoint_uri, corpus, whole)
    output_uri = storage.absolute(output_uri)
    shown = score_tables.shown(output_uri)
    known = None if shown is None else comparison.read_sources(shown)
    comparison.check_evidence(asked, shown, known)
    with tempfile.TemporaryDirectory() as scratch:
        inventories = Inventories(root_uri=storage.join(output_uri, "inventory"), scratch_uri=scratch)
        found = comparison.compare(asked, shown, known, inventories)
        rows_to_score = found.changes.rows_to_score
        num_bytes = _num_bytes(found.now, rows_to_score)
        num_tokens, seconds, sampled_bytes = _probe(asked, rows_to_score)
        share = num_bytes / sampled_bytes if sampled_bytes else 0.0
        read = [source for source in found.now.sources if source.source_uri in found.reread]
        return ScorePreview(
            counts=found.changes.counts,
            num_files=len(found.now.sources),
            num_files_read=len(read),
            num_rows_read=sum(source.num_rows for source in read),
            rejected_by_reason=_rejected_by_reason(found),
            max_rejected_share=spec.max_rejected_share,
            num_documents_to_score=sum(len(rows) for rows in rows_to_score.values()),
            num_tokens_to_score=round(num_tokens * share),
            estimated_s=seconds * share,
        )


def _rejected_by_reason(found: Comparison) -> dict[str, int]:
    uris = sorted(found.reread & found.now.by_uri.keys())
    with Threads(inventory.NUM_THREADS) as threads:
        reasons = threads.map(lambda uri: found.now.rejected(uri)["reason"], uris)
        together = pl.concat([pl.Series("reason", [], dtype=pl.String), *reasons])
    return dict(together.value_counts().sort("reason").iter_rows())


def _num_bytes(state: CorpusState, rows_to_score: Mapping[str, Int64]) -> int:
    """Bytes of the texts to score."""
    chosen = [source for source in state.sources if source.source_uri in rows_to_score]

    def count(frame: pl.DataFrame, uri: str) -> int:
        return int(frame.filter(pl.col("row_index").is_in(pl.Series(rows_to_score[uri]).implode()))["num_bytes"].sum())

    with Threads(inventory.NUM_THREADS) as threads:
        return sum(
            threads.map(
                lambda source: count(
                    state.inventories.read(source.inventory_key, ["row_index", "num_bytes"]), source.source_uri
                ),
                chosen,
            )
        )


def _probe(asked: Question, rows_to_score: Mapping[str, Int64]) -> tuple[int, float, int]:
    """Score a sample: its tokens, seconds and bytes."""
    texts = _sample(asked, rows_to_score)
    if not texts:
        return 0, 0.0, 0
    scorer = Scorer.of(checkpoints.cache.get(asked.checkpoint_uri, asked.checkpoint_digest), asked.spec)
    for chosen in (texts[:1], texts):  # the first time something is loaded and compiled
        started = time.perf_counter()
        tokens = scorer.checkpoint.tokenizer.tokenize(chosen)
        windows = scorer.windows(tokens, prepare.content_fingerprints(chosen))
        scorer.pool(scorer.encode(tokens, np.arange(len(chosen)), windows), windows)
        seconds = time.perf_counter() - started
    return len(tokens.input_ids_T), seconds, sum(len(text.encode()) for text in texts)


def _sample(asked: Question, rows_to_score: Mapping[str, Int64]) -> list[str]:
    """Texts from all over what is to be scored."""
    files = [file for file in asked.files if file.uri in rows_to_score]
    texts: list[str] = []
    num_bytes = 0
    for file in _spread(files, SAMPLE_FILES):
        rows = np.array(_spread(rows_to_score[file.uri].tolist(), SAMPLE_DOCUMENTS // SAMPLE_FILES))
        for shard, here in corpora.shards_with_rows(file, rows):
            nothing = np.empty(0, dtype=np.int64)
            for batch in corpora.read_documents(shard, asked.corpus, duplicates=nothing, rows=here):
                for text in batch.good["text"]:
                    if num_bytes < SAMPLE_BYTES:
                        texts.append(text)
                        num_bytes += len(text.encode())
    return texts


def _spread(items: list[T], most: int) -> list[T]:
    """At most so many items, evenly spread."""
    if len(items) <= most:
        return items
    return [items[i * len(items) // most] for i in range(most)]
