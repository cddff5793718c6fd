"""The fine-tuning benchmark: seconds and memory of an optimizer step's gradient, against the length of the document.

    python -m tests.benchmarks.fine_tuning --help

belt beside one pass over all chunks, activation checkpointing and belt-nlp: the same weights, random tokens, chunks and
loss. Memory is that of one step in a process of its own; seconds are medians of rounds in which the ways take turns.
Where one pass fits, belt's gradient is compared with its.
"""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing leaves this machine

import psutil
import typer

from belt_tasks import encoder
from belt_tasks.demo import demo_encoder
from belt_tasks.errors import BeltError, ConfigError
from belt_tasks.specs import ChunkSpec
from belt_tasks.tokens import load_tokenizer
from tests.benchmarks import report, training_plot, training_report
from tests.benchmarks.protocol import TrainingSetup, num_cores
from tests.benchmarks.scoring import say
from tests.benchmarks.training_run import GIB, Documents, Options, Results, run
from tests.benchmarks.training_ways import WAYS

QUICK = {"rounds": 3, "chunks": "4,40", "tokens": "512,5120,100000"}
FULL = {"rounds": 5, "chunks": "4,16,40", "tokens": "512,5120,51200,100000"}
NUM_SHORT = 8  # documents of the batch

Number = TypeVar("Number", int, float)


def main(
    *,
    rounds: Annotated[int | None, typer.Option(help="Rounds, whose medians are compared.")] = None,
    chunks: Annotated[
        str | None, typer.Option(help="Lengths of documents that are timed, in chunks; a batch of short ones is too.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Lengths of documents whose memory is measured, in tokens; some more are.")
    ] = None,
    dropout: Annotated[str, typer.Option(help="Dropouts of the encoder.")] = "0.1,0",
    ways: Annotated[str, typer.Option(help=f"Some of {', '.join(WAYS)}.")] = ",".join(WAYS),
    chunk_size: Annotated[int, typer.Option(help="Tokens in a chunk, without special ones.")] = 510,
    max_batch_tokens: Annotated[int, typer.Option(help="Of a mini-batch: rows times longest row.")] = 8192,
    most_gib: Annotated[float, typer.Option(help="Ways and lengths that need more memory are left out.")] = 8.0,
    model: Annotated[Path | None, typer.Option(help="Folder of an encoder; without it, all-MiniLM-L6-v2.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or cuda:N.")] = "cpu",
    full: Annotated[bool, typer.Option("--full", help="More lengths and rounds.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for fine_tuning.md, .json and .png.")] = Path(".belt/bench"),
) -> None:
    """Compare belt's fine-tuning step with other ways to the same gradient, on this machine."""
    asked = {name: str(value) for name, value in locals().items() if value is not None}
    busy = psutil.cpu_percent(interval=1.0) / 100
    try:
        options = check(
            rounds=rounds,
            chunks=chunks,
            tokens=tokens,
            dropout=dropout,
            ways=ways,
            chunk_size=chunk_size,
            max_batch_tokens=max_batch_tokens,
            most_gib=most_gib,
            model=model,
            device=device,
            full=full,
            output=output,
        )
        results = run(options, say)
    except (BeltError, OSError) as error:
        say(f"error: {error}")
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from error
    print(write(output, results, asked, busy=busy))
    say(f"\nwrote fine_tuning.md, fine_tuning.json and fine_tuning.png to {output}")
    if not any(one.seconds for one in results.times):
        raise typer.Exit(1)


