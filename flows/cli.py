"""The command line: `belt`. Each command builds specs from options and calls the same flow that a deployment runs.

Exit codes: 0 done, 1 failed, 2 wrong usage. A user's mistake never shows a traceback.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
import rich.markdown
import typer
import yaml
from rich.console import Console

from belt_tasks import progress, specs
from belt_tasks.errors import BeltError
from flows.progress_bars import ProgressBars

app = typer.Typer(
    help="Fine-tune and score text encoders on documents longer than the encoder can read.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console(soft_wrap=True)
errors = Console(stderr=True, soft_wrap=True, highlight=False)

SpecT = TypeVar("SpecT", bound=specs.Spec)


def _option(spec: type[specs.Spec], field: str) -> Any:  # noqa: ANN401 - typer's option is untyped
    """An option named after a spec's field and explained by its docstring."""
    default = spec.model_fields[field].get_default(call_default_factory=True)
    shown = "" if default is None else f" [default: {default}]"
    return typer.Option(help=f"{spec.model_fields[field].description}{shown}", show_default=False)


Corpus = Annotated[str, typer.Argument(help="A Parquet file, a directory of them or a glob; any fsspec URL.")]
Output = Annotated[str, typer.Option(help="Directory for the run and the published manifest; any fsspec URL.")]
Checkpoint = Annotated[
    str,
    typer.Option(help="Output of `belt fine-tune`, a checkpoint in it, or a finished Hugging Face classifier."),
]
Encoder = Annotated[str, typer.Option(help="Local directory or Hugging Face name of an encoder.")]
Config = Annotated[
    Path | None, typer.Option(help="YAML file with the flow's specs (corpus, spec or chunks); options override it.")
]

IdColumn = Annotated[str | None, _option(specs.CorpusSpec, "id_column")]
TextColumn = Annotated[str | None, _option(specs.CorpusSpec, "text_column")]
LabelColumn = Annotated[str | None, _option(specs.CorpusSpec, "label_column")]
SplitColumn = Annotated[str | None, _option(specs.CorpusSpec, "split_column")]
Split = Annotated[str | None, _option(specs.CorpusSpec, "split")]

ChunkSize = Annotated[int | None, _option(specs.ChunkSpec, "chunk_size")]
Stride = Annotated[int | None, _option(specs.ChunkSpec, "stride")]
MinimalChunkLength = Annotated[int | None, _option(specs.ChunkSpec, "minimal_chunk_length")]
MaximalTextLength = Annotated[int | None, _option(specs.ChunkSpec, "maximal_text_length")]
DropContainedTail = Annotated[bool | None, _option(specs.ChunkSpec, "drop_contained_tail")]
Selection = Annotated[str | None, _option(specs.ChunkSpec, "selection")]
NumRandomChunks = Annotated[int | None, _option(specs.ChunkSpec, "num_random_chunks")]
PoolingStrategy = Annotated[str | None, _option(specs.PoolingSpec, "pooling_strategy")]
PoolingSpace = Annotated[str | None, _option(specs.PoolingSpec, "pooling_space")]
MaxBatchTokens = Annotated[int | None, _option(specs.BatchSpec, "max_batch_tokens")]
Device = Annotated[str | None, _option(specs.ScoreSpec, "device")]
Threshold = Annotated[float | None, _option(specs.ScoreSpec, "threshold")]


@app.callback()
def _main(
    *,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Prefect's log and, of bugs, the traceback.")] = False,
) -> None:
    """Fine-tune and score text encoders on documents longer than the encoder can read."""
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "INFO" if verbose else "CRITICAL")
    os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "INFO" if verbose else "CRITICAL")
    # a new PREFECT_HOME makes the first start of the local server slow; nothing is sent to anyone
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")


@app.command()
def score(
    corpus: Corpus,
    checkpoint: Checkpoint,
    output: Output,
    config: Config = None,
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
    pooling_strategy: PoolingStrategy = None,
    pooling_space: PoolingSpace = None,
    max_batch_tokens: MaxBatchTokens = None,
    device: Device = None,
    threshold: Threshold = None,
) -> None:
    """Score every document of CORPUS and publish the predictions. Windows and pooling default to the checkpoint's."""
    options = dict(locals())
    with _user_errors(), _progress():
        columns, spec = _score_specs(options)
        from flows.score import score as flow  # noqa: PLC0415 - after the environment is set

        manifest = flow(corpus, checkpoint, output, columns, spec)
        from belt_tasks import summaries  # noqa: PLC0415 - imports torch

    _print(summaries.run_summary(manifest))


