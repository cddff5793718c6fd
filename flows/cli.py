"""The command line: `belt`. Each command builds specs from options and calls the same flow that a deployment runs.

Exit codes: 0 done, 1 failed, 2 wrong usage, 128 + the number of the signal that ended it. A user's mistake never shows
a traceback.
"""

import functools
import os
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from belt_tasks import launcher, specs
from belt_tasks.errors import ConfigError
from flows import cli_models, cli_runs, launch
from flows.local_server import local_server
from flows.observation import LOG_FORMAT, observe_command
from flows.options import (
    Address,
    Checkpoint,
    ChunkConfig,
    ChunkSeed,
    ChunkSize,
    Confidence,
    Config,
    Corpus,
    Device,
    DropContainedTail,
    Encoder,
    EvaluateConfig,
    Evidence,
    EvidenceText,
    Export,
    Full,
    GateConfig,
    GateMetric,
    HeadCheckpoint,
    HeadTailCheckpoint,
    IdColumn,
    LabelColumn,
    LengthConfidence,
    LengthNumResamples,
    LengthResamplingSeed,
    MaxBatchTokens,
    MaxEce,
    MaxEceIncrease,
    MaximalTextLength,
    MaxRecallDrop,
    MaxRejectedShare,
    MaxSlowdown,
    MinBucketDocuments,
    MinDocuments,
    MinGain,
    MinimalChunkLength,
    MinRecall,
    NumCpus,
    NumEvidenceChunks,
    NumGpus,
    NumRandomChunks,
    NumResamples,
    NumWorkers,
    Output,
    OwnChunkSeed,
    OwnChunkSize,
    OwnDropContainedTail,
    OwnMaximalTextLength,
    OwnMinimalChunkLength,
    OwnNumRandomChunks,
    OwnPoolingSpace,
    OwnPoolingStrategy,
    OwnSelection,
    OwnStride,
    PoolingSpace,
    PoolingStrategy,
    PublishEvery,
    Registry,
    Removed,
    ResamplingSeed,
    Runner,
    ScoreConfig,
    ScorePrecision,
    Selection,
    Split,
    SplitColumn,
    StartTimeoutS,
    StorageBlock,
    Stride,
    TextColumn,
    Threshold,
    WantsLengthReport,
    WeightColumn,
    Who,
    WrongUsageError,
    build,
    check_whole,
    option,
    read_config,
)
from flows.terminal import complain, console, running, show, user_errors

app = typer.Typer(
    help="Fine-tune and score text encoders on documents longer than the encoder can read.",
    no_args_is_help=True,
    rich_markup_mode=None,  # its tables cut long names at 80 columns
    pretty_exceptions_enable=False,
    add_completion=False,
)
SCORE_SECTIONS = ("corpus", "spec", "drift", "ray")
EVALUATE_SECTIONS = ("corpus", "spec", "drift", "length")
app.add_typer(
    cli_runs.app, name="runs", help="List the runs of an output (`belt runs OUTPUT`), or clean up after them."
)
app.add_typer(cli_models.app, name="models", help="List a registry of models (`belt models REGISTRY`), or go back.")


@app.callback()
def _main(
    context: typer.Context,
    *,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Prefect's log and, of bugs, the traceback.")] = False,
    log_format: Annotated[
        str | None,
        typer.Option(
            help="text, or json: belt's log as a JSON object a line on standard error, in the place of progress bars.",
            metavar="<str>",
            envvar=LOG_FORMAT,
        ),
    ] = None,
) -> None:
    """Fine-tune and score text encoders on documents longer than the encoder can read."""
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "INFO" if verbose else "CRITICAL")
    os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "INFO" if verbose else "CRITICAL")
    if "PREFECT_HOME" in os.environ:  # Prefect makes the last folder of the path only, and fails obscurely without
        Path(os.environ["PREFECT_HOME"]).expanduser().mkdir(parents=True, exist_ok=True)
    if context.invoked_subcommand != "doctor":  # which says what is wrong with it
        with user_errors():
            observe_command(log_format, verbose=verbose)


