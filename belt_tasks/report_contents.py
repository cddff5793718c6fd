"""Report contents: the words, numbers and pictures of a run's pages, as values for their templates."""

import json
from collections.abc import Iterator
from typing import Any

import polars as pl

from belt_tasks import drift, report_pictures
from belt_tasks.drift import DriftReport
from belt_tasks.examples import NUM_LABELS, NUM_PASSAGES, RejectedRows
from belt_tasks.publishing import Manifest
from belt_tasks.receipts import STAGES
from belt_tasks.statistics import RunStatistics
from data_contracts import loader

MOST_LABELS = 50  # rows of the table of labels
MOST_SOURCES = 100  # pairs of file and reason
ORIGIN = (
    "corpus_uri",
    "output_uri",
    "checkpoint_uri",
    "checkpoint_digest",
    "scoring_fingerprint",
    "base_run_id",
    "device",
    "precision",
    "belt_version",
    "torch_version",
    "transformers_version",
)


def of_report(
    manifest: Manifest,
    counted: RunStatistics,
    compared: RunStatistics | None,
    found: DriftReport | None,
    *,
    evidence: list[dict[str, str | float | None]],
    history: pl.DataFrame,
) -> dict[str, Any]:
    """What the report shows.

    Args:
        manifest: of the run.
        counted: its statistics.
        compared: those of the reference.
        found: how far the two are apart.
        evidence: of `examples.top_evidence`.
        history: of `examples.last_runs`.
    """
    run = manifest.run
    other = compared if compared is not None and compared.run_ids != counted.run_ids else None
    labels = [] if counted.is_regression else report_pictures.label_shares(counted, compared)
    return {
        "run": run,
        "verdict": _verdict(compared, found),
        "compared": _compared(compared, counted),
        "drift": found,
        "figures": _figures(run, counted),
        "pictures": report_pictures.of_predictions(counted, other) if counted.num_documents else [],
        "labels": labels[:MOST_LABELS],
        "num_labels_left_out": len(labels[MOST_LABELS:]),
        "evidence": evidence,
        "evidence_is_of_some": len(counted.labels) > NUM_LABELS,
        "num_passages": NUM_PASSAGES,
        "has_texts": any(row["text"] is not None for row in evidence),
        "rejected": report_pictures.of_rejected(manifest.rejected_by_reason),
        "costs": report_pictures.of_runs(history),
        "stages": [_stage(run, stage) for stage in STAGES],
        "cost": _cost(run),
        "origin": [(name.replace("_", " "), run.get(name) or "none") for name in ORIGIN],
        "spec": list(_flat(json.loads(run["spec"]))),
    }


def of_quality(run: dict[str, Any], rejected: RejectedRows, refusal: str | None = None) -> dict[str, Any]:
    """What the page of rejected rows shows.

    Args:
        run: run_id, output_uri, belt_version and finished_at at least.
        rejected: of `examples.rejected_rows`.
        refusal: why the run published nothing; None where it did.
    """
    (column,) = (column for column in loader.columns("rejected") if column.name == "reason")
    meanings = {str(choice.value): choice.description for choice in column.enum or []}
    return {
        "run": run,
        "refusal": refusal,
        "rejected": rejected,
        "reasons": [row | {"meaning": meanings[row["reason"]]} for row in rejected.by_reason.to_dicts()],
        "sources": rejected.by_source.head(MOST_SOURCES).to_dicts(),
        "num_sources_left_out": max(0, len(rejected.by_source) - MOST_SOURCES),
        "rows": rejected.rows.to_dicts(),
        "num_rows_left_out": rejected.num_rows - len(rejected.rows),
    }


def labels_by_count(counted: RunStatistics) -> tuple[str, ...]:
    """The labels, the commonest first."""
    return tuple(name for name, _ in sorted(zip(counted.labels, counted.label_counts, strict=True), key=_most_first))


def _most_first(label: tuple[str, int]) -> int:
    return -label[1]


def _verdict(compared: RunStatistics | None, found: DriftReport | None) -> dict[str, str]:
    if found is not None:
        tones = {"none": "good", "drifted": "bad", "too_few_documents": ""}
        return {"tone": tones[found.verdict], "words": found.words}
    return {"tone": "", "words": drift.WITHOUT_REFERENCE if compared is None else drift.OF_REFERENCE}


def _compared(compared: RunStatistics | None, counted: RunStatistics) -> str:
    if compared is None:
        return (
            "The reference is made when all documents of the corpus have been scored once by these rules: this "
            "checkpoint with these windows, pooling, precision and threshold."
        )
    if compared.run_ids == counted.run_ids:
        return "Later runs by the same rules are compared with this one."
    runs = ", ".join(compared.run_ids[:3]) + (", ..." if len(compared.run_ids) > 3 else "")  # noqa: PLR2004 - enough
    part = "of which this run was a step" if set(counted.run_ids) <= set(compared.run_ids) else ""
    return (
        f"The reference is the first whole scoring by the same rules{part and f', {part}'}: "
        f"{compared.num_documents:,} documents (run {runs}), against {counted.num_documents:,} of this run."
    )


def _figures(run: dict[str, Any], counted: RunStatistics) -> list[dict[str, str]]:
    changes = ""
    if run.get("num_new") is not None:
        changes = ", ".join(f"{run[f'num_{name}']:,} {name}" for name in ("new", "changed", "unchanged", "removed"))
    unknown, read = counted.unknown_share, run["num_tokens_scored"] / run["num_tokens"] if run["num_tokens"] else None
    speed = run["tokens_per_s"]
    return [
        {"name": "documents scored", "value": f"{run['num_documents']:,}", "more": changes},
        {"name": "rejected rows", "value": f"{run['num_rejected']:,}", "more": ""},
        {
            "name": "content tokens",
            "value": f"{run['num_tokens']:,}",
            "more": "" if read is None else f"{read:.1%} of them read",
        },
        {"name": "unknown tokens", "value": "not known" if unknown is None else f"{unknown:.2%}", "more": ""},
        {"name": "wall clock", "value": _duration(run["elapsed_s"]), "more": ""},
        {"name": "tokens per second", "value": "none encoded" if speed is None else f"{speed:,.0f}", "more": ""},
    ]


def _stage(run: dict[str, Any], stage: str) -> dict[str, Any]:
    seconds = run[f"{stage}_s"]
    rate = run["tokens_per_s"] if stage == "encode" else run["num_tokens"] / seconds if seconds else None
    return {"name": stage, "seconds": seconds, "rate": rate}


def _cost(run: dict[str, Any]) -> list[tuple[str, str | None]]:
    flops, peak = run["flops_per_s"], run["peak_share"]
    arithmetic = (
        None if flops is None else f"{flops / 1e9:,.0f} GFLOP/s" + (f", {peak:.1%} of the peak" if peak else "")
    )
    return [
        ("wall clock", _duration(run["elapsed_s"])),
        ("chunks", f"{run['num_chunks']:,}"),
        ("redundant chunks", _share(run["redundant_chunk_share"])),
        ("padding", _share(run["padding_share"])),
        ("documents whose text was encoded already", f"{run['num_documents_reused']:,}"),
        ("arithmetic that the scores need", arithmetic),
        ("shards", f"{run['num_shards']:,}"),
    ]


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.1%}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _flat(spec: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in spec.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, "none" if value is None else json.dumps(value).strip('"')
