"""The report of the fine-tuning benchmark: tables of seconds, memory and gradients, as Markdown and as JSON."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from tests.benchmarks.training_run import Documents, Measurement, Results
from tests.benchmarks.training_ways import REFERENCE, WAYS

NONE = "-"
MIB = 2**20
CLAIM = 0.15  # how much more memory than one mini-batch's a long document may take, to be called bounded
GRADIENTS = """\
## Gradients without dropout, against one pass with the same pooling

Norm of the difference, and largest difference of any number, over the norm of the gradient."""
LEGEND = """\
Each step is the gradient of one loss over all its documents, without the optimizer. "belt": the exact step in
mini-batches; "one pass": one forward and one graph of all chunks, with PyTorch's own dropout; "activation
checkpointing": of every encoder layer, in the same mini-batches, one graph; "belt-nlp": its own training step. All but
"belt, max" pool by the mean; the other ways' seconds and memory do not depend on it. Spread: slowest minus fastest
round, as a share of the median."""


def markdown(results: Results, machine: dict[str, Any]) -> str:
    """The whole report."""
    setup, options = results.options.setup, results.options
    shown = (
        f"fp32; chunks of {setup.chunk_size:,} tokens, mini-batches of at most {setup.max_batch_tokens:,}; what needs "
        f"more than {setup.most_bytes / 2**30:g} GiB is left out; other programs kept {machine['busy']:.0%} of the "
        "machine busy before the start"
    )
    parts = [f"{machine['device']}; {machine['cpu']}, {machine['cores']} cores; {machine['model']}", shown]
    for dropout in options.dropouts:
        parts += [
            f"## Seconds, dropout {dropout:g}: median of {options.num_rounds} rounds (times one pass; spread)",
            grid(results.times, dropout, options.timed, lambda one: _seconds(one, results)),
            f"## Memory, dropout {dropout:g}: MiB above what the process had before the step",
            grid(results.memory, dropout, options.weighed, _mebibytes),
            *[claim for way in options.ways if (claim := bounded(results, way, dropout)) is not None],
        ]
    parts += [GRADIENTS, grid(results.gradients, 0.0, options.timed, _difference)]
    return "\n\n".join([*parts, *_reasons(results), LEGEND])


def grid(
    measured: Sequence[Measurement],
    dropout: float,
    documents: Sequence[Documents],
    cell: Callable[[Measurement], str],
) -> str:
    """Ways by documents, in Markdown that reads well in a terminal too."""
    found = {(one.way, one.documents): one for one in measured if one.dropout == dropout}
    ways = [way for way in WAYS if any(name == way for name, _ in found)]
    rows = [["way", *[one.title for one in documents]]]
    rows += [[WAYS[way].title, *[cell(found[way, one]) for one in documents]] for way in ways]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(values: Sequence[str]) -> str:
        first, *others = zip(values, widths, strict=True)
        return f"| {' | '.join([first[0].ljust(first[1]), *[value.rjust(width) for value, width in others]])} |"

    rule = ["-" * widths[0], *["-" * (width - 1) + ":" for width in widths[1:]]]
    return "\n".join([line(rows[0]), f"| {' | '.join(rule)} |", *map(line, rows[1:])])


def ratio(one: Measurement, results: Results) -> float | None:
    """A way's median over that of one pass on the same documents; None where either has none."""
    times = {(other.way, other.dropout, other.documents): other.seconds for other in results.times}
    reference = times.get((REFERENCE, one.dropout, one.documents))
    return statistics.median(one.seconds) / statistics.median(reference) if one.seconds and reference else None


def growth(results: Results, way: str, dropout: float) -> tuple[Documents, float] | None:
    """The longest measured documents, and their memory over that of one document that fills a mini-batch."""
    peaks = {one.documents: one.peak_bytes or 0 for one in results.peaks(way, dropout)}
    one_batch = results.options.one_batch
    longest = max(peaks, key=lambda documents: documents.num_tokens, default=None)
    if longest is None or one_batch not in peaks or longest.num_tokens <= one_batch.num_tokens:
        return None
    return longest, peaks[longest] / peaks[one_batch]


def bounded(results: Results, way: str, dropout: float) -> str | None:
    """A sentence on whether memory grows with the document; None of ways that do not claim so."""
    grown = growth(results, way, dropout)
    if grown is None or not WAYS[way].is_bounded:
        return None
    longest, times = grown
    verdict = "within" if abs(times - 1.0) <= CLAIM else "NOT within"
    return (
        f"{WAYS[way].title}, dropout {dropout:g}: {longest.title} take {times:.2f} times the memory of a document that "
        f"fills one mini-batch ({results.options.one_batch.title}): {verdict} {CLAIM:.0%}."
    )


def figures(results: Results) -> dict[str, Any]:
    """Every figure: what is in the tables, and what it was made of."""
    options = results.options
    return {
        "setup": asdict(options.setup),
        "memory": [_figures(one) for one in results.memory],
        "growth": [
            {"way": way, "dropout": dropout, "documents": grown[0].title, "times_one_mini_batch": grown[1]}
            for dropout in options.dropouts
            for way in options.ways
            if (grown := growth(results, way, dropout)) is not None
        ],
        "gradients": [_figures(one) for one in results.gradients],
        "seconds": [_figures(one) | {"times_one_pass": ratio(one, results)} for one in results.times],
    }


def _figures(one: Measurement) -> dict[str, Any]:
    return asdict(one) | {"documents": one.documents.title, "lengths": one.documents.lengths}


def _seconds(one: Measurement, results: Results) -> str:
    if not one.seconds:
        return NONE
    median, times = statistics.median(one.seconds), ratio(one, results)
    spread = (max(one.seconds) - min(one.seconds)) / median
    return f"{median:#.3g} ({NONE if times is None else f'{times:.2f} x'}; {spread:.0%})"


def _mebibytes(one: Measurement) -> str:
    if one.peak_bytes is not None:
        return f"{one.peak_bytes / MIB:,.0f}"
    return NONE if one.estimated_bytes is None else f"left out: {one.estimated_bytes / MIB:,.0f}?"


def _difference(one: Measurement) -> str:
    return NONE if one.difference is None else f"{one.difference['norm']:.1e}, {one.difference['largest']:.1e}"


def _reasons(results: Results) -> list[str]:
    """Why something is missing, each once."""
    measured = [*results.memory, *results.times, *results.gradients]
    lines = [
        f"- {WAYS[one.way].title}, dropout {one.dropout:g}, {one.documents.title}: {one.reason}"
        for one in measured
        if one.reason
    ]
    return ["\n".join(["Left out:", *dict.fromkeys(lines)])] if lines else []