@app.command()
def score(
    corpus: Corpus,
    checkpoint: Checkpoint,
    output: Output,
    config: ScoreConfig = None,
    id_column: IdColumn = None,
    text_column: TextColumn = None,
    split_column: SplitColumn = None,
    split: Split = None,
    chunk_size: OwnChunkSize = None,
    stride: OwnStride = None,
    minimal_chunk_length: OwnMinimalChunkLength = None,
    maximal_text_length: OwnMaximalTextLength = None,
    drop_contained_tail: OwnDropContainedTail = None,
    selection: OwnSelection = None,
    num_random_chunks: OwnNumRandomChunks = None,
    seed: OwnChunkSeed = None,
    pooling_strategy: OwnPoolingStrategy = None,
    pooling_space: OwnPoolingSpace = None,
    max_batch_tokens: MaxBatchTokens = None,
    device: Device = None,
    precision: ScorePrecision = None,
    threshold: Threshold = None,
    max_rejected_share: MaxRejectedShare = None,
    evidence: Evidence = None,
    num_evidence_chunks: NumEvidenceChunks = None,
    evidence_text: EvidenceText = None,
    export: Export = None,
    full: Full = None,
    removed: Removed = None,
    publish_every: PublishEvery = None,
    storage_block: StorageBlock = None,
    runner: Runner = "threads",
    address: Address = None,
    num_workers: NumWorkers = None,
    num_cpus: NumCpus = None,
    num_gpus: NumGpus = None,
    start_timeout_s: StartTimeoutS = None,
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be scored, and how long it would take.")
    ] = False,
) -> None:
    """Score what is new or changed in CORPUS and publish it. Windows and pooling default to the checkpoint's."""
    options, asked_at = dict(locals()), datetime.now(UTC)
    with user_errors():
        ray = _ray_spec(options)
        columns, spec, drift, checkpoint = _score_specs(options, sections=SCORE_SECTIONS)
        if dry_run:
            with running():
                from flows.preview import preview  # noqa: PLC0415 - after the environment is set

                found = preview(corpus, checkpoint, output, columns, spec, storage_block)
                from belt_tasks import summaries  # noqa: PLC0415 - imports torch

            show(summaries.preview_summary(found))
            return
        with running():
            from flows.score import score as flow  # noqa: PLC0415 - after the environment is set

            manifest = flow(
                corpus, checkpoint, output, columns, spec, storage_block, drift=drift, runner=runner, ray=ray
            )
            from belt_tasks import run_list, summaries  # noqa: PLC0415 - imports torch
            from belt_tasks.publishing import RunRef  # noqa: PLC0415 - imports torch
            from belt_tasks.report import read_report  # noqa: PLC0415 - imports torch

            steps = run_list.earlier_steps(manifest)
            report = read_report(RunRef(output_uri=manifest.run["output_uri"], run_id=manifest.run["run_id"]))

    show(summaries.run_summary(manifest, asked_at=asked_at, earlier_steps=steps, report=report))


@app.command()
def evaluate(
    corpus: Corpus,
    checkpoint: Checkpoint,
    output: Output,
    config: EvaluateConfig = None,
    id_column: IdColumn = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    split_column: SplitColumn = None,
    split: Split = None,
    chunk_size: OwnChunkSize = None,
    stride: OwnStride = None,
    minimal_chunk_length: OwnMinimalChunkLength = None,
    maximal_text_length: OwnMaximalTextLength = None,
    drop_contained_tail: OwnDropContainedTail = None,
    selection: OwnSelection = None,
    num_random_chunks: OwnNumRandomChunks = None,
    seed: OwnChunkSeed = None,
    pooling_strategy: OwnPoolingStrategy = None,
    pooling_space: OwnPoolingSpace = None,
    max_batch_tokens: MaxBatchTokens = None,
    device: Device = None,
    precision: ScorePrecision = None,
    threshold: Threshold = None,
    max_rejected_share: MaxRejectedShare = None,
    evidence: Evidence = None,
    num_evidence_chunks: NumEvidenceChunks = None,
    evidence_text: EvidenceText = None,
    export: Export = None,
    full: Full = None,
    removed: Removed = None,
    publish_every: PublishEvery = None,
    head_checkpoint: HeadCheckpoint = None,
    head_tail_checkpoint: HeadTailCheckpoint = None,
    confidence: LengthConfidence = None,
    num_resamples: LengthNumResamples = None,
    resampling_seed: LengthResamplingSeed = None,
    min_bucket_documents: MinBucketDocuments = None,
    storage_block: StorageBlock = None,
    *,
    length_report: WantsLengthReport = False,
) -> None:
    """Score a labelled CORPUS and measure how good the predictions are, with plots."""
    options, asked_at = dict(locals()), datetime.now(UTC)
    with user_errors():
        length = _length_spec(options)
        columns, spec, drift, checkpoint = _score_specs(options, sections=EVALUATE_SECTIONS)
        with running():
            from flows.evaluate import evaluate as flow  # noqa: PLC0415 - after the environment is set

            manifest, receipt = flow(
                corpus,
                checkpoint,
                output,
                columns,
                spec,
                storage_block,
                drift=drift,
                length=length,
                head_checkpoint_uri=head_checkpoint,
                head_tail_checkpoint_uri=head_tail_checkpoint,
            )
            from belt_tasks import model_summaries, summaries  # noqa: PLC0415 - imports torch

    show(summaries.run_summary(manifest, asked_at=asked_at), model_summaries.evaluation_summary(receipt))


