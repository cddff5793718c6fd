"""The report: figures of each peer from its rounds, as Markdown and as JSON."""

import platform
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from tests.benchmarks.peers import PEERS, REFERENCE
from tests.benchmarks.protocol import Precision
from tests.benchmarks.rounds import Outcome

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")
BELT: dict[Precision, str] = {"fp32": "belt", "bf16": "belt-bf16"}
NONE = "-"
BUSY = 0.1  # share of the machine's time, from which it is worth a word
HEADER = (
    "peer",
    "documents/s",
    "chunk tokens/s",
    "belt fp32 is",
    "belt bf16 is",
    "of the limit",
    "largest difference",
    "peak memory",
    "spread",
    "note",
)
LEGEND = """\
"belt is": how many times as fast as the peer. "of the limit": operations that the model needs, per second, as a share
of the most that this machine reached with nothing but matrix products of the model's shapes in the same precision.
"largest difference": in any probability, against the overflow loop. "peak memory": of the peer's own process in any
round. "spread": slowest minus fastest round, as a share of the median."""

Ceilings = Sequence[dict[str, float | None]]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a peer was asked to do with a corpus."""

    num_documents: int
    num_chunks: int
    num_content_tokens: int
    """Of all windows: what overlaps counts as often as it is read."""
    needed_flops: float | None
    """None where the config does not say."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; None where there is no such figure."""

    peer: str
    title: str
    precision: Precision
    note: str = ""
    less_work: bool = False
    configuration: str = ""
    """The fastest on the probe, of a peer that has several."""
    reason: str | None = None
    """Why there are no figures."""
    seconds: float | None = None
    """Median of the rounds."""
    documents_per_s: float | None = None
    tokens_per_s: float | None = None
    belt_ratio: dict[str, float | None]
    """How many times as fast belt is, by belt's precision."""
    of_limit: float | None = None
    """Needed operations per second, as a share of what the machine can do in this precision."""
    largest_difference: float | None = None
    peak_rss_bytes: int | None = None
    spread: float | None = None


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One corpus with one way to cut it, scored by all."""

    title: str
    outcomes: list[Outcome]
    asked: dict[str, Asked]
    """By peer."""
    ceilings: Ceilings
    """Operations per second by precision, of each round."""

    def rows(self) -> list[Row]:
        """The table."""
        medians = {
            outcome.peer: statistics.median(outcome.seconds)
            for outcome in self.outcomes
            if outcome.reason is None and outcome.seconds
        }
        return [self._row(outcome, medians) for outcome in self.outcomes]

    def limit(self, precision: str) -> float | None:
        """The most operations per second in a precision that any round saw; None where it was not measured."""
        return max((value for ceiling in self.ceilings if (value := ceiling.get(precision)) is not None), default=None)

    def _row(self, outcome: Outcome, medians: dict[str, float]) -> Row:
        peer, asked = PEERS[outcome.peer], self.asked[outcome.peer]
        common: dict[str, Any] = {
            "peer": outcome.peer,
            "title": peer.title,
            "precision": peer.precision,
            "note": peer.note,
            "less_work": peer.first_window_only,
            "configuration": outcome.configuration,
        }
        if outcome.peer not in medians:
            reason = outcome.reason or "no round was run"
            return Row(**common, reason=reason, belt_ratio=dict.fromkeys(BELT))
        seconds, flops_per_s = medians[outcome.peer], self.limit(peer.precision)
        return Row(
            **common,
            seconds=seconds,
            documents_per_s=asked.num_documents / seconds,
            tokens_per_s=asked.num_content_tokens / seconds,
            belt_ratio={name: seconds / medians[belt] if belt in medians else None for name, belt in BELT.items()},
            of_limit=asked.needed_flops / seconds / flops_per_s if asked.needed_flops and flops_per_s else None,
            largest_difference=outcome.largest_difference,
            peak_rss_bytes=max(outcome.peak_rss_bytes),
            spread=(max(outcome.seconds) - min(outcome.seconds)) / seconds,
        )


def markdown(scored: Sequence[Scored], machine: dict[str, Any]) -> str:
    """The whole report."""
    flags = ", ".join(machine["flags"]) or "no known vector flags"
    parts = [f"{machine['cpu']}, {machine['cores']} cores ({flags})"]
    if machine["busy"] > BUSY:
        parts.append(
            f"**Other programs kept {machine['busy']:.0%} of this machine busy before the start**: figures are too "
            "low, and ratios unsteady."
        )
    for one in scored:
        rows = one.rows()
        most = max(one.asked.values(), key=lambda asked: asked.num_chunks)
        counted = f"{most.num_documents:,} documents, {most.num_chunks:,} chunks, {most.num_content_tokens:,} tokens"
        limits = [f"{value / 1e9:,.0f} GFLOP/s in {name}" for name in BELT if (value := one.limit(name))]
        parts += [f"## {one.title}", f"{counted}; limit of this machine: {', '.join(limits) or 'not measured'}"]
        parts.append(table(rows))
        remarks = [f"- {row.title}: no result: {row.reason}" for row in rows if row.reason is not None]
        remarks += [
            f"- {row.title}: fastest on the probe with {row.configuration}" for row in rows if row.configuration
        ]
        if not any(row.peer == REFERENCE and row.reason is None for row in rows):
            remarks.append(f"- nothing to compare probabilities with: {REFERENCE} did not run")
        parts += ["\n".join(remarks)] if remarks else []
    return "\n\n".join([*parts, LEGEND])


def table(rows: Sequence[Row]) -> str:
    """Rows in Markdown, aligned so that it reads well in a terminal too; columns without a figure are left out."""
    cells = [HEADER, *map(_cells, rows)]
    used = [i for i in range(len(HEADER)) if any(line[i] not in (NONE, "") for line in cells[1:])]
    width = {i: max(len(line[i]) for line in cells) for i in used}
    left = {0, len(HEADER) - 1}

    def line(values: Sequence[str]) -> str:
        padded = [values[i].ljust(width[i]) if i in left else values[i].rjust(width[i]) for i in used]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width[i] if i in left else "-" * (width[i] - 1) + ":" for i in used]
    return "\n".join([line(HEADER), f"| {' | '.join(rule)} |", *map(line, cells[1:])])


def _cells(row: Row) -> tuple[str, ...]:
    if row.reason is not None:
        return (row.title, *[NONE] * (len(HEADER) - 2), "no result, see below")
    return (
        row.title,
        rate(row.documents_per_s),
        rate(row.tokens_per_s),
        *[_written(row.belt_ratio[name], "{:.2f} x") for name in BELT],
        _written(row.of_limit, "{:.0%}"),
        "reference" if row.peer == REFERENCE else _written(row.largest_difference, "{:.1e}"),
        NONE if row.peak_rss_bytes is None else f"{row.peak_rss_bytes / 1e6:,.0f} MB",
        _written(row.spread, "{:.0%}"),
        row.note,
    )


def rate(value: float | None) -> str:
    """Something per second: three digits, or all before the point."""
    return NONE if value is None else f"{value:,.0f}" if round(value) >= 100 else f"{value:#.3g}"


def _written(value: float | None, form: str) -> str:
    return NONE if value is None else form.format(value)


def machine(num_threads: int, *, busy: float) -> dict[str, Any]:
    """What the figures depend on besides the software; `busy` is the share of its time that others had."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.*)$", text, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    return {
        "cpu": model[1].strip() if model else platform.processor() or platform.machine(),
        "cores": num_threads,
        "busy": busy,
        "flags": [flag for flag in FLAGS if flag in present],
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Every installed distribution."""
    return dict(sorted((str(found.metadata["Name"]), found.version) for found in distributions()))


def figures(one: Scored) -> dict[str, Any]:
    """Every figure of a corpus: what is in the table, and what it was made of."""
    peers = [
        asdict(row) | {"asked": asdict(one.asked[row.peer]), "rounds": asdict(outcome)}
        for row, outcome in zip(one.rows(), one.outcomes, strict=True)
    ]
    return {"title": one.title, "ceilings_flops_per_s": list(one.ceilings), "peers": peers}
