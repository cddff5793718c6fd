"""The results: MiniLM fine-tuned to read the head, head and tail, and all of real documents, compared on a test split.

    python -m tests.benchmarks.results DIR --readme README.md
    python -m tests.benchmarks.results --merge OTHER/results.json --readme README.md

Everything is done by belt's own flows, so the command may be killed at any time and goes on when it is run again.
"""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing leaves this machine
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")  # before Prefect is
os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "CRITICAL")

import typer
from pydantic import ValidationError

from belt_tasks import storage
from belt_tasks.demo import demo_encoder
from belt_tasks.errors import ConfigError
from flows.observation import observe_command
from flows.options import WrongUsageError
from flows.terminal import errors, running, user_errors
from tests.benchmarks import report, results_table
from tests.benchmarks.results_corpora import CORPORA, Found, Settings, find, sample
from tests.benchmarks.results_runs import CorpusResult, run_corpus

KEPT = Path(__file__).with_name("results.json")
ENCODER = "all-MiniLM-L6-v2"


def main(
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help=f"Folder with some of {', '.join(CORPORA)} (.parquet).")
    ] = None,
    *,
    only: Annotated[
        str | None, typer.Option(help="Corpora, by commas; without it all that are there but imdb, which needs a GPU.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the fine-tunings, by commas.")] = "0",
    epochs: Annotated[int | None, typer.Option(help="Instead of each corpus's own number.")] = None,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of training and scoring.")] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    max_documents: Annotated[
        int | None, typer.Option(help="A rehearsal on so many documents of each split, which is kept nowhere else.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for all runs and results.json.")] = Path(".belt/results"),
    merge: Annotated[
        list[Path] | None, typer.Option(help="results.json of a run elsewhere, to be kept here; may be given again.")
    ] = None,
    readme: Annotated[Path | None, typer.Option(help="README whose block of results is written anew.")] = None,
    kept: Annotated[Path, typer.Option(help="JSON file of the results that the README shows.")] = KEPT,
    encoder: Annotated[Path | None, typer.Option(help=f"Folder of an encoder; without it, {ENCODER}.")] = None,
    chunk_size: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Fine-tune on real corpora, compare the ways of reading, and keep the results that the README shows."""
    asked = {
        name: [str(each) for each in value] if isinstance(value, list) else str(value)
        for name, value in locals().items()
        if value is not None and name not in ("folder", "output", "merge", "readme", "kept")  # places
    }
    with user_errors():
        if folder is None and not merge and readme is None:
            raise WrongUsageError("there must be DIR, --merge or --readme, got none of them")
        changes = {"precision": precision, "device": device, "epochs": epochs, "chunk_size": chunk_size}
        numbers, found = _seeds(seeds), [] if folder is None else _found(folder, only)
        settings = {each.name: _changed(each.known.settings, changes) for each in found}
        shown = _kept(kept, merge or [], readme)
        if not found:
            say("no DIR was given, so nothing was fine-tuned: what is kept was merged and shown")
            return
        if max_documents is not None:
            found, output = _sampled(found, max_documents, output)
        new = _run(found, settings, numbers, encoder, output.absolute(), asked)
        if max_documents is not None:
            say("a rehearsal: neither the kept results nor the README are changed")
            return
        shown = results_table.merge(shown, new)
        results_table.write_kept(kept, shown)
        if readme is not None:
            results_table.write_readme(readme, shown)


def _run(
    found: list[Found],
    settings: dict[str, Settings],
    seeds: list[int],
    encoder: Path | None,
    output: Path,
    asked: dict[str, Any],
) -> dict[str, CorpusResult]:
    """One corpus after the other; what there is of results is written after each."""
    if "PREFECT_HOME" in os.environ:  # Prefect makes the last folder of the path only
        Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
    observe_command(None, verbose=False)
    source = demo_encoder() if encoder is None else encoder
    results, reports = {}, {}
    figures: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": asked,
        "versions": report.versions(),
    }
    with running():
        for each in found:
            result, of_seeds = run_corpus(each, source, settings[each.name], seeds, output / each.name, say)
            name = ENCODER if encoder is None else encoder.name
            results[each.name] = result.model_copy(update={"encoder": name})
            reports[each.name] = {seed: told.model_dump(mode="json") for seed, told in of_seeds.items()}
            written = figures | results_table.as_json(results) | {"length_reports": reports}
            storage.write_bytes(str(output / "results.json"), (json.dumps(written, indent=1) + "\n").encode())
            print(results_table.block({each.name: results[each.name]}), end="\n\n", flush=True)
    say(f"wrote {output / 'results.json'}; the runs and their pages are beside it")
    return results


def _found(folder: Path, only: str | None) -> list[Found]:
    names = None if only is None else tuple(name.strip() for name in only.split(",") if name.strip())
    try:
        return find(folder, names)
    except ConfigError as error:
        raise WrongUsageError(str(error)) from error


def _kept(kept: Path, others: list[Path], readme: Path | None) -> dict[str, CorpusResult]:
    """What was kept, with other runs' results; written at once, so that a wrong README is found before the work."""
    shown = results_table.read(kept) if kept.exists() else {}
    for path in others:
        shown = results_table.merge(shown, results_table.read(path))
    if readme is not None:
        results_table.write_readme(readme, shown)
    if others:
        results_table.write_kept(kept, shown)
    return shown


def _sampled(found: list[Found], num_documents: int, output: Path) -> tuple[list[Found], Path]:
    """A few documents of each corpus, and a place for their runs."""
    if num_documents < 1:
        raise WrongUsageError(f"--max-documents must be at least 1, got {num_documents}")
    output = output / f"sample-{num_documents}"
    return [sample(each, num_documents, output / each.name / "corpus.parquet") for each in found], output


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise WrongUsageError(f"--seeds must be different numbers from 0 on, such as 0,1,2, got {text!r}")
    return seeds


def _changed(settings: Settings, changes: dict[str, Any]) -> Settings:
    given = {name: value for name, value in changes.items() if value is not None}
    try:
        changed = Settings.model_validate(settings.model_dump() | given)
        changed.train_spec("all", None, seed=0)
    except ValidationError as error:
        told = error.errors()[0]
        name = str(told["loc"][-1]).replace("_", "-") if told["loc"] else "settings"
        raise WrongUsageError(f"--{name}: {told['msg']}, got {told['input']}") from error
    return changed


def say(message: str) -> None:
    """Tell the user, apart from the table."""
    errors.print(message, markup=False)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
