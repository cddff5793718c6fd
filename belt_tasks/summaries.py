"""Summaries: what a run did, as Markdown for people. The same text is a Prefect artifact and the CLI's last words."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from belt_tasks import markdown, storage
from belt_tasks.clean import Cleaned
from belt_tasks.demo import ReadBack
from belt_tasks.errors import RejectedError
from belt_tasks.evaluation import EvaluationReceipt
from belt_tasks.fine_tuning import FineTuningReceipt
from belt_tasks.maintenance import TableCheck
from belt_tasks.preview import ScorePreview
from belt_tasks.publishing import Manifest
from belt_tasks.receipts import STAGES
from belt_tasks.report import ScoreReport
from belt_tasks.run_list import RunSummary
from belt_tasks.specs import ChunkSpec


def run_summary(
    manifest: Manifest,
    *,
    asked_at: datetime,
    earlier_steps: Sequence[Manifest] = (),
    report: ScoreReport | None = None,
    links: Mapping[str, str] | None = None,
) -> str:
    """Counts, rejected rows with reasons, cost by stage, and where everything is.

    Args:
        manifest: of the run.
        asked_at: when the caller asked for it; a run that had finished before was not done again.
        earlier_steps: the runs before this one that published parts of the same corpus.
        report: of a scoring run.
        links: addresses under which some of the files named can be opened in a browser, by URI.
    """
    run = manifest.run
    reused = datetime.fromisoformat(run["finished_at"]) < asked_at
    lines = [
        f"## {run['flow']}: {run['num_documents']:,} documents, run {run['run_id']}",
        "",
        *([_reused(run), ""] if reused else []),
        *markdown.table(
            ["", ""],
            [
                ["documents", f"{run['num_documents']:,}"],
                *_changes(run),
                ["rejected rows", markdown.rejected(run["num_rejected"], manifest.rejected_by_reason)],
                ["content tokens", _tokens(run)],
                *([["chunks", _chunks(run)]] if run["num_chunks"] else []),
                *_cost(run),
                ["shards", f"{run['num_shards']:,}"],
                ["wall clock", markdown.seconds(run["elapsed_s"])],
                *_steps([*earlier_steps, manifest]),
            ],
        ),
        "",
        *markdown.table(
            ["stage", "seconds", "tokens per second"],
            [
                [stage, markdown.seconds(run[f"{stage}_s"]), _rate(run, stage)]
                for stage in STAGES
                if run[f"{stage}_s"] > 0
            ],
        ),
        "",
        *([] if report is None else [f"{report.verdict}.", ""]),
        f"- output: `{run['output_uri']}`",
        *([] if report is None else _pages(report, links)),
        f"- run: {markdown.link(_run_uri(run))}",
        f"- manifest: `{storage.join(_run_uri(run), 'manifest.json')}`",
    ]
    tables = sorted({file.table for file in manifest.files})
    if run["flow"] == "score":
        shows_evidence = json.loads(run["spec"]).get("evidence", "none") != "none"
        tables = ["predictions", *(["evidence"] if shows_evidence else []), "rejected", "runs"]
        lines += [f"- {table}: {markdown.link(_table_uri(run, table))} (Delta Lake)" for table in tables]
    else:
        lines += [f"- {table}: `{place}`" for table in tables for place in _places(manifest, table)]
    return "\n".join(lines) + "\n"


def report_summary(report: ScoreReport) -> str:
    """The verdict on drift, and where a run's report is."""
    return "\n".join([f"## report of run {report.run.run_id}", "", f"{report.verdict}.", "", *_pages(report)]) + "\n"


def refusal_summary(error: RejectedError, links: Mapping[str, str] | None = None) -> str:
    """Why a run was refused, and where its rejected rows are.

    Args:
        error: what refused it.
        links: as of `run_summary`.
    """
    lines = ["## Refused", "", f"{error}.", "", f"- data quality: {markdown.link(error.quality_uri, links)}"]
    return "\n".join(lines) + "\n"


