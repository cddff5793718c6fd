"""Planning: everything that can be wrong is found here, before any shard is read; then a run has a name.

Order: the corpus first (cheap), then the checkpoint or encoder, then whether the output can be written.
"""

from collections.abc import Sequence

from belt_tasks import checkpoint as checkpoints
from belt_tasks import corpus as corpora
from belt_tasks import data_parallel, encoder, milestones, progress, storage, training_set
from belt_tasks.corpus import LabelRole, ShardRef
from belt_tasks.errors import ConfigError
from belt_tasks.publishing import RunRef, read_manifest, run_id_of
from belt_tasks.receipts import ShardReceipt
from belt_tasks.specs import ChunkSpec, CorpusSpec, Head, Spec, TaskKind, TrainSpec
from belt_tasks.tokens import load_tokenizer


class ChunkPlan(Spec):
    """A chunking run, ready to start."""

    run: RunRef
    shards: tuple[ShardRef, ...]
    encoder: str
    duplicates_uri: str | None


class PreparePlan(Spec):
    """Labelled documents to tokenize, once for all runs that train on them."""

    run: RunRef
    """Where the tokens are kept; its name says of what content, tokenizer and columns they are."""
    shards: tuple[ShardRef, ...]
    corpus: CorpusSpec
    encoder: str
    label_role: LabelRole
    duplicates_uri: str | None
    vocabulary: tuple[str, ...] | None = None
    """Allowed class names; None allows all."""


class TrainPlan(Spec):
    """A fine-tuning run, ready to start."""

    run: RunRef
    prepare: PreparePlan
    """The documents to train on."""
    encoder: str
    task: TaskKind | None
    """None where the number of classes will decide between binary and multiclass."""
    device: str
    """Its name."""


class EvaluationPlan(Spec):
    """The labelled side of an evaluation; the other is a scoring run."""

    shards: tuple[ShardRef, ...]
    head: Head
    checkpoint_uri: str
    """The directory itself, to score with."""


def plan_chunking(
    corpus_uri: str, encoder_source: str, output_uri: str, corpus: CorpusSpec, chunks: ChunkSpec
) -> ChunkPlan:
    """Plan the writing of a chunk table.

    Raises:
        ConfigError: the corpus, the tokenizer or the output is wrong, or the encoder cannot read such chunks.
    """
    check_apart(corpus_uri, output_uri)
    shards = corpora.plan_shards(corpus_uri, corpus)
    encoder_source = _absolute_source(encoder_source)
    encoder.check_chunk_size(
        chunks,
        load_tokenizer(encoder_source).special,
        encoder.num_positions_of_source(encoder_source),
        source=encoder_source,
    )
    digest = encoder.source_fingerprint(encoder_source)
    run_id = run_id_of(_keys(shards), corpus=corpus, flow="chunk", chunks=chunks, encoder=digest)
    run = open_run(output_uri, run_id, flow="chunk")
    milestones.planned(run_id, "chunk", num_shards=len(shards), num_rows=sum(shard.num_rows for shard in shards))
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
    check_apart(corpus_uri, output_uri)
    task = training_set.infer_task(corpora.label_column_type(corpus_uri, corpus), spec.task)
    training_set.check_task(task, spec)
    label_role: LabelRole = training_set.LABEL_ROLES[task] if task else "label"
    shards = corpora.plan_shards(corpus_uri, corpus, label_role=label_role)
    if spec.validation_split is not None:
        corpora.plan_shards(
            corpus_uri,
            _validation_corpus(corpus, spec),
            label_role=label_role,
            split_choice="--validation-split, or validation_split of spec",
        )
    device = encoder.choose_device(spec.device)
    data_parallel.check(spec)
    encoder_source = _absolute_source(encoder_source)
    tokenizer = load_tokenizer(encoder_source)
    encoder.check_chunk_size(
        spec.chunks, tokenizer.special, encoder.num_positions_of_source(encoder_source), source=encoder_source
    )
    digest = encoder.source_fingerprint(encoder_source)
    run_id = run_id_of(_keys(shards), corpus=corpus, flow="fine-tune", spec=spec, encoder=digest)
    run = open_run(output_uri, run_id, flow="fine-tune")
    return TrainPlan(
        run=run,
        prepare=_plan_prepare(run.output_uri, shards, corpus, encoder_source, label_role, vocabulary=None),
        encoder=encoder_source,
        task=task,
        device=encoder.device_name(device),
    )


def plan_validation(corpus_uri: str, plan: TrainPlan, receipts: Sequence[ShardReceipt], spec: TrainSpec) -> PreparePlan:
    """Plan how the documents of a validation split are tokenized; those that are trained on too are put aside.

    Args:
        corpus_uri: of the fine-tuning.
        plan: of it.
        receipts: of its training documents, from which the labels are learned: others are put aside.
        spec: names the split.

    Raises:
        ConfigError: the training documents' labels do not make a task.
    """
    training = plan.prepare
    uris = training_set.tokens_uris(plan.run.output_uri, receipts)
    vocabulary = training_set.learn_labels(uris, task=plan.task, label_role=training.label_role)
    corpus = _validation_corpus(training.corpus, spec)
    shards = corpora.plan_shards(corpus_uri, corpus, label_role=training.label_role)
    return _plan_prepare(
        plan.run.output_uri,
        shards,
        corpus,
        plan.encoder,
        training.label_role,
        vocabulary=vocabulary,
        training=training,
    )