@app.command()
def fine_tune(
    corpus: Corpus,
    encoder: Encoder,
    output: Output,
    config: Config = None,
    id_column: IdColumn = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    weight_column: WeightColumn = None,
    split_column: SplitColumn = None,
    split: Split = None,
    task: Annotated[str | None, option(specs.TrainSpec, "task")] = None,
    chunk_size: ChunkSize = None,
    stride: Stride = None,
    minimal_chunk_length: MinimalChunkLength = None,
    maximal_text_length: MaximalTextLength = None,
    drop_contained_tail: DropContainedTail = None,
    selection: Selection = None,
    num_random_chunks: NumRandomChunks = None,
    pooling_strategy: PoolingStrategy = None,
    pooling_space: PoolingSpace = None,
    max_batch_tokens: MaxBatchTokens = None,
    device: Device = None,
    num_devices: Annotated[str | None, option(specs.TrainSpec, "num_devices")] = None,
    epochs: Annotated[str | None, option(specs.TrainSpec, "epochs")] = None,
    learning_rate: Annotated[str | None, option(specs.TrainSpec, "learning_rate")] = None,
    weight_decay: Annotated[str | None, option(specs.TrainSpec, "weight_decay")] = None,
    schedule: Annotated[str | None, option(specs.TrainSpec, "schedule")] = None,
    warmup_fraction: Annotated[str | None, option(specs.TrainSpec, "warmup_fraction")] = None,
    documents_per_batch: Annotated[str | None, option(specs.TrainSpec, "documents_per_batch")] = None,
    accumulation_steps: Annotated[str | None, option(specs.TrainSpec, "accumulation_steps")] = None,
    max_grad_norm: Annotated[str | None, option(specs.TrainSpec, "max_grad_norm")] = None,
    dropout: Annotated[str | None, option(specs.TrainSpec, "dropout")] = None,
    precision: Annotated[str | None, option(specs.TrainSpec, "precision")] = None,
    label_weights: Annotated[str | None, option(specs.TrainSpec, "label_weights")] = None,
    redraw_chunks: Annotated[bool | None, option(specs.TrainSpec, "redraw_chunks")] = None,
    validation_fraction: Annotated[str | None, option(specs.TrainSpec, "validation_fraction")] = None,
    validation_split: Annotated[str | None, option(specs.TrainSpec, "validation_split")] = None,
    metric_for_best_model: Annotated[str | None, option(specs.TrainSpec, "metric_for_best_model")] = None,
    early_stopping_patience: Annotated[str | None, option(specs.TrainSpec, "early_stopping_patience")] = None,
    save_every_s: Annotated[str | None, option(specs.TrainSpec, "save_every_s")] = None,
    calibration: Annotated[str | None, option(specs.TrainSpec, "calibration")] = None,
    seed: Annotated[str | None, option(specs.TrainSpec, "seed")] = None,
    storage_block: StorageBlock = None,
) -> None:
    """Fine-tune an encoder on a labelled CORPUS; the gradient flows through the pooling, in fixed memory."""
    options, asked_at = dict(locals()), datetime.now(UTC)
    with user_errors():
        sections = read_config(config, sections=("corpus", "spec"))
        columns = build(specs.CorpusSpec, options, sections, section="corpus")
        spec = build(specs.TrainSpec, options, sections, section="spec")
        if launcher.is_follower():
            launch.follow(spec, storage_block)
            return
        with running():
            from flows.fine_tune import fine_tune as flow  # noqa: PLC0415 - after the environment is set

            manifest, receipt = flow(corpus, encoder, output, columns, spec, storage_block)
            from belt_tasks import model_summaries, summaries  # noqa: PLC0415 - imports torch

    show(summaries.run_summary(manifest, asked_at=asked_at), model_summaries.fine_tuning_summary(receipt))