@app.command()
def evaluate(
    corpus: Corpus,
    checkpoint: Checkpoint,
    output: Output,
    config: Config = None,
    id_column: IdColumn = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    split_column: SplitColumn = None,
    split: Split = None,
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
    threshold: Threshold = None,
) -> None:
    """Score a labelled CORPUS and measure how good the predictions are, with plots."""
    options = dict(locals())
    with _user_errors(), _progress():
        columns, spec = _score_specs(options)
        from flows.evaluate import evaluate as flow  # noqa: PLC0415 - after the environment is set

        manifest, receipt = flow(corpus, checkpoint, output, columns, spec)
        from belt_tasks import summaries  # noqa: PLC0415 - imports torch

    _print(summaries.run_summary(manifest), summaries.evaluation_summary(receipt))


@app.command()
def fine_tune(
    corpus: Corpus,
    encoder: Encoder,
    output: Output,
    config: Config = None,
    id_column: IdColumn = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    split_column: SplitColumn = None,
    split: Split = None,
    task: Annotated[str | None, _option(specs.TrainSpec, "task")] = None,
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
    epochs: Annotated[int | None, _option(specs.TrainSpec, "epochs")] = None,
    learning_rate: Annotated[float | None, _option(specs.TrainSpec, "learning_rate")] = None,
    weight_decay: Annotated[float | None, _option(specs.TrainSpec, "weight_decay")] = None,
    schedule: Annotated[str | None, _option(specs.TrainSpec, "schedule")] = None,
    warmup_fraction: Annotated[float | None, _option(specs.TrainSpec, "warmup_fraction")] = None,
    documents_per_batch: Annotated[int | None, _option(specs.TrainSpec, "documents_per_batch")] = None,
    accumulation_steps: Annotated[int | None, _option(specs.TrainSpec, "accumulation_steps")] = None,
    max_grad_norm: Annotated[float | None, _option(specs.TrainSpec, "max_grad_norm")] = None,
    dropout: Annotated[float | None, _option(specs.TrainSpec, "dropout")] = None,
    precision: Annotated[str | None, _option(specs.TrainSpec, "precision")] = None,
    validation_fraction: Annotated[float | None, _option(specs.TrainSpec, "validation_fraction")] = None,
    seed: Annotated[int | None, _option(specs.TrainSpec, "seed")] = None,
) -> None:
    """Fine-tune an encoder on a labelled CORPUS; the gradient flows through the pooling, in fixed memory."""
    options = dict(locals())
    with _user_errors(), _progress():
        columns = _build(specs.CorpusSpec, options, section="corpus")
        spec = _build(specs.TrainSpec, options, section="spec")
        from flows.fine_tune import fine_tune as flow  # noqa: PLC0415 - after the environment is set

        manifest, receipt = flow(corpus, encoder, output, columns, spec)
        from belt_tasks import summaries  # noqa: PLC0415 - imports torch

    _print(summaries.run_summary(manifest), summaries.fine_tuning_summary(receipt))


@app.command()
def chunk(
    corpus: Corpus,
    encoder: Encoder,
    output: Output,
    config: Config = None,
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
) -> None:
    """Write the chunk table of CORPUS: one row of token ids per window, as Parquet."""
    options = dict(locals())
    with _user_errors(), _progress():
        columns = _build(specs.CorpusSpec, options, section="corpus")
        chunks = _build(specs.ChunkSpec, options, section="chunks")
        from flows.chunk import chunk as flow  # noqa: PLC0415 - after the environment is set

        manifest = flow(corpus, encoder, output, columns, chunks)
        from belt_tasks import summaries  # noqa: PLC0415 - imports torch

    _print(summaries.run_summary(manifest))


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
) -> None:
    """Show how a text is cut: tokens, characters and first words of every chunk. For learning the parameters."""
    options = {**locals(), "config": None}
    with _user_errors():
        spec = _build(specs.ChunkSpec, options, section="chunks")
        from belt_tasks.window_table import window_table  # noqa: PLC0415 - imports transformers

        table, totals = window_table(file, encoder, spec)
    console.print(table)
    console.print(totals)


