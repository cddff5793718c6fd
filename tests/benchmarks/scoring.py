"""The scoring benchmark: belt beside other ways to score the same documents with the same model, on this CPU.

    python -m tests.benchmarks.scoring --help

Peers take turns on the same Parquet file for several rounds, each in a process of its own, and medians are compared.
Timed is a round from opening the corpus to the closed output; loading and exporting the model is not. All peers stay
in memory for the whole run: with a large model, name fewer of them.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing leaves this machine

import psutil
import typer

from belt_tasks.demo import demo_encoder
from belt_tasks.errors import BeltError, ConfigError
from belt_tasks.specs import ChunkSpec
from tests.benchmarks import memory, plot, report, tokenizer
from tests.benchmarks.peers import PEERS
from tests.benchmarks.protocol import num_cores
from tests.benchmarks.report import Scored
from tests.benchmarks.run import Options, run

QUICK: dict[str, Any] = {"num_rounds": 3, "probe_tokens": 3_000, "total_s": 160.0, "documents_per_library": 50}
FULL: dict[str, Any] = {"num_rounds": 5, "probe_tokens": 20_000, "total_s": 1500.0, "documents_per_library": 200}


def main(
    *,
    corpus: Annotated[
        Path | None,
        typer.Option(help="Parquet file with doc_id and text; without it, docstrings of installed libraries."),
    ] = None,
    documents: Annotated[
        int | None, typer.Option(help="Documents, drawn by a seed; without it, as many as minutes allow.")
    ] = None,
    chunk_size: Annotated[int, typer.Option(help="Tokens in a chunk, without special ones.")] = 510,
    stride: Annotated[int | None, typer.Option(help="Step between chunks; without it, the chunk size.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds, whose medians are compared.")] = None,
    peers: Annotated[str | None, typer.Option(help=f"Some of {', '.join(PEERS)}.")] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of an encoder; without it, all-MiniLM-L6-v2.")] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="All peers, with and without overlap, longer; memory and tokenizer too."),
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for scoring.md, .json and .png.")] = Path(".belt/bench"),
) -> None:
    """Compare belt's scoring with other ways to do the same, on this machine's CPU."""
    asked = {name: str(value) for name, value in locals().items() if value is not None}
    busy = psutil.cpu_percent(interval=1.0) / 100
    try:
        options = check(
            corpus=corpus,
            documents=documents,
            chunk_size=chunk_size,
            stride=stride,
            rounds=rounds,
            peers=peers,
            model=model,
            full=full,
            output=output,
        )
        scored = run(options, say)
        extra = measure_rest(say) if full else {}
    except (BeltError, OSError) as error:
        say(f"error: {error}")
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from error
    print(write(output, scored, asked, extra, busy=busy))
    say(f"\nwrote scoring.md, scoring.json and scoring.png to {output}; what the peers said is in {output / 'logs'}")
    if all(row.reason is not None for one in scored for row in one.rows()):
        raise typer.Exit(1)


def check(
    *,
    corpus: Path | None = None,
    documents: int | None = None,
    chunk_size: int = 510,
    stride: int | None = None,
    rounds: int | None = None,
    peers: str | None = None,
    model: Path | None = None,
    full: bool = False,
    output: Path,
) -> Options:
    """Check what was asked for, and fill in the rest.

    Raises:
        ConfigError: an option has a wrong value.
    """
    counts = {"documents": documents, "rounds": rounds, "chunk-size": chunk_size, "stride": stride}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ConfigError(f"--{name} must be at least 1, got {value}")
    if stride is not None and stride > chunk_size:
        raise ConfigError(f"--stride must be at most --chunk-size ({chunk_size}), got {stride}")
    if model is not None and not model.is_dir():
        raise ConfigError(f"--model must be the folder of an encoder, got {model}: there is no such folder")
    strides = [chunk_size, max(chunk_size // 2, 1)] if full else [chunk_size]
    size = FULL if full else QUICK
    return Options(
        corpus=corpus,
        num_documents=documents,
        chunks=tuple(ChunkSpec(chunk_size=chunk_size, stride=step) for step in ([stride] if stride else strides)),
        num_rounds=rounds or size["num_rounds"],
        peers=_chosen(peers) if peers is not None else tuple(name for name in PEERS if full or PEERS[name].in_default),
        model=model or demo_encoder(),
        output=output,
        probe_tokens=(FULL if documents else size)["probe_tokens"],
        total_s=size["total_s"],
        documents_per_library=max(size["documents_per_library"], (documents or 0) // 3),
    )


def _chosen(peers: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in peers.split(",") if name.strip()))
    unknown = [name for name in names if name not in PEERS]
    if unknown or not names:
        raise ConfigError(f"--peers must name some of {', '.join(PEERS)}, got {', '.join(unknown) or 'none'}")
    return names


def measure_rest(say: Callable[[str], None]) -> dict[str, Any]:
    """What does not depend on peers: memory against the size of the corpus, and the tokenizer on more cores."""
    say("measuring memory, about three minutes")
    peaks = memory.measure(memory.NUM_DOCUMENTS)
    say("measuring the tokenizer")
    return {"memory": peaks, "tokenizer_tokens_per_s": tokenizer.rates([])}


def write(folder: Path, scored: Sequence[Scored], asked: dict[str, str], extra: dict[str, Any], *, busy: float) -> str:
    """Write the report, every figure and the plot; returns the report."""
    now, machine = datetime.now(UTC), report.machine(num_cores(), busy=busy)
    figures = {
        "date": now.isoformat(timespec="seconds"),
        "machine": machine,
        "options": asked,
        "versions": report.versions(),
        "corpora": [report.figures(one) for one in scored],
        **extra,
    }
    text = report.markdown(scored, machine)
    if extra:
        text += f"\n\n## Memory of a tiny encoder's scoring\n\n{memory.table(extra['memory'])}"
        text += f"\n\n## Tokenizer\n\n{tokenizer.table(extra['tokenizer_tokens_per_s'])}"
    (folder / "scoring.md").write_text(text + "\n", encoding="utf-8")
    (folder / "scoring.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    caption = f"{machine['cpu']}, {machine['cores']} cores, {now:%Y-%m-%d}; medians of interleaved rounds"
    (folder / "scoring.png").write_bytes(plot.bars_png([(one.title, one.rows()) for one in scored], caption))
    return text


def say(message: str) -> None:
    """Tell the user, apart from the report."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