@app.command()
def chunk(
    corpus: Corpus,
    encoder: Encoder,
    output: Output,
    config: ChunkConfig = None,
    id_column: IdColumn = None,
    text_column: TextColumn = None,
    split_column: SplitColumn = None,
    split: Split = None,
    chunk_size: ChunkSize = None,
    stride: Stride = None,
    minimal_chunk_length: MinimalChunkLength = None,
    maximal_text_length: MaximalTextLength = None,
    drop_contained_tail: DropContainedTail = None,
    selection: Selection = None,
    num_random_chunks: NumRandomChunks = None,
    seed: ChunkSeed = None,
    storage_block: StorageBlock = None,
) -> None:
    """Write the chunk table of CORPUS: one row of token ids per window, as Parquet."""
    options, asked_at = dict(locals()), datetime.now(UTC)
    with user_errors():
        sections = read_config(config, sections=("corpus", "chunks"))
        columns = build(specs.CorpusSpec, options, sections, section="corpus")
        chunks = build(specs.ChunkSpec, options, sections, section="chunks")
        with running():
            from flows.chunk import chunk as flow  # noqa: PLC0415 - after the environment is set

            manifest = flow(corpus, encoder, output, columns, chunks, storage_block)
            from belt_tasks import summaries  # noqa: PLC0415 - imports torch

    show(summaries.run_summary(manifest, asked_at=asked_at))


@app.command("import-belt-nlp")
def import_belt_nlp(
    folder: Annotated[str, typer.Argument(help="What `save` of a belt-nlp model wrote: model.bin, params.json, ...")],
    output: Annotated[str, typer.Option(help="Directory for the checkpoint; any fsspec URL.", metavar="<str>")],
    label: Annotated[
        list[str] | None, typer.Option(help="Name of a class, in order; once for each. Else 0, 1, ...", metavar="<str>")
    ] = None,
) -> None:
    """Make a checkpoint of a model that belt-nlp saved; nothing that is pickled in it runs."""
    with user_errors():
        from belt_tasks import import_belt_nlp as importing  # noqa: PLC0415 - imports torch
        from belt_tasks import model_summaries  # noqa: PLC0415 - imports torch

        show(model_summaries.import_summary(importing.import_belt_nlp(folder, output, tuple(label or ()))))


@app.command()
def windows(
    file: Annotated[Path, typer.Argument(help="A text file, UTF-8.")],
    encoder: Annotated[
        str | None, typer.Option(help="Local directory or Hugging Face name; without it the demo's all-MiniLM-L6-v2.")
    ] = None,
    chunk_size: ChunkSize = None,
    stride: Stride = None,
    minimal_chunk_length: MinimalChunkLength = None,
    maximal_text_length: MaximalTextLength = None,
    drop_contained_tail: DropContainedTail = None,
    selection: Selection = None,
    num_random_chunks: NumRandomChunks = None,
    seed: ChunkSeed = None,
) -> None:
    """Show how a text is cut: tokens, characters and first words of every chunk. For learning the parameters."""
    options = dict(locals())
    with user_errors():
        spec = build(specs.ChunkSpec, options, {}, section="chunks")
        from belt_tasks.window_table import window_table  # noqa: PLC0415 - imports transformers

        table, totals = window_table(file, encoder, spec)
    console.print(table)
    console.print(totals)


