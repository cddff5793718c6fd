"""Comparison: what a scoring is asked for, and how its corpus differs from what the published tables are of."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import polars as pl

from belt_tasks import changes, encoder, inventory, publishing, score_tables, scoring, storage
from belt_tasks import checkpoint as checkpoints
from belt_tasks import corpus as corpora
from belt_tasks.changes import Changes, CorpusState
from belt_tasks.errors import ConfigError
from belt_tasks.inventory import Inventories, SourceRef
from belt_tasks.publishing import RunRef
from belt_tasks.score_tables import Shown
from belt_tasks.specs import CorpusSpec, ScoreSpec
from belt_tasks.storage import StoredFile

SCORING_FORMAT = 1
"""Another one where belt would give the same document other scores, beyond float noise."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked for, with all that the checkpoint and the device decide."""

    corpus_uri: str
    files: list[StoredFile]
    corpus: CorpusSpec
    spec: ScoreSpec
    checkpoint_uri: str
    checkpoint_digest: str
    scoring_fingerprint: str
    labels: tuple[str, ...]
    device: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The corpus as the run will leave it, against what is shown."""

    before: CorpusState | None
    """What the shown tables are of; None where there are none."""
    now: CorpusState
    """What they will be of."""
    to_rescore: frozenset[str]
    """Files whose documents are all scored again, changed or not."""
    reread: frozenset[str]
    """Files of either state whose rejected rows are found anew."""
    changes: Changes
    """Of documents, between the two."""
    is_last: bool
    """Whether the tables are those of the whole corpus after the run; otherwise it is a step of a night."""


def ask(corpus_uri: str, checkpoint_uri: str, corpus: CorpusSpec, spec: ScoreSpec) -> Question:
    """List a corpus, and find out all that the checkpoint and the device decide.

    Raises:
        ConfigError: the corpus, the checkpoint or a parameter is wrong.
    """
    files = storage.list_files(corpus_uri, suffix=".parquet")
    checkpoint_uri = storage.absolute(checkpoints.resolve(checkpoint_uri))
    device = encoder.choose_device(spec.device)
    checkpoint = checkpoints.cache.get(checkpoint_uri, checkpoints.checkpoint_digest(checkpoint_uri))
    spec = scoring.resolve(checkpoint, spec)
    return Question(
        corpus_uri=corpus_uri,
        files=files,
        corpus=corpus,
        spec=spec,
        checkpoint_uri=checkpoint_uri,
        checkpoint_digest=checkpoint.digest,
        scoring_fingerprint=publishing.digest_of(
            format=SCORING_FORMAT,
            checkpoint_digest=checkpoint.digest,
            chunks=spec.chunks,
            pooling=spec.pooling,
            precision=spec.precision,
            threshold=spec.threshold,
        ),
        labels=checkpoint.head.labels,
        device=encoder.device_name(device),
    )


def is_current(asked: Question, shown: Shown, known: Sequence[SourceRef]) -> bool:
    """Whether the shown tables are those of this corpus under these rules."""
    policy = ScoreSpec.model_validate_json(shown.manifest.run["spec"]).removed
    return not asked.spec.full and policy == asked.spec.removed and _are_all_of(asked, known)


def check_evidence(asked: Question, shown: Shown | None, known: Sequence[SourceRef] | None) -> None:
    """Refuse other settings of evidence where documents keep what was said of them under the old ones.

    Raises:
        ConfigError: the table would hold both.
    """
    if shown is None or asked.spec.full or asked.spec.evidence == "none":
        return
    before = ScoreSpec.model_validate_json(shown.manifest.run["spec"])
    words = [
        f"{name} was {getattr(before, name)!r} and is {getattr(asked.spec, name)!r} now"
        for name in ("evidence", "num_evidence_chunks", "evidence_text")
        if getattr(before, name) != getattr(asked.spec, name)
    ]
    if words and any(source.scoring_fingerprint == asked.scoring_fingerprint for source in known or ()):
        raise ConfigError(
            f"{shown.run.output_uri}: {', '.join(words)}, but documents that did not change keep their evidence; "
            "score them again with --full, or ask for the same evidence as before"
        )


def _are_all_of(asked: Question, sources: Sequence[SourceRef]) -> bool:
    keys = [inventory.key_of(file, asked.corpus) for file in asked.files]
    return [source.inventory_key for source in sources] == keys and all(
        source.scoring_fingerprint == asked.scoring_fingerprint for source in sources
    )


def compare(
    asked: Question,
    shown: Shown | None,
    known: list[SourceRef] | None,
    inventories: Inventories,
) -> Comparison:
    """Compare a corpus with what is shown of it.

    Args:
        asked: the corpus, and by which rules it is to be scored.
        shown: what readers see; None where nothing was published.
        known: what that is of; None where nobody knows.
        inventories: of the output.

    Raises:
        ConfigError: files of the corpus are unreadable, or lack columns, or none has a row.
    """
    sources = _take(asked, known, inventories)
    before = None
    if shown is not None and known is not None and _has_inventories(known, sources, inventories):
        before = _state(known, _read_duplicates(shown.run), inventories, asked.corpus)
    budget = asked.spec.publish_every
    chosen = _affordable(sources, before, budget)
    now = _state(chosen, inventory.duplicate_rows(chosen, inventories), inventories, asked.corpus)
    touched = changes.touched(before, now)
    to_rescore, waiting = _stale(asked, before, now, touched, budget)
    if before is not None and waiting:
        left = [before.by_uri[source.source_uri] if source.source_uri in waiting else source for source in chosen]
        now = _state(left, now.duplicates, inventories, asked.corpus)
    unscored = score_tables.never_scored(shown, touched)
    found = changes.compare(before, now, to_rescore=to_rescore, never_scored=unscored)
    if before is not None and asked.spec.removed == "delete":
        found = found.with_removed(score_tables.marked(shown))
    return Comparison(
        before=before,
        now=now,
        to_rescore=to_rescore,
        reread=frozenset(touched | to_rescore),
        changes=found,
        is_last=not waiting and len(chosen) == len(sources),
    )


def _take(asked: Question, known: list[SourceRef] | None, inventories: Inventories) -> list[SourceRef]:
    """The corpus's files as the run will have scored them; those that are new or changed are read."""
    counts = {}
    if known is not None and not asked.spec.full:
        counts = {source.inventory_key: (source.num_rows, source.num_documents) for source in known}
    missing = [file for file in asked.files if inventory.key_of(file, asked.corpus) not in counts]
    counts |= inventory.take(missing, asked.corpus, inventories)
    sources = []
    for file in asked.files:
        key = inventory.key_of(file, asked.corpus)
        sources.append(
            SourceRef(
                source_uri=file.uri,
                version=file.version,
                num_bytes=file.num_bytes,
                num_rows=counts[key][0],
                num_documents=counts[key][1],
                inventory_key=key,
                scoring_fingerprint=asked.scoring_fingerprint,
            )
        )
    if sum(source.num_rows for source in sources) == 0:
        if asked.corpus.split_column is None:
            raise ConfigError(f"{asked.corpus_uri}: no rows in its {len(sources)} files")
        raise ConfigError(corpora.no_rows_of_split(asked.corpus_uri, asked.corpus))
    return sources


