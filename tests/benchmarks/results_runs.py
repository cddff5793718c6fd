"""Runs of the results: fine-tunes on a corpus once for each selection, by belt's own flows, and compares them.

    OUTPUT/CORPUS/baseline.json
    OUTPUT/CORPUS/SEED/SELECTION     an output of `belt fine-tune`
    OUTPUT/CORPUS/SEED/evaluation    an output of `belt evaluate --length-report`
    OUTPUT/CORPUS/SEED/machine.json  where it began

Whatever is complete is found there by the flows and not done again.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from belt_tasks import storage
from belt_tasks.length_comparison import LengthReport, LengthRow
from belt_tasks.specs import Head, LengthSpec, Metric, ScoreSpec, Selection, Spec
from tests.benchmarks import report
from tests.benchmarks.protocol import num_cores
from tests.benchmarks.results_baseline import Baseline, baseline
from tests.benchmarks.results_corpora import SELECTIONS, Found, Settings, columns

KINDS = ("all", "longer")
VERSIONS = ("belt_version", "torch_version", "transformers_version")


class WayRun(Spec):
    """What one selection took."""

    selection: Selection
    checkpoint_digest: str
    num_training_documents: int
    num_validation_documents: int
    epochs: int
    best_epoch: int
    num_tokens_trained: int
    """Content tokens of all chunks, those of the documents held out too, in all epochs."""
    training_s: float
    """Of fine-tuning, validation among it."""
    num_tokens_scored: int
    """Content tokens of all chunks of the test documents."""
    scoring_s: float
    """Of the encoder."""
    training_device: str
    scoring_device: str
    precision: str


class SeedResult(Spec):
    """One fine-tuning of each selection, compared."""

    seed: int
    num_test_documents: int
    num_longer: int
    """Test documents that are longer than a chunk."""
    rows: tuple[LengthRow, ...]
    """The main metric of each selection, and what reading all changes, on all documents and on the longer ones."""
    runs: tuple[WayRun, ...]
    machine: dict[str, Any]
    versions: dict[str, str]
    date: str

    def row(self, selection: Selection, compared_with: Selection | None = None) -> LengthRow:
        """A number of all documents."""
        wanted = ("all", selection, compared_with)
        return next(row for row in self.rows if (row.kind, row.selection, row.compared_with) == wanted)

    def run(self, selection: Selection) -> WayRun:
        """What a selection took."""
        return next(run for run in self.runs if run.selection == selection)


class CorpusResult(Spec):
    """All that is told of a corpus; nothing in it says where anything lies."""

    corpus: str
    head: Head
    metric: Metric
    encoder: str
    settings: Settings
    baseline: Baseline
    length: LengthSpec
    seeds: tuple[SeedResult, ...]


def run_corpus(
    found: Found, encoder: Path, settings: Settings, seeds: Sequence[int], output: Path, say: Callable[[str], None]
) -> tuple[CorpusResult, dict[int, LengthReport]]:
    """Fine-tune, compare and measure the baseline; a complete part is not done again.

    Args:
        found: the corpus.
        encoder: folder of the encoder to begin with.
        settings: how to fine-tune.
        seeds: one fine-tuning of each selection for each of them.
        output: the corpus's own folder.
        say: hears what begins.

    Returns:
        What is told of the corpus, and the length reports by seed.

    Raises:
        BeltError: belt refuses something, or failed.
    """
    length, results, reports = LengthSpec(), [], {}
    for seed in seeds:
        compared, result = _run_seed(found, encoder, settings, length, output / str(seed), seed, say)
        results.append(result)
        reports[seed] = compared
    compared = reports[seeds[0]]
    say(f"{found.name}: tf-idf and a linear model")
    return (
        CorpusResult(
            corpus=found.name,
            head=compared.head,
            metric=compared.metric,
            encoder=encoder.name,
            settings=settings,
            baseline=baseline(found, compared.head.task, length, output / "baseline.json"),
            length=length,
            seeds=tuple(results),
        ),
        reports,
    )


def _run_seed(
    found: Found,
    encoder: Path,
    settings: Settings,
    length: LengthSpec,
    output: Path,
    seed: int,
    say: Callable[[str], None],
) -> tuple[LengthReport, SeedResult]:
    from flows.evaluate import evaluate
    from flows.fine_tune import fine_tune

    machine = _machine(output / "machine.json")
    checkpoints = {selection: str(output / selection) for selection in SELECTIONS}
    trained = {}
    for selection, where in checkpoints.items():
        say(f"{found.name}, seed {seed}: fine-tuning with selection {selection}")
        spec = settings.train_spec(selection, found.known.task, seed=seed)
        trained[selection] = fine_tune(found.uri, str(encoder), where, columns("train"), spec)
    say(f"{found.name}, seed {seed}: comparing the selections")
    manifest, receipt = evaluate(
        found.uri,
        checkpoints["all"],
        str(output / "evaluation"),
        columns("test"),
        ScoreSpec(device=settings.device, precision=settings.precision, evidence="none"),
        length=length,
        head_checkpoint_uri=checkpoints["head"],
        head_tail_checkpoint_uri=checkpoints["head_tail"],
    )
    if receipt.length is None:
        raise AssertionError("evaluate() compares where it is asked to")
    compared = receipt.length
    runs = []
    for selection, (training, tuned) in trained.items():
        reading = compared.reading(selection)
        runs.append(
            WayRun(
                selection=selection,
                checkpoint_digest=tuned.checkpoint_digest,
                num_training_documents=tuned.num_training_documents,
                num_validation_documents=tuned.num_validation_documents,
                epochs=len(tuned.epochs),
                best_epoch=tuned.best_epoch,
                num_tokens_trained=tuned.num_tokens_encoded * len(tuned.epochs),
                training_s=tuned.training_s,
                num_tokens_scored=reading.num_tokens_encoded,
                scoring_s=reading.encode_s,
                training_device=training.run["device"],
                scoring_device=reading.device,
                precision=reading.precision,
            )
        )
    return compared, SeedResult(
        seed=seed,
        num_test_documents=compared.num_documents,
        num_longer=compared.group("longer").num_documents,
        rows=tuple(row for row in compared.rows if row.kind in KINDS and row.metric == compared.metric),
        runs=tuple(runs),
        machine=machine,
        versions={name.removesuffix("_version"): manifest.run[name] for name in VERSIONS},
        date=str(manifest.run["finished_at"])[:10],
    )


def _machine(path: Path) -> dict[str, Any]:
    """Where a seed's runs began: told again by a call that only finds them."""
    if not path.exists():
        busy = psutil.cpu_percent(interval=1.0) / 100
        told = report.machine(num_cores(), busy=busy)
        storage.write_bytes(str(path), (json.dumps(told, indent=1) + "\n").encode())
    machine: dict[str, Any] = json.loads(path.read_bytes())
    return machine