def _plan_prepare(
    output_uri: str,
    shards: Sequence[ShardRef],
    corpus: CorpusSpec,
    encoder_source: str,
    label_role: LabelRole,
    *,
    vocabulary: tuple[str, ...] | None,
    training: PreparePlan | None = None,
) -> PreparePlan:
    run_id = run_id_of(
        _keys(shards),
        flow="prepare",
        corpus=corpus,
        tokenizer=load_tokenizer(encoder_source).fingerprint,
        label_role=label_role,
        vocabulary=vocabulary,
        training=None if training is None else training.run.run_id,
    )
    run = RunRef(output_uri=output_uri, run_id=run_id)
    earlier = [] if training is None else [(shard, training.corpus) for shard in training.shards]
    milestones.planned(run_id, "prepare", num_shards=len(shards), num_rows=sum(shard.num_rows for shard in shards))
    return PreparePlan(
        run=run,
        shards=tuple(shards),
        corpus=corpus,
        encoder=encoder_source,
        label_role=label_role,
        duplicates_uri=_write_duplicates(run, shards, corpus, earlier),
        vocabulary=vocabulary,
    )


def _validation_corpus(corpus: CorpusSpec, spec: TrainSpec) -> CorpusSpec:
    """The same columns, of the rows held out.

    Raises:
        ConfigError: the corpus has no splits, or this is the one that is trained on.
    """
    if corpus.split_column is None:
        raise ConfigError(
            f"validation_split {spec.validation_split!r} needs a column that tells splits apart: name split_column "
            "and the split to train on"
        )
    if corpus.split == spec.validation_split:
        raise ConfigError(f"validation_split must be another split than the one to train on, {corpus.split!r}")
    return corpus.model_copy(update={"split": spec.validation_split})


def plan_evaluation(corpus_uri: str, checkpoint_uri: str, corpus: CorpusSpec) -> EvaluationPlan:
    """Check that a corpus has labels that a checkpoint's scores can be compared with.

    Raises:
        ConfigError: the corpus, its label column or the checkpoint is wrong.
    """
    checkpoint_uri = checkpoints.resolve(checkpoint_uri)
    head = checkpoints.read_head(checkpoint_uri)
    shards = corpora.plan_shards(corpus_uri, corpus, label_role=training_set.LABEL_ROLES[head.task])
    return EvaluationPlan(shards=tuple(shards), head=head, checkpoint_uri=checkpoint_uri)


def check_apart(corpus_uri: str, output_uri: str) -> None:
    """Refuse an output among the files of its corpus, which the next run would read.

    Raises:
        ConfigError: it is there, or one of the two is empty.
    """
    for name, uri in (("corpus_uri", corpus_uri), ("output_uri", output_uri)):
        if not uri.strip():
            raise ConfigError(f"{name}: must be a path or a URL, got {uri!r}")
    corpus, output = storage.absolute(corpus_uri).rstrip("/"), storage.absolute(output_uri).rstrip("/")
    if output == corpus or output.startswith(f"{corpus}/"):
        raise ConfigError(
            f"{output_uri}: the output must not lie in the corpus ({corpus_uri}), which is read with all its folders; "
            "choose another output"
        )


def open_run(output_uri: str, run_id: str, *, flow: str) -> RunRef:
    """A run at an output that can be written and holds nothing of another kind.

    Raises:
        ConfigError: it is not such an output.
    """
    output_uri = storage.absolute(output_uri)
    storage.check_writable(output_uri)
    if any(storage.exists(storage.join(output_uri, name)) for name in ("config.json", checkpoints.CARD_NAME)):
        raise ConfigError(f"{output_uri}: holds a model; choose another output")
    published = _published_flow(output_uri)
    if published not in (flow, None):
        raise ConfigError(
            f"{output_uri}: holds what a {published} run published, which a {flow} run would hide; "
            "choose another output"
        )
    progress.go_on()  # an earlier run of this process may have been stopped
    return RunRef(output_uri=output_uri, run_id=run_id)


def _published_flow(output_uri: str) -> str | None:
    if storage.exists(storage.join(output_uri, "published.json")):
        return str(read_manifest(output_uri).run["flow"])
    return "score" if storage.is_directory(storage.join(output_uri, "tables")) else None


def _absolute_source(source: str) -> str:
    """A local directory by its full path; anything else is a name on the hub."""
    return storage.absolute(source) if storage.is_directory(source) else source


def _keys(shards: Sequence[ShardRef]) -> list[str]:
    return [shard.key for shard in shards]


def _write_duplicates(
    run: RunRef,
    shards: Sequence[ShardRef],
    corpus: CorpusSpec,
    earlier: Sequence[tuple[ShardRef, CorpusSpec]] = (),
) -> str | None:
    done = [run.manifest_uri] if storage.exists(run.manifest_uri) else [run.receipt_uri(key) for key in _keys(shards)]
    if all(storage.exists(uri) for uri in done):  # the run is complete; its corpus is the same
        return run.existing_duplicates_uri()
    duplicates = corpora.duplicate_rows(shards, corpus, earlier=earlier)
    if duplicates.num_rows > 0:
        storage.write_parquet(run.duplicates_uri, duplicates)
    return run.existing_duplicates_uri()