def _has_inventories(known: Sequence[SourceRef], sources: Sequence[SourceRef], inventories: Inventories) -> bool:
    """Whether the earlier state of files that went or changed can still be looked up."""
    keys = {source.inventory_key for source in sources}
    return all(inventories.exists(source.inventory_key) for source in known if source.inventory_key not in keys)


def _affordable(sources: list[SourceRef], before: CorpusState | None, budget: int | None) -> list[SourceRef]:
    """The files that the run takes in. New ones may wait for the next run, unless documents may have moved to them."""
    known = {} if before is None else before.by_uri
    keys = {source.source_uri: source.inventory_key for source in sources}
    if budget is None or any(keys.get(uri) != source.inventory_key for uri, source in known.items()):
        return sources
    first = _first([source for source in sources if source.source_uri not in known], budget)
    return [source for source in sources if source.source_uri in known or source.source_uri in first]


def _stale(
    asked: Question, before: CorpusState | None, now: CorpusState, touched: set[str], budget: int | None
) -> tuple[frozenset[str], frozenset[str]]:
    """Files all of whose documents are scored by this run, and by a later one."""
    if before is None or asked.spec.full:
        return frozenset(now.by_uri), frozenset()
    stale = {uri for uri, source in before.by_uri.items() if source.scoring_fingerprint != asked.scoring_fingerprint}
    if not stale:
        return frozenset(), frozenset()
    rest = [source for source in now.sources if source.source_uri in stale - touched]
    first = {source.source_uri for source in rest} if budget is None else _first(rest, budget)
    mixed = touched & now.by_uri.keys()  # documents that did not change may have come from a stale file
    return frozenset(mixed | first), frozenset(source.source_uri for source in rest) - first


def _first(sources: Sequence[SourceRef], num_documents: int) -> set[str]:
    """As many files, at least one, as hold so many documents."""
    first: set[str] = set()
    for source in sources:
        if num_documents <= 0:
            break
        first.add(source.source_uri)
        num_documents -= source.num_documents
    return first


def _state(
    sources: Iterable[SourceRef], duplicates: pl.DataFrame, inventories: Inventories, corpus: CorpusSpec
) -> CorpusState:
    return CorpusState(sources=tuple(sources), duplicates=duplicates, inventories=inventories, spec=corpus)


def _sources(run: RunRef) -> list[SourceRef]:
    return [SourceRef(**row) for row in storage.read_parquet(run.sources_uri).to_pylist()]


def read_sources(shown: Shown) -> list[SourceRef] | None:
    """What the shown tables are of; None where that is not known any more, so that everything is scored again."""
    return _sources(shown.run) if storage.exists(shown.run.sources_uri) else None


def _read_duplicates(run: RunRef) -> pl.DataFrame:
    return pl.DataFrame(storage.read_parquet(run.duplicates_uri))