@app.command()
def demo(
    output: Annotated[str, typer.Option(help="Directory for the corpus and all results.")] = ".belt/demo",
) -> None:
    """Run everything on real text that every machine has: the docstrings of the installed libraries."""
    with _user_errors(), _progress():
        from flows.demo import demo as flow  # noqa: PLC0415 - after the environment is set

        result = flow(output)
        from belt_tasks import summaries  # noqa: PLC0415 - imports torch

    _print(
        summaries.run_summary(result.fine_tuning_run),
        summaries.fine_tuning_summary(result.fine_tuning),
        summaries.evaluation_summary(result.evaluation),
        summaries.run_summary(result.scoring_run),
        summaries.read_back_summary(result.read_back),
    )


def main() -> None:
    """Entry point of the `belt` command."""
    app()


def _score_specs(options: dict[str, Any]) -> tuple[specs.CorpusSpec, specs.ScoreSpec]:
    """Specs for scoring; single window or pooling options change the checkpoint's, not the built-in defaults."""
    from belt_tasks import checkpoint  # noqa: PLC0415 - imports torch

    columns = _build(specs.CorpusSpec, options, section="corpus")
    card = checkpoint.read_card(checkpoint.resolve(options["checkpoint"]))
    base = {} if card is None else {"chunks": card.chunks.model_dump(), "pooling": card.pooling.model_dump()}
    return columns, _build(specs.ScoreSpec, options, section="spec", base=base)


def _build(
    spec: type[SpecT], options: dict[str, Any], *, section: str, base: dict[str, dict[str, Any]] | None = None
) -> SpecT:
    """A spec from the config file's section and the options that were given, which win.

    `base` holds, for a nested spec, what its options change where the config file does not give it.
    """
    values = _read_config(options["config"]).get(section) or {}
    for name, field in spec.model_fields.items():
        nested = _nested_spec(field.annotation)
        if nested is None:
            if options.get(name) is not None:
                values[name] = options[name]
            continue
        given = {inner: options[inner] for inner in nested.model_fields if options.get(inner) is not None}
        if given:
            values[name] = {**(values.get(name) or (base or {}).get(name, {})), **given}
    return spec.model_validate(values)


def _nested_spec(annotation: Any) -> type[specs.Spec] | None:  # noqa: ANN401 - any annotation
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, specs.Spec):
            return candidate
    return None


def _read_config(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"--config {path}: {error}") from error
    allowed = ("corpus", "spec", "chunks")
    unknown = sorted(set(content) - set(allowed)) if isinstance(content, dict) else [content]
    if unknown or not all(isinstance(value, dict | None) for value in content.values()):
        raise typer.BadParameter(f"--config {path}: must hold the sections {', '.join(allowed)}, got {content!r}")
    return content


@contextmanager
def _user_errors() -> Iterator[None]:
    """Say what is wrong in words, and leave with the right exit code."""
    try:
        yield
    except pydantic.ValidationError as error:
        for problem in error.errors():
            errors.print(f"[red]Error:[/red] {_worded(problem)}", markup=True)
        raise typer.Exit(2) from None
    except BeltError as error:
        for line in str(error).split("\n"):
            errors.print("[red]Error:[/red]", end=" ")
            errors.print(line, markup=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        errors.print("Interrupted. Finished shards are kept; run the same command again to go on.")
        raise typer.Exit(130) from None


def _worded(problem: Any) -> str:  # noqa: ANN401 - pydantic's error dictionary
    names = [str(part) for part in problem["loc"] if isinstance(part, str)]
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "value_error" or not names:
        return message
    option = "--" + names[-1].replace("_", "-")
    return f"{option}: {message[0].lower()}{message[1:]}, got {problem['input']!r}"


@contextmanager
def _progress() -> Iterator[None]:
    """Progress bars on a terminal, nothing elsewhere."""
    with ProgressBars(errors) as bars, progress.listen(bars.advance):
        yield


def _print(*summaries: str) -> None:
    """Rendered on a terminal, plain Markdown elsewhere, where long paths must stay in one piece."""
    for summary in summaries:
        console.print(rich.markdown.Markdown(summary) if console.is_terminal else summary, markup=False)


if __name__ == "__main__":
    main()
