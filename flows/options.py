"""The command line's options: each is named after a spec's field, explained by its docstring and checked by its spec.

Options arrive as they were typed, so that one place, the spec, says what is allowed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
import typer
import yaml

from belt_tasks import specs

SpecT = TypeVar("SpecT", bound=specs.Spec)


class WrongUsageError(Exception):
    """Options or the config file are wrong; one line per mistake."""


def _alternatives(annotation: Any) -> Iterator[Any]:  # noqa: ANN401 - any annotation
    """The annotation, and what a union joins."""
    yield annotation
    yield from getattr(annotation, "__args__", ())


def _may_be_none(info: pydantic.fields.FieldInfo) -> bool:
    """Whether None is a value that can be asked for: of numbers, where it lifts a limit."""
    kinds = set(_alternatives(info.annotation))
    return type(None) in kinds and bool(kinds & {int, float})


def option(spec: type[specs.Spec], field: str, *, default: str | None = None) -> Any:  # noqa: ANN401 - typer's is untyped
    """An option named after a spec's field.

    Args:
        spec: the spec.
        field: its field.
        default: what an option left out means, where that is not the spec's default.
    """
    info = spec.model_fields[field]
    default = default or info.get_default(call_default_factory=True)
    notes = [*([] if default is None else [f"default: {default}"]), *(["or none"] if _may_be_none(info) else [])]
    # round brackets: in square ones rich takes the words for a style, and hides them
    words = f"{info.description} ({', '.join(notes)})" if notes else info.description
    kinds = [kind.__name__ for kind in (int, float) if kind in _alternatives(info.annotation)]
    metavar = None if info.annotation is bool else f"<{kinds[0] if kinds else 'str'}>"
    return typer.Option(help=words, show_default=False, metavar=metavar)


Corpus = Annotated[str, typer.Argument(help="A Parquet file, a directory of them or a glob; any fsspec URL.")]
Output = Annotated[str, typer.Option(help="Directory for the run and the published manifest; any fsspec URL.")]
Checkpoint = Annotated[
    str,
    typer.Option(
        help="Output of `belt fine-tune`, a checkpoint in it, REGISTRY@ALIAS, or a finished Hugging Face classifier."
    ),
]
StorageBlock = Annotated[
    str | None,
    typer.Option(
        help="Prefect Secret block with options of object stores, as JSON; without it those of the environment.",
        metavar="<str>",
    ),
]
Encoder = Annotated[str, typer.Option(help="Local directory or Hugging Face name of an encoder.")]
Config = Annotated[
    Path | None, typer.Option(help="YAML file with the flow's specs, in sections corpus and spec; options override it.")
]
ScoreConfig = Annotated[
    Path | None,
    typer.Option(
        help="YAML file with the flow's specs, in sections corpus, spec, drift and, of score, ray; options override it."
    ),
]
ChunkConfig = Annotated[
    Path | None,
    typer.Option(help="YAML file with the flow's specs, in sections corpus and chunks; options override it."),
]

GateConfig = Annotated[
    Path | None,
    typer.Option(help="YAML file with the flow's specs, in sections corpus, spec and gate; options override it."),
]
Registry = Annotated[str, typer.Option(help="Directory of the registry of models; any fsspec URL.")]
Who = Annotated[
    str | None,
    typer.Option(help="Whom the history names; without it BELT_USER, or the system's user.", metavar="<str>"),
]

IdColumn = Annotated[str | None, option(specs.CorpusSpec, "id_column")]
TextColumn = Annotated[str | None, option(specs.CorpusSpec, "text_column")]
LabelColumn = Annotated[str | None, option(specs.CorpusSpec, "label_column")]
WeightColumn = Annotated[str | None, option(specs.CorpusSpec, "weight_column")]
SplitColumn = Annotated[str | None, option(specs.CorpusSpec, "split_column")]
Split = Annotated[str | None, option(specs.CorpusSpec, "split")]

ChunkSize = Annotated[str | None, option(specs.ChunkSpec, "chunk_size")]
Stride = Annotated[str | None, option(specs.ChunkSpec, "stride")]
MinimalChunkLength = Annotated[str | None, option(specs.ChunkSpec, "minimal_chunk_length")]
MaximalTextLength = Annotated[str | None, option(specs.ChunkSpec, "maximal_text_length")]
DropContainedTail = Annotated[bool | None, option(specs.ChunkSpec, "drop_contained_tail")]
Selection = Annotated[str | None, option(specs.ChunkSpec, "selection")]
NumRandomChunks = Annotated[str | None, option(specs.ChunkSpec, "num_random_chunks")]
ChunkSeed = Annotated[str | None, option(specs.ChunkSpec, "seed")]
PoolingStrategy = Annotated[str | None, option(specs.PoolingSpec, "pooling_strategy")]
PoolingSpace = Annotated[str | None, option(specs.PoolingSpec, "pooling_space")]
MaxBatchTokens = Annotated[str | None, option(specs.BatchSpec, "max_batch_tokens")]
Device = Annotated[str | None, option(specs.ScoreSpec, "device")]
ScorePrecision = Annotated[str | None, option(specs.ScoreSpec, "precision", default="what suits the device")]
Threshold = Annotated[str | None, option(specs.ScoreSpec, "threshold")]
MaxRejectedShare = Annotated[str | None, option(specs.ScoreSpec, "max_rejected_share")]
Evidence = Annotated[str | None, option(specs.ScoreSpec, "evidence")]
NumEvidenceChunks = Annotated[str | None, option(specs.ScoreSpec, "num_evidence_chunks")]
EvidenceText = Annotated[bool | None, option(specs.ScoreSpec, "evidence_text")]
Export = Annotated[bool | None, option(specs.ScoreSpec, "export")]
Full = Annotated[bool | None, option(specs.ScoreSpec, "full")]
Removed = Annotated[str | None, option(specs.ScoreSpec, "removed")]
PublishEvery = Annotated[str | None, option(specs.ScoreSpec, "publish_every")]

GateMetric = Annotated[str | None, option(specs.GateSpec, "metric", default="the task's main one")]
MinGain = Annotated[str | None, option(specs.GateSpec, "min_gain")]
Confidence = Annotated[str | None, option(specs.GateSpec, "confidence")]
NumResamples = Annotated[str | None, option(specs.GateSpec, "num_resamples")]
ResamplingSeed = Annotated[str | None, option(specs.GateSpec, "resampling_seed")]
MinDocuments = Annotated[str | None, option(specs.GateSpec, "min_documents")]
MinRecall = Annotated[str | None, option(specs.GateSpec, "min_recall")]
MaxRecallDrop = Annotated[str | None, option(specs.GateSpec, "max_recall_drop")]
MaxEce = Annotated[str | None, option(specs.GateSpec, "max_ece")]
MaxEceIncrease = Annotated[str | None, option(specs.GateSpec, "max_ece_increase")]
MaxSlowdown = Annotated[str | None, option(specs.GateSpec, "max_slowdown")]
LengthConfidence = Annotated[str | None, option(specs.LengthSpec, "confidence")]
LengthNumResamples = Annotated[str | None, option(specs.LengthSpec, "num_resamples")]
LengthResamplingSeed = Annotated[str | None, option(specs.LengthSpec, "resampling_seed")]
MinBucketDocuments = Annotated[str | None, option(specs.LengthSpec, "min_bucket_documents")]
WantsLengthReport = Annotated[
    bool,
    typer.Option(
        "--length-report",
        help="Also compare the head alone, head and tail, and all of the documents: does reading further pay?",
    ),
]
HeadCheckpoint = Annotated[
    str | None,
    typer.Option(
        help="Checkpoint that was fine-tuned to read the head alone, for the length report; else the same.",
        metavar="<str>",
    ),
]
HeadTailCheckpoint = Annotated[
    str | None,
    typer.Option(
        help="Checkpoint that was fine-tuned to read head and tail, for the length report; else the same.",
        metavar="<str>",
    ),
]
EvaluateConfig = Annotated[
    Path | None,
    typer.Option(
        help="YAML file with the flow's specs, in sections corpus, spec, drift and length; options override it."
    ),
]
Runner = Annotated[
    specs.Runner,
    typer.Option(help="Score one shard after the other in this process, or many at once on a Ray cluster."),
]
Address = Annotated[str | None, option(specs.RaySpec, "address")]
NumWorkers = Annotated[str | None, option(specs.RaySpec, "num_workers")]
NumCpus = Annotated[str | None, option(specs.RaySpec, "num_cpus")]
NumGpus = Annotated[str | None, option(specs.RaySpec, "num_gpus")]
StartTimeoutS = Annotated[str | None, option(specs.RaySpec, "start_timeout_s")]

# scoring takes from the checkpoint what is left out
OWN = "the checkpoint's"
OwnChunkSize = Annotated[str | None, option(specs.ChunkSpec, "chunk_size", default=OWN)]
OwnStride = Annotated[str | None, option(specs.ChunkSpec, "stride", default=OWN)]
OwnMinimalChunkLength = Annotated[str | None, option(specs.ChunkSpec, "minimal_chunk_length", default=OWN)]
OwnMaximalTextLength = Annotated[str | None, option(specs.ChunkSpec, "maximal_text_length", default=OWN)]
OwnDropContainedTail = Annotated[bool | None, option(specs.ChunkSpec, "drop_contained_tail", default=OWN)]
OwnSelection = Annotated[str | None, option(specs.ChunkSpec, "selection", default=OWN)]
OwnNumRandomChunks = Annotated[str | None, option(specs.ChunkSpec, "num_random_chunks", default=OWN)]
OwnChunkSeed = Annotated[str | None, option(specs.ChunkSpec, "seed", default=OWN)]
OwnPoolingStrategy = Annotated[str | None, option(specs.PoolingSpec, "pooling_strategy", default=OWN)]
OwnPoolingSpace = Annotated[str | None, option(specs.PoolingSpec, "pooling_space", default=OWN)]


def read_config(path: Path | None, *, sections: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The sections of a config file; all are empty without a file.

    Raises:
        WrongUsageError: it cannot be read, or holds something else.
    """
    if path is None:
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WrongUsageError(f"--config {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise WrongUsageError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from error
    content = {} if content is None else content
    if not isinstance(content, dict) or not set(content) <= set(sections):
        allowed = f"{', '.join(sections[:-1])} and {sections[-1]}"
        given = ", ".join(map(str, content)) if isinstance(content, dict) else repr(content)
        raise WrongUsageError(f"--config {path}: its sections must be {allowed}, got {given}")
    for name, section in content.items():
        if not isinstance(section, dict | None):
            raise WrongUsageError(f"--config {path}: section {name} must hold `field: value` pairs, got {section!r}")
    return {name: section or {} for name, section in content.items()}


def check_whole(config: dict[str, dict[str, Any]], section: str, **nested: type[specs.Spec]) -> None:
    """Refuse nested specs of a config file that leave something to a checkpoint, where there is more than one.

    Raises:
        WrongUsageError: fields are missing.
    """
    for name, spec in nested.items():
        given = config.get(section, {}).get(name)
        missing = [field for field in spec.model_fields if isinstance(given, dict) and given and field not in given]
        if missing:
            raise WrongUsageError(
                f"{section}.{name}: two checkpoints are compared, so it must say all of it or be left out; lacks "
                f"{', '.join(missing)}"
            )


def build(
    spec: type[SpecT],
    options: dict[str, Any],
    config: dict[str, dict[str, Any]],
    *,
    section: str,
    base: dict[str, dict[str, Any]] | None = None,
) -> SpecT:
    """A spec from the config file's section and the options that were given, which win.

    Args:
        spec: what to build.
        options: the command's, by name; None was not given.
        config: sections of the config file.
        section: the one that describes this spec.
        base: for a nested spec, what the config file and the options change.

    Raises:
        WrongUsageError: values are not allowed.
    """
    values = dict(config.get(section, {}))
    for name, info in spec.model_fields.items():
        nested = _nested_spec(info.annotation)
        if nested is None:
            if options.get(name) is not None:
                values[name] = _typed(options[name], info)
            continue
        given = {
            inner: _typed(options[inner], inner_info)
            for inner, inner_info in nested.model_fields.items()
            if options.get(inner) is not None and inner not in spec.model_fields
        }
        configured = values.get(name) or {}
        if (given or configured) and isinstance(configured, dict):
            values[name] = {**(base or {}).get(name, {}), **configured, **given}
    try:
        return spec.model_validate(values)
    except pydantic.ValidationError as error:
        problems = error.errors()
        raise WrongUsageError("\n".join(_worded(problem, spec, options, section) for problem in problems)) from error


def _worded(problem: Any, spec: type[specs.Spec], options: dict[str, Any], section: str) -> str:  # noqa: ANN401 - pydantic's
    """What, got, allowed, and where: an option, or a key of the config file."""
    message = str(problem["msg"]).removeprefix("Value error, ")
    path = [str(part) for part in problem["loc"]]
    owner = _owner(spec, path)
    if problem["type"] == "value_error":  # several fields that do not go together; the spec says which
        first = message.split()[0]
        left_out = first in owner.model_fields and first not in problem["input"]
        return message + (f" (--{first.replace('_', '-')} was left out, this is its default)" if left_out else "")
    where = ".".join([section, *path])
    if problem["type"] == "extra_forbidden":
        return (
            f"--config, {where}: no such field; allowed are {', '.join(owner.model_fields)}; got {problem['input']!r}"
        )
    given = path[-1] in owner.model_fields and options.get(path[-1]) is not None
    name = f"--{path[-1].replace('_', '-')}" if given else f"--config, {where}"
    return f"{name}: {message[0].lower()}{message[1:]}, got {problem['input']!r}"


def _owner(spec: type[specs.Spec], path: list[str]) -> type[specs.Spec]:
    """The spec that the last part of a path is a field of, or the nested spec that the path names."""
    for name in path:
        info = spec.model_fields.get(name)
        spec = (info and _nested_spec(info.annotation)) or spec
    return spec


def _typed(value: Any, info: pydantic.fields.FieldInfo) -> Any:  # noqa: ANN401 - an option's value
    return None if value == "none" and _may_be_none(info) else value


def _nested_spec(annotation: Any) -> type[specs.Spec] | None:  # noqa: ANN401 - any annotation
    for candidate in _alternatives(annotation):
        if isinstance(candidate, type) and issubclass(candidate, specs.Spec):
            return candidate
    return None
