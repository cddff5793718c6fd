"""Planning: everything that can be wrong is found here, before any shard is read; then a run has a name.

Order: the corpus first (cheap), then the checkpoint or encoder, then whether the output can be written.
"""

from collections.abc import Sequence

from belt_tasks import checkpoint as checkpoints
from belt_tasks import corpus as corpora
from belt_tasks import encoder, progress, score_tables, scoring, storage, training_set
from belt_tasks.corpus import LabelRole, ShardRef
from belt_tasks.errors import ConfigError
from belt_tasks.publishing import RunRef, read_manifest, run_id_of
from belt_tasks.specs import ChunkSpec, CorpusSpec, Head, ScoreSpec, Spec, TaskKind, TrainSpec
from belt_tasks.tokens import load_tokenizer


class ScorePlan(Spec):
    """A scoring run, ready to start."""

    run: RunRef
    shards: tuple[ShardRef, ...]
    spec: ScoreSpec
    """With the checkpoint's chunks and pooling where the caller named none."""
    checkpoint_uri: str
    checkpoint_digest: str
    scoring_fingerprint: str
    """Hash of everything that decides a document's scores, besides the document."""
    labels: tuple[str, ...]
    device: str
    """Its name."""
    duplicates_uri: str | None
    base_version: int | None
    """The version of the predictions table that the run is planned on; None where there is no table."""

    def run_row(self, corpus_uri: str) -> dict[str, str | None]:
        """What the run's row of the `runs` table says of this plan."""
        return {
            "flow": "score",
            "corpus_uri": corpus_uri,
            "checkpoint_uri": self.checkpoint_uri,
            "checkpoint_digest": self.checkpoint_digest,
            "scoring_fingerprint": self.scoring_fingerprint,
            "device": self.device,
            "precision": self.spec.precision,
            "spec": self.spec.model_dump_json(),
        }


class ChunkPlan(Spec):
    """A chunking run, ready to start."""

    run: RunRef
    shards: tuple[ShardRef, ...]
    encoder: str
    duplicates_uri: str | None


class TrainPlan(Spec):
    """A fine-tuning run, ready to start."""

    run: RunRef
    shards: tuple[ShardRef, ...]
    encoder: str
    task: TaskKind | None
    """None where the number of classes will decide between binary and multiclass."""
    label_role: LabelRole
    device: str
    """Its name."""
    duplicates_uri: str | None


class EvaluationPlan(Spec):
    """The labelled side of an evaluation; the other is a scoring run."""

    shards: tuple[ShardRef, ...]
    head: Head


def plan_scoring(
    corpus_uri: str, checkpoint_uri: str, output_uri: str, corpus: CorpusSpec, spec: ScoreSpec
) -> ScorePlan:
    """Plan the scoring of a corpus.

    Raises:
        ConfigError: the corpus, the checkpoint, the output or a parameter is wrong.
    """
    shards = corpora.plan_shards(corpus_uri, corpus)
    checkpoint_uri = storage.absolute(checkpoints.resolve(checkpoint_uri))
    device = encoder.choose_device(spec.device)
    checkpoint = checkpoints.cache.get(checkpoint_uri, checkpoints.checkpoint_digest(checkpoint_uri))
    spec = scoring.resolve(checkpoint, spec)
    deciding = {
        "checkpoint_digest": checkpoint.digest,
        "chunks": spec.chunks,
        "pooling": spec.pooling,
        "precision": spec.precision,
    }
    fingerprint = run_id_of([], CorpusSpec(), threshold=spec.threshold, **deciding)
    run = _run(output_uri, run_id_of(shards, corpus, flow="score", scoring_fingerprint=fingerprint), flow="score")
    return ScorePlan(
        run=run,
        shards=tuple(shards),
        spec=spec,
        checkpoint_uri=checkpoint_uri,
        checkpoint_digest=checkpoint.digest,
        scoring_fingerprint=fingerprint,
        labels=checkpoint.head.labels,
        device=encoder.device_name(device),
        duplicates_uri=_write_duplicates(run, shards, corpus),
        base_version=score_tables.shown_version(run.output_uri),
    )