def check(
    *,
    rounds: int | None = None,
    chunks: str | None = None,
    tokens: str | None = None,
    dropout: str = "0.1,0",
    ways: str = ",".join(WAYS),
    chunk_size: int = 510,
    max_batch_tokens: int = 8192,
    most_gib: float = 8.0,
    model: Path | None = None,
    device: str = "cpu",
    full: bool = False,
    output: Path,
) -> Options:
    """Check what was asked for, and fill in the rest.

    Raises:
        ConfigError: an option has a wrong value.
    """
    size: dict[str, Any] = FULL if full else QUICK
    rounds = size["rounds"] if rounds is None else rounds
    for name, value in {"rounds": rounds, "chunk-size": chunk_size, "max-batch-tokens": max_batch_tokens}.items():
        if value < 1:
            raise ConfigError(f"--{name} must be at least 1, got {value}")
    if most_gib <= 0.0:
        raise ConfigError(f"--most-gib must be more than 0, got {most_gib}")
    names = tuple(dict.fromkeys(name.strip() for name in ways.split(",") if name.strip()))
    if unknown := [name for name in names if name not in WAYS]:
        raise ConfigError(f"--ways must name some of {', '.join(WAYS)}, got {', '.join(unknown)}")
    dropouts = _numbers("dropout", dropout, float)
    if wrong := [value for value in dropouts if not 0.0 <= value < 1.0]:
        raise ConfigError(f"--dropout must be at least 0 and less than 1, got {wrong[0]}")
    counts = {
        name: _numbers(name, size[name] if value is None else value, int)
        for name, value in {"chunks": chunks, "tokens": tokens}.items()
    }
    for name, values in counts.items():
        if wrong := [value for value in values if value < 1]:
            raise ConfigError(f"--{name} must be at least 1, got {wrong[0]}")
    source = str((model or demo_encoder()).absolute())
    cut, special = ChunkSpec(chunk_size=chunk_size, stride=chunk_size), load_tokenizer(source).special
    encoder.check_chunk_size(cut, special, encoder.num_positions_of_source(source), source=source)
    num_rows = max(max_batch_tokens // (chunk_size + special.num_tokens), 1)
    short = Documents(lengths=tuple(max(chunk_size * part // NUM_SHORT, 1) for part in range(1, NUM_SHORT + 1)))
    one_batch = Documents(lengths=(num_rows * chunk_size,))
    weighed = {short, one_batch, *[Documents(lengths=(number,)) for number in counts["tokens"]]}
    return Options(
        setup=TrainingSetup(
            encoder=source,
            chunk_size=chunk_size,
            max_batch_tokens=max_batch_tokens,
            device=str(encoder.choose_device(device)),
            num_threads=num_cores(),
            most_bytes=round(most_gib * GIB),
        ),
        ways=names or tuple(WAYS),
        dropouts=dropouts,
        num_rounds=rounds,
        timed=(short, *[Documents(lengths=(number * chunk_size,)) for number in sorted(counts["chunks"])]),
        weighed=tuple(sorted(weighed, key=lambda documents: documents.num_positions(chunk_size))),
        one_batch=one_batch,
        logs=output / "logs",
    )


def _numbers(name: str, given: str, kind: type[Number]) -> tuple[Number, ...]:
    """Numbers between commas, each once."""
    try:
        found = tuple(dict.fromkeys(kind(part) for part in given.split(",") if part.strip()))
    except ValueError as error:
        raise ConfigError(f"--{name} must be numbers with commas between them, got {given!r}") from error
    if not found:
        raise ConfigError(f"--{name} must be numbers with commas between them, got {given!r}")
    return found


def write(folder: Path, results: Results, asked: dict[str, str], *, busy: float) -> str:
    """Write the report, every figure and the plot; returns the report."""
    now, setup = datetime.now(UTC), results.options.setup
    machine = report.machine(setup.num_threads, busy=busy) | {
        "device": encoder.device_name(encoder.choose_device(setup.device)),
        "model": Path(asked["model"]).name if "model" in asked else "all-MiniLM-L6-v2",
    }
    figures = {
        "date": now.isoformat(timespec="seconds"),
        "machine": machine,
        "options": asked,
        "versions": report.versions(),
        **training_report.figures(results),
    }
    text = training_report.markdown(results, machine)
    (folder / "fine_tuning.md").write_text(text + "\n", encoding="utf-8")
    (folder / "fine_tuning.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (folder / "fine_tuning.png").write_bytes(
        training_plot.lines_png(results, results.options.dropouts[0], _caption(machine, setup, now))
    )
    return text


def _caption(machine: dict[str, Any], setup: TrainingSetup, now: datetime) -> str:
    where = machine["cpu"] if setup.device == "cpu" else machine["device"]
    return (
        f"{where}, {machine['cores']} cores, {now:%Y-%m-%d}; {machine['model']}, fp32, chunks of {setup.chunk_size} "
        f"tokens, mini-batches of {setup.max_batch_tokens:,}; medians of interleaved rounds"
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