def preview_summary(found: ScorePreview) -> str:
    """What a scoring would do, in the words of `run_summary`."""
    counts = found.counts
    unit = f"{found.num_documents_to_score:,}, about {found.num_tokens_to_score:,} tokens"
    lines = [
        "## score: what it would do",
        "",
        *markdown.table(
            ["", ""],
            [
                ["files", f"{found.num_files:,}, of which {found.num_files_read:,} have changed or are scored again"],
                ["new documents", markdown.count(counts.num_new)],
                ["changed documents", markdown.count(counts.num_changed)],
                ["unchanged documents", markdown.count(counts.num_unchanged)],
                ["removed documents", markdown.count(counts.num_removed)],
                ["rejected rows in the files to read", markdown.rejected(found.num_rejected, found.rejected_by_reason)],
                ["documents to score", unit],
                ["estimated time of the model", markdown.seconds(found.estimated_s)],
            ],
        ),
    ]
    if found.is_refused:
        share = found.num_rejected / found.num_rows_read
        words = (
            f"Nothing would be published: {share:.1%} of {found.num_rows_read:,} rows would be rejected, more than "
            f"max_rejected_share allows ({found.max_rejected_share:.1%})."
        )
        lines += ["", words]
    return "\n".join(lines) + "\n"


def runs_summary(runs: Sequence[RunSummary]) -> str:
    """The runs of an output, one a line."""
    rows = [
        [
            run.run_id,
            f"{run.state} (a step)" if run.is_step else run.state,
            run.flow or "",
            "" if run.started_at is None else f"{run.started_at:%Y-%m-%d %H:%M}",
            markdown.count(run.num_shards)
            if run.num_shards_planned is None
            else f"{run.num_shards:,} of {run.num_shards_planned:,}",
            *("" if number is None else markdown.count(number) for number in (run.num_documents, run.num_rejected)),
            "" if run.elapsed_s is None else markdown.seconds(run.elapsed_s),
            "" if run.tokens_per_s is None else f"{run.tokens_per_s:,.0f}",
        ]
        for run in runs
    ]
    header = [
        "run",
        "state",
        "flow",
        "started (UTC)",
        "shards",
        "documents",
        "rejected",
        "wall clock",
        "tokens per second",
    ]
    reasons = [f"- {run.run_id}: {run.reason}" for run in runs if run.reason is not None]
    return "\n".join([*markdown.table(header, rows), *(["", *reasons] if reasons else [])]) + "\n"


def clean_summary(done: Cleaned, *, dry_run: bool = False) -> str:
    """What was removed, or would be, part by part."""
    verb = "Would remove" if dry_run else "Removed"
    runs_left = f"{done.num_unfinished_runs:,} runs that were never shown"
    told = f"{verb} {done.num_files:,} files ({done.num_bytes / 1e6:,.1f} MB), among them {runs_left}."
    parts = [f"- {part.what}: {part.num_files:,} files, {part.num_bytes / 1e6:,.1f} MB" for part in done.parts]
    return "\n".join([told, *(["", *parts] if parts else [])]) + "\n"


def checks_summary(checks: Sequence[TableCheck]) -> str:
    """How much of which table satisfies its contract."""
    rows = [[check.table, markdown.count(check.num_files), markdown.count(check.num_rows)] for check in checks]
    return (
        "\n".join(["Every row satisfies its contract:", "", *markdown.table(["table", "files", "rows"], rows)]) + "\n"
    )