def plan_chunking(
    corpus_uri: str, encoder_source: str, output_uri: str, corpus: CorpusSpec, chunks: ChunkSpec
) -> ChunkPlan:
    """Plan the writing of a chunk table.

    Raises:
        ConfigError: the corpus, the tokenizer or the output is wrong, or the encoder cannot read such chunks.
    """
    shards = corpora.plan_shards(corpus_uri, corpus)
    encoder_source = _absolute_source(encoder_source)
    encoder.check_chunk_size(
        chunks,
        load_tokenizer(encoder_source).special,
        encoder.num_positions_of_source(encoder_source),
        source=encoder_source,
    )
    digest = encoder.source_fingerprint(encoder_source)
    run = _run(output_uri, run_id_of(shards, corpus, flow="chunk", chunks=chunks, encoder=digest), flow="chunk")
    return ChunkPlan(
        run=run,
        shards=tuple(shards),
        encoder=encoder_source,
        duplicates_uri=_write_duplicates(run, shards, corpus),
    )


def plan_fine_tuning(
    corpus_uri: str, encoder_source: str, output_uri: str, corpus: CorpusSpec, spec: TrainSpec
) -> TrainPlan:
    """Plan a fine-tuning.

    Raises:
        ConfigError: the corpus, the encoder, the output or a parameter is wrong.
    """
    task = training_set.infer_task(corpora.label_column_type(corpus_uri, corpus), spec.task)
    label_role: LabelRole = training_set.LABEL_ROLES[task] if task else "label"
    shards = corpora.plan_shards(corpus_uri, corpus, label_role=label_role)
    device = encoder.choose_device(spec.device)
    encoder_source = _absolute_source(encoder_source)
    encoder.check_chunk_size(
        spec.chunks,
        load_tokenizer(encoder_source).special,
        encoder.num_positions_of_source(encoder_source),
        source=encoder_source,
    )
    digest = encoder.source_fingerprint(encoder_source)
    run = _run(output_uri, run_id_of(shards, corpus, flow="fine-tune", spec=spec, encoder=digest), flow="fine-tune")
    return TrainPlan(
        run=run,
        shards=tuple(shards),
        encoder=encoder_source,
        task=task,
        label_role=label_role,
        device=encoder.device_name(device),
        duplicates_uri=_write_duplicates(run, shards, corpus),
    )


def plan_evaluation(corpus_uri: str, checkpoint_uri: str, corpus: CorpusSpec) -> EvaluationPlan:
    """Check that a corpus has labels that a checkpoint's scores can be compared with.

    Raises:
        ConfigError: the corpus, its label column or the checkpoint is wrong.
    """
    head = checkpoints.read_head(checkpoints.resolve(checkpoint_uri))
    label_role = training_set.LABEL_ROLES[head.task]
    return EvaluationPlan(shards=tuple(corpora.plan_shards(corpus_uri, corpus, label_role=label_role)), head=head)


def _run(output_uri: str, run_id: str, *, flow: str) -> RunRef:
    output_uri = storage.absolute(output_uri)
    storage.check_writable(output_uri)
    if storage.exists(storage.join(output_uri, "published.json")):
        published = read_manifest(output_uri).run["flow"]
        if published != flow:
            raise ConfigError(
                f"{output_uri}: holds what a {published} run published, which a {flow} run would hide; "
                "choose another output"
            )
    progress.go_on()  # an earlier run of this process may have been stopped
    return RunRef(output_uri=output_uri, run_id=run_id)


def _absolute_source(source: str) -> str:
    """A local directory by its full path; anything else is a name on the hub."""
    return storage.absolute(source) if storage.is_directory(source) else source


def _write_duplicates(run: RunRef, shards: Sequence[ShardRef], corpus: CorpusSpec) -> str | None:
    if storage.exists(run.manifest_uri):  # the run is complete; its corpus is the same
        return run.existing_duplicates_uri()
    duplicates = corpora.duplicate_rows(list(shards), corpus)
    if duplicates.num_rows > 0:
        storage.write_parquet(run.duplicates_uri, duplicates)
    return run.existing_duplicates_uri()