@app.command()
def report(
    output: Annotated[str, typer.Argument(help="Output of `belt score`; any fsspec URL.")],
    run: Annotated[
        str | None, typer.Option(help="The run to report; without it the one that is shown.", metavar="<str>")
    ] = None,
) -> None:
    """Write the report of a run of OUTPUT again, and say where it is: statistics, drift, data quality, cost."""
    with user_errors():
        from belt_tasks import report as reports  # noqa: PLC0415 - imports torch
        from belt_tasks import summaries  # noqa: PLC0415 - imports torch

        show(summaries.report_summary(reports.report_again(output, run)))


@app.command()
def rollback(
    output: Annotated[str, typer.Argument(help="Output of `belt score`; any fsspec URL.")],
    run: Annotated[
        str | None, typer.Option(help="The run to show again; without it the one shown before.", metavar="<str>")
    ] = None,
) -> None:
    """Show an earlier run's predictions again, by one commit; nothing is lost, and the next run publishes as ever."""
    with user_errors():
        from belt_tasks import run_list  # noqa: PLC0415 - imports torch

        done = run_list.roll_back(output, run)
        show(f"Readers see run {done.run_id} again instead of {done.from_run_id} (version {done.version}).")


@app.command()
def deploy() -> None:
    """Make or update belt's deployments, work pools and automations on the Prefect server at PREFECT_API_URL."""
    with user_errors():
        if "PREFECT_API_URL" not in os.environ:
            raise WrongUsageError(
                "PREFECT_API_URL must be the address of a Prefect server, such as http://host:4200/api"
            )
        with local_server():
            from flows.deploy import deploy as make  # noqa: PLC0415 - after the environment is set
            from flows.deploy import read_settings  # noqa: PLC0415 - after the environment is set

            try:
                settings = read_settings()
            except ConfigError as error:
                raise WrongUsageError(str(error)) from error
            done = make(settings)
    show(f"Deployed {', '.join(done)} to {os.environ['PREFECT_API_URL']}.")


@app.command()
def promote(
    corpus: Corpus,
    challenger: Annotated[str, typer.Option(help="What `--checkpoint` of `belt score` may be.")],
    registry: Registry,
    output: Output,
    config: GateConfig = None,
    id_column: IdColumn = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    split_column: SplitColumn = None,
    split: Split = None,
    max_batch_tokens: MaxBatchTokens = None,
    device: Device = None,
    precision: ScorePrecision = None,
    threshold: Threshold = None,
    max_rejected_share: MaxRejectedShare = None,
    metric: GateMetric = None,
    min_gain: MinGain = None,
    confidence: Confidence = None,
    num_resamples: NumResamples = None,
    resampling_seed: ResamplingSeed = None,
    min_documents: MinDocuments = None,
    min_recall: MinRecall = None,
    max_recall_drop: MaxRecallDrop = None,
    max_ece: MaxEce = None,
    max_ece_increase: MaxEceIncrease = None,
    max_slowdown: MaxSlowdown = None,
    who: Who = None,
    storage_block: StorageBlock = None,
) -> None:
    """Measure a challenger against the champion of a registry on a labelled CORPUS; a better one takes its place."""
    options = dict(locals())
    with user_errors():
        sections = read_config(config, sections=("corpus", "spec", "gate"))
        columns = build(specs.CorpusSpec, options, sections, section="corpus")
        check_whole(sections, "spec", chunks=specs.ChunkSpec, pooling=specs.PoolingSpec)
        spec = build(specs.ScoreSpec, options, sections, section="spec")
        gate = build(specs.GateSpec, options, sections, section="gate")
        with running():
            from flows.promote import promote as flow  # noqa: PLC0415 - after the environment is set

            done = flow(
                challenger,
                registry,
                corpus,
                output,
                columns,
                spec,
                gate,
                who=cli_models.name_of(who),
                storage_block=storage_block,
            )
            from belt_tasks import model_summaries  # noqa: PLC0415 - imports torch

    show(model_summaries.promotion_summary(done))


@app.command()
def demo(
    output: Annotated[str, typer.Option(help="Directory for the corpus and all results.")] = ".belt/demo",
) -> None:
    """Run everything on real text that every machine has: the docstrings of the installed libraries."""
    with user_errors(), running():
        from flows.demo import demo as flow  # noqa: PLC0415 - after the environment is set

        result = flow(output)
        from belt_tasks import summaries  # noqa: PLC0415 - imports torch

    show(summaries.demo_summary(**dict(result)))