def demo_summary(
    *,
    fine_tuning_run: Manifest,
    fine_tuning: FineTuningReceipt,
    evaluation_run: Manifest,
    evaluation: EvaluationReceipt,
    scoring_run: Manifest,
    read_back: ReadBack,
) -> str:
    """The demo on one screen: what each stage did and cost, how good it is, and where to look."""
    prepared, scored = fine_tuning_run.run, scoring_run.run
    prepare_s = sum(prepared[f"{stage}_s"] for stage in ("read", "tokenize", "write"))
    rejected = markdown.rejected(scored["num_rejected"], scoring_run.rejected_by_reason)
    rows = [
        [
            "prepare",
            markdown.count(prepared["num_documents"]),
            "",
            markdown.seconds(prepare_s),
            f"{_rate(prepared, 'tokenize')}",
        ]
    ]
    for name, run in (
        (f"fine-tune, {len(fine_tuning.epochs)} epochs", prepared),
        ("evaluate", evaluation_run.run),
        ("score", scored),
    ):
        cost = [markdown.seconds(run["encode_s"]), _rate(run, "encode")]
        rows.append([name, markdown.count(run["num_documents"]), markdown.count(run["num_chunks"]), *cost])
    rows.append(["publish", markdown.count(scored["num_documents"]), "", markdown.seconds(scored["write_s"]), ""])
    measured = evaluation.metrics
    predictions = _table_uri(scored, "predictions")
    model, limits = prepared["output_uri"], " and ".join(_limits(prepared))
    query = f"import polars as pl; print(pl.read_delta('{predictions}'))"
    return "\n".join(
        [
            "## belt demo: which library is a docstring from?",
            "",
            *markdown.table(["stage", "documents", "chunks", "seconds", "tokens per second"], rows),
            "",
            f"- accuracy on the test split: **{measured['accuracy']:.3f}** ({measured['num_documents']} documents)",
            f"- accuracy of always guessing the commonest label: {measured['majority_baseline_accuracy']:.3f}",
            f"- rejected rows: {rejected}, broken on purpose",
            f"- read back: polars found {read_back.polars_rows:,} predictions, DuckDB {read_back.duckdb_rows:,}",
            "",
            "By label, as DuckDB reads it:",
            "",
            *markdown.table(
                ["label", "documents", "mean score"],
                [
                    [markdown.label(label), markdown.count(count), f"{mean:.3f}"]
                    for label, count, mean in read_back.labels
                ],
            ),
            "",
            "The longest documents, as polars reads them; BERT alone would see the first 510 tokens:",
            "",
            *markdown.table(
                ["doc_id", "label", "score", "tokens", "chunks"],
                [
                    [
                        markdown.label(doc_id),
                        markdown.label(label),
                        f"{score:.3f}",
                        markdown.count(num_tokens),
                        markdown.count(num_chunks),
                    ]
                    for doc_id, label, score, num_tokens, num_chunks in read_back.longest
                ],
            ),
            "",
            "Where everything is:",
            "",
            f"- corpus: `{scored['corpus_uri']}`",
            f"- model: `{model}`, to give to `belt score --checkpoint`",
            f"- metrics: `{evaluation.metrics_uri}`",
            *[f"- plot: `{uri}`" for uri in evaluation.plot_uris],
            f"- predictions: `{predictions}`",
            f"- evidence: `{_table_uri(scored, 'evidence')}`",
            f"- rejected rows: `{_table_uri(scored, 'rejected')}`",
            f"- report: `{storage.join(_run_uri(scored), 'report', 'index.html')}`",
            "",
            "To look at the predictions:",
            "",
            f'    .venv/bin/python -c "{query}"',
            "",
            f"The model was trained quickly, with {limits}, and scores so too unless told otherwise. As above:",
            "",
            f"    .venv/bin/belt score CORPUS --output DIR --checkpoint {model} --maximal-text-length none",
            "",
        ]
    )


def _tokens(run: dict[str, Any]) -> str:
    if run["num_tokens"] == 0 or run["num_chunks"] == 0:
        return f"{run['num_tokens']:,}"
    limits = ", ".join(_limits(run))
    share = f"{run['num_tokens_scored'] / run['num_tokens']:.1%} of them in a chunk"
    return f"{run['num_tokens']:,}, {share}{limits and f' ({limits})'}"