@app.command()
def doctor(
    corpus: Annotated[str | None, typer.Option(help="A corpus to read; any fsspec URL.", metavar="<str>")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="A checkpoint to load.", metavar="<str>")] = None,
    output: Annotated[
        str | None, typer.Option(help="An output to read, write, list and delete in.", metavar="<str>")
    ] = None,
    storage_block: StorageBlock = None,
    *,
    json: Annotated[bool, typer.Option("--json", help="Say it as one JSON document, for machines.")] = False,
) -> None:
    """Say whether this machine, its Prefect server and the places that are named are fit for belt, and what to do."""
    with user_errors():
        from belt_tasks import doctor as examining  # noqa: PLC0415 - imports pyarrow

        def of_prefect() -> list[examining.Check]:
            from flows.doctor import prefect_checks  # noqa: PLC0415 - after the environment is set

            return prefect_checks(storage_block)

        places = functools.partial(examining.place_checks, corpus, checkpoint, output)
        found = examining.examine("this machine", examining.machine_checks)
        found += examining.examine("Prefect", of_prefect)  # before the places: a storage block is put to use
        found += examining.examine("places", places)
    if json:
        typer.echo(examining.as_json(found))
    else:
        console.print(examining.as_text(found), markup=False, highlight=False)
    raise typer.Exit(int(examining.has_problem(found)))


def main() -> None:
    """Entry point of the `belt` command."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # leave in order: no temporary file stays
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        app()
    except Exception as error:
        if "--verbose" in sys.argv:
            raise
        words = " ".join(f"{type(error).__name__}: {error}".split())
        complain(f"unexpected {words} (run `belt --verbose ...` for the traceback)")
        sys.exit(1)


def _score_specs(
    options: dict[str, Any], *, sections: tuple[str, ...]
) -> tuple[specs.CorpusSpec, specs.ScoreSpec, specs.DriftSpec, str]:
    """Specs for scoring, and the checkpoint; window or pooling options change its own, not the built-in defaults."""
    config = read_config(options["config"], sections=sections)
    columns = build(specs.CorpusSpec, options, config, section="corpus")
    drift = build(specs.DriftSpec, {}, config, section="drift")
    if options["storage_block"] is not None:
        with local_server():
            from flows.storage_block import use_storage_block  # noqa: PLC0415 - after the environment is set

            use_storage_block(options["storage_block"])
    from belt_tasks import checkpoint  # noqa: PLC0415 - imports torch

    checkpoint_uri = checkpoint.resolve(options["checkpoint"])
    card = checkpoint.read_card(checkpoint_uri)
    base = {} if card is None else {"chunks": card.chunks.model_dump(), "pooling": card.pooling.model_dump()}
    spec = build(specs.ScoreSpec, options, config, section="spec", base=base)
    return columns, spec, drift, checkpoint_uri


def _ray_spec(options: dict[str, Any]) -> specs.RaySpec:
    """The cluster; what says something of it goes with the runner that has one."""
    config = read_config(options["config"], sections=SCORE_SECTIONS)
    given = [name for name in specs.RaySpec.model_fields if options[name] is not None]
    if given and options["runner"] != "ray":
        raise WrongUsageError(
            f"--{given[0].replace('_', '-')} goes with --runner ray, got --runner {options['runner']}"
        )
    return build(specs.RaySpec, options, config, section="ray")


def _length_spec(options: dict[str, Any]) -> specs.LengthSpec | None:
    """How ways of reading are compared, None if not at all; what says something of it goes with the wish for it."""
    config = read_config(options["config"], sections=EVALUATE_SECTIONS)
    names = ("head_checkpoint", "head_tail_checkpoint", *specs.LengthSpec.model_fields)
    given = [name for name in names if options[name] is not None]
    if not options["length_report"]:
        if given:
            raise WrongUsageError(f"--{given[0].replace('_', '-')} goes with --length-report, which was not given")
        return None
    return build(specs.LengthSpec, options, config, section="length")


if __name__ == "__main__":
    main()