def _limits(run: dict[str, Any]) -> list[str]:
    """The settings of a run that leave tokens unread, in words."""
    spec = json.loads(run["spec"])
    chunks = ChunkSpec.model_validate(spec.get("chunks", spec))
    return [
        *([] if chunks.selection == "all" else [f"selection {chunks.selection}"]),
        *([] if chunks.maximal_text_length is None else [f"maximal_text_length {chunks.maximal_text_length:,}"]),
        *([] if chunks.minimal_chunk_length <= 1 else [f"minimal_chunk_length {chunks.minimal_chunk_length:,}"]),
    ]


def _chunks(run: dict[str, Any]) -> str:
    redundant = run["redundant_chunk_share"]
    return markdown.count(run["num_chunks"]) + (f", {redundant:.1%} of them redundant" if redundant else "")


def _reused(run: dict[str, Any]) -> str:
    if run["flow"] == "score":
        return f"Nothing has changed since run {run['run_id']}, so nothing was scored. What that run did:"
    return "This run was complete already: nothing was done again."


def _steps(manifests: Sequence[Manifest]) -> list[list[str]]:
    """What the steps of a night did together."""
    if len(manifests) == 1:
        return []
    runs = [manifest.run for manifest in manifests]
    documents, rejected, seconds = (
        sum(run[name] for run in runs) for name in ("num_documents", "num_rejected", "elapsed_s")
    )
    words = f"{documents:,} documents, {rejected:,} rejected rows, {markdown.seconds(seconds)}"
    return [[f"in all {len(runs)} steps", words]]


def _changes(run: dict[str, Any]) -> list[list[str]]:
    if run["num_new"] is None:
        return []
    words = [f"{name} {run[f'num_{name}']:,}" for name in ("new", "changed", "unchanged", "removed")]
    if run["num_documents"] > run["num_new"] + run["num_changed"]:
        words[2] += " (some of them scored again)"
    base = "" if run["base_run_id"] is None else f", since run {run['base_run_id']}"
    return [["of the corpus", ", ".join(words) + base]]


def _cost(run: dict[str, Any]) -> list[list[str]]:
    rows = []
    if run["num_documents_reused"]:
        rows.append(["documents whose text was encoded already", markdown.count(run["num_documents_reused"])])
    if run["padding_share"] is not None:
        rows.append(["padding", f"{run['padding_share']:.1%} of what was computed"])
    if run["flops_per_s"] is not None:
        share = "" if run["peak_share"] is None else f", {run['peak_share']:.1%} of its peak"
        speed = f"{run['flops_per_s'] / 1e9:,.0f} GFLOP/s in {run['precision']} on {run['device']}{share}"
        rows.append(["arithmetic that the scores need", speed])
    return rows


def _rate(run: dict[str, Any], stage: str) -> str:
    if stage == "encode":
        return f"{run['tokens_per_s']:,.0f}" if run["tokens_per_s"] else ""
    return f"{run['num_tokens'] / run[f'{stage}_s']:,.0f}" if run["num_tokens"] else ""


def _pages(report: ScoreReport, links: Mapping[str, str] | None = None) -> list[str]:
    return [
        f"- report: {markdown.link(report.report_uri, links)}",
        f"- data quality: {markdown.link(report.quality_uri, links)}",
        f"- statistics: `{report.statistics_uri}`",
    ]


def _run_uri(run: dict[str, Any]) -> str:
    return storage.join(run["output_uri"], "runs", run["run_id"])


def _places(manifest: Manifest, table: str) -> list[str]:
    """The files of a run's table, as globs; those of a fine-tuning may be shared with other runs."""
    folders = {file.path.rpartition("/")[0] for file in manifest.files if file.table == table}
    return [storage.join(manifest.run["output_uri"], folder, "*.parquet") for folder in sorted(folders)]


def _table_uri(run: dict[str, Any], table: str) -> str:
    return storage.join(run["output_uri"], "tables", table)
