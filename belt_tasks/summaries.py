"""Summaries: what a run did, as Markdown for people. The same text is a Prefect artifact and the CLI's last words."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote

from belt_tasks import length_words, metrics, pages, storage
from belt_tasks.clean import Cleaned
from belt_tasks.demo import ReadBack
from belt_tasks.errors import RejectedError
from belt_tasks.evaluation import EvaluationReceipt
from belt_tasks.fine_tuning import FineTuningReceipt
from belt_tasks.gate import DecisionRecord
from belt_tasks.import_belt_nlp import Imported
from belt_tasks.length_comparison import LengthGroup, LengthReport
from belt_tasks.maintenance import TableCheck
from belt_tasks.model_store import ModelList
from belt_tasks.preview import ScorePreview
from belt_tasks.promotion import Promotion
from belt_tasks.publishing import Manifest
from belt_tasks.receipts import STAGES
from belt_tasks.registry import Entry
from belt_tasks.report import ScoreReport
from belt_tasks.resampling import METRICS
from belt_tasks.run_list import RunSummary
from belt_tasks.specs import ChunkSpec

MOST_CHARACTERS = 80  # of a label
NUM_LABELS = 10  # named
MEASURED_BY = {"ece": "expected calibration error", "log_loss": "log loss"}


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
        *_table(
            ["", ""],
            [
                ["documents", f"{run['num_documents']:,}"],
                *_changes(run),
                ["rejected rows", _rejected(run["num_rejected"], manifest.rejected_by_reason)],
                ["content tokens", _tokens(run)],
                *([["chunks", _chunks(run)]] if run["num_chunks"] else []),
                *_cost(run),
                ["shards", f"{run['num_shards']:,}"],
                ["wall clock", _seconds(run["elapsed_s"])],
                *_steps([*earlier_steps, manifest]),
            ],
        ),
        "",
        *_table(
            ["stage", "seconds", "tokens per second"],
            [[stage, _seconds(run[f"{stage}_s"]), _rate(run, stage)] for stage in STAGES if run[f"{stage}_s"] > 0],
        ),
        "",
        *([] if report is None else [f"{report.verdict}.", ""]),
        f"- output: `{run['output_uri']}`",
        *([] if report is None else _pages(report, links)),
        f"- run: {_link(_run_uri(run))}",
        f"- manifest: `{storage.join(_run_uri(run), 'manifest.json')}`",
    ]
    tables = sorted({file.table for file in manifest.files})
    if run["flow"] == "score":
        shows_evidence = json.loads(run["spec"]).get("evidence", "none") != "none"
        tables = ["predictions", *(["evidence"] if shows_evidence else []), "rejected", "runs"]
        lines += [f"- {table}: {_link(_table_uri(run, table))} (Delta Lake)" for table in tables]
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
    lines = ["## Refused", "", f"{error}.", "", f"- data quality: {_link(error.quality_uri, links)}"]
    return "\n".join(lines) + "\n"


def preview_summary(found: ScorePreview) -> str:
    """What a scoring would do, in the words of `run_summary`."""
    counts = found.counts
    unit = f"{found.num_documents_to_score:,}, about {found.num_tokens_to_score:,} tokens"
    lines = [
        "## score: what it would do",
        "",
        *_table(
            ["", ""],
            [
                ["files", f"{found.num_files:,}, of which {found.num_files_read:,} have changed or are scored again"],
                ["new documents", _count(counts.num_new)],
                ["changed documents", _count(counts.num_changed)],
                ["unchanged documents", _count(counts.num_unchanged)],
                ["removed documents", _count(counts.num_removed)],
                ["rejected rows in the files to read", _rejected(found.num_rejected, found.rejected_by_reason)],
                ["documents to score", unit],
                ["estimated time of the model", _seconds(found.estimated_s)],
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


def fine_tuning_summary(receipt: FineTuningReceipt) -> str:
    """Losses and metrics by epoch, cost, and where the checkpoint is."""
    rows = []
    for epoch in receipt.epochs:
        validation = epoch.validation or {}
        shown = [_number(validation.get(name)) for name in ("loss", METRICS[receipt.task][0])]
        best = " (kept)" if epoch.number == receipt.best_epoch else ""
        rows.append([f"{epoch.number}{best}", _number(epoch.training_loss), *shown])
    rate = receipt.num_tokens_encoded * len(receipt.epochs) / receipt.training_s
    labels = ", ".join(map(_label, receipt.labels[:NUM_LABELS])) + (", ..." if len(receipt.labels) > NUM_LABELS else "")
    return "\n".join(
        [
            f"## fine-tuning: {receipt.task} ({labels})",
            "",
            *_table(["epoch", "training loss", "validation loss", METRICS[receipt.task][0]], rows),
            "",
            f"- trained on {receipt.num_training_documents:,} documents, {receipt.num_validation_documents:,} held out",
            *_calibration(receipt),
            *_lonely(receipt),
            f"- {receipt.num_chunks:,} chunks",
            f"- {_seconds(receipt.training_s)}, {rate:,.0f} tokens per second",
            *_taken_up(receipt),
            *([] if receipt.curves_uri is None else [f"- learning curves: `{receipt.curves_uri}`"]),
            *([] if receipt.metrics_uri is None else [f"- every step and epoch: `{receipt.metrics_uri}`"]),
            f"- checkpoint: `{receipt.checkpoint_uri}`",
            "",
        ]
    )


def import_summary(imported: Imported) -> str:
    """What an imported model is, and whether its scores are those of belt-nlp."""
    card = imported.card
    labels = ", ".join(map(_label, card.head.labels))
    lines = [
        f"## imported: {card.head.task} ({labels})",
        "",
        f"- windows: {_settings(card.chunks)}",
        f"- pooling: {card.pooling.pooling_strategy} of logits",
        f"- checkpoint: `{imported.checkpoint_uri}`, digest {card.digest}",
    ]
    if imported.has_other_special_tokens:
        lines.append(
            "- belt-nlp put BERT's ids 101 and 102 around chunks, which are not this tokenizer's; belt puts its own "
            "there, so scores differ"
        )
    return "\n".join(lines) + "\n"


def _settings(chunks: ChunkSpec) -> str:
    """What is not the default, in words."""
    changed = chunks.model_dump(exclude_defaults=True)
    return ", ".join(f"{name} {value}" for name, value in changed.items()) or "the default"


def _taken_up(receipt: FineTuningReceipt) -> list[str]:
    if receipt.resumed_from_step is None:
        return []
    return [f"- an earlier attempt had ended; this one went on after its step {receipt.resumed_from_step:,}"]


def _lonely(receipt: FineTuningReceipt) -> list[str]:
    if not receipt.lonely_labels:
        return []
    names = ", ".join(map(_label, receipt.lonely_labels[:NUM_LABELS]))
    more = f" and {len(receipt.lonely_labels) - NUM_LABELS} more" if len(receipt.lonely_labels) > NUM_LABELS else ""
    return [f"- **labels with a single training document, which cannot be learned from it: {names}{more}**"]


def _calibration(receipt: FineTuningReceipt) -> list[str]:
    if receipt.calibration is None:
        return []
    before, after = receipt.metrics["uncalibrated"], receipt.metrics
    slopes = receipt.calibration.slope
    how = f"temperature {1 / slopes[0]:.2f}" if len(slopes) == 1 else "slope and offset of each label"
    changes = (f"{words} {before[name]:.3f} to {after[name]:.3f}" for name, words in MEASURED_BY.items())
    return [f"- calibrated on them ({how}): {', '.join(changes)}"]


def evaluation_summary(receipt: EvaluationReceipt) -> str:
    """The main metrics, and where all of them and the plots are."""
    measured = receipt.metrics
    rows = [[words, _number(measured[name])] for name, words in metrics.IN_WORDS.items() if name in measured]
    lines = [
        f"## evaluation: {measured['num_documents']:,} documents",
        "",
        *_table(["metric", "value"], rows),
        "",
    ]
    if receipt.rejected_by_reason:
        count = sum(receipt.rejected_by_reason.values())
        lines.append(f"- labels put aside: {_rejected(count, receipt.rejected_by_reason)}")
    lines += [f"- all metrics: `{receipt.metrics_uri}`", *[f"- plot: `{uri}`" for uri in receipt.plot_uris]]
    if receipt.length is not None:
        lines += ["", *_length(receipt.length)]
    return "\n".join(lines) + "\n"


def _length(report: LengthReport) -> list[str]:
    """Whether reading further pays: the answer, the main metric by length, and where all of it is."""
    confidence = f"{100 * report.spec.confidence:g} % CI"
    names = [length_words.SELECTIONS[reading.selection] for reading in report.readings]
    rows = []
    for group in (report.group("all"), *report.buckets):
        cells = ["too few"] * len(names) if group.is_too_small else _length_values(report, group)
        rows.append([length_words.group_name(group), _count(group.num_documents), *cells])
    costs = [
        [
            name,
            _count(each.num_tokens_encoded),
            _seconds(each.encode_s),
            length_words.trained_with(each),
            _said(each.checkpoint_uri),
        ]
        for name, each in zip(names, report.readings, strict=True)
    ]
    return [
        "## does reading further pay?",
        "",
        *(line for sentence in length_words.answer(report) for line in (_said(sentence), "")),
        *(line for sentence in length_words.caveats(report) for line in (f"**{_said(sentence)}**", "")),
        *_table(
            ["tokens", "documents", *(f"{name}: {metrics.IN_WORDS[report.metric]} ({confidence})" for name in names)],
            rows,
        ),
        "",
        *_table(["read", "tokens encoded", "encoder", "checkpoint fine-tuned with", "checkpoint"], costs),
        "",
        f"- length report: {_link(report.report_uri)}",
        f"- its numbers: `{report.table_uri}` (Parquet) and `{report.numbers_uri}`",
    ]


def _length_values(report: LengthReport, group: LengthGroup) -> list[str]:
    found = [report.row(group, reading.selection) for reading in report.readings]
    return [f"{length_words.number(row.metric, row.value)} ({length_words.interval(row)})" for row in found]


def runs_summary(runs: Sequence[RunSummary]) -> str:
    """The runs of an output, one a line."""
    rows = [
        [
            run.run_id,
            f"{run.state} (a step)" if run.is_step else run.state,
            run.flow or "",
            "" if run.started_at is None else f"{run.started_at:%Y-%m-%d %H:%M}",
            _count(run.num_shards)
            if run.num_shards_planned is None
            else f"{run.num_shards:,} of {run.num_shards_planned:,}",
            *("" if number is None else _count(number) for number in (run.num_documents, run.num_rejected)),
            "" if run.elapsed_s is None else _seconds(run.elapsed_s),
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
    return "\n".join([*_table(header, rows), *(["", *reasons] if reasons else [])]) + "\n"


def clean_summary(done: Cleaned, *, dry_run: bool = False) -> str:
    """What was removed, or would be, part by part."""
    verb = "Would remove" if dry_run else "Removed"
    runs_left = f"{done.num_unfinished_runs:,} runs that were never shown"
    told = f"{verb} {done.num_files:,} files ({done.num_bytes / 1e6:,.1f} MB), among them {runs_left}."
    parts = [f"- {part.what}: {part.num_files:,} files, {part.num_bytes / 1e6:,.1f} MB" for part in done.parts]
    return "\n".join([told, *(["", *parts] if parts else [])]) + "\n"


def checks_summary(checks: Sequence[TableCheck]) -> str:
    """How much of which table satisfies its contract."""
    rows = [[check.table, _count(check.num_files), _count(check.num_rows)] for check in checks]
    return "\n".join(["Every row satisfies its contract:", "", *_table(["table", "files", "rows"], rows)]) + "\n"


def decision_summary(record: DecisionRecord) -> str:
    """What was decided on a challenger, and on what it rests."""
    numbers = [
        [words, _number(record.champion_metrics.get(name)), _number(record.challenger_metrics[name])]
        for name, words in metrics.IN_WORDS.items()
        if name in record.challenger_metrics
    ]
    marks = {True: "passed", False: "**not passed**", None: "could not be measured"}
    checks = [
        [
            check.name + (f" of {_label(check.label)}" if check.label else ""),
            *(
                f"{value:,.0f}" if check.name == "documents" else _number(value)
                for value in (check.number, check.limit)
            ),
            "not passed, may be chance" if check.may_be_chance else marks[check.passed],
        ]
        for check in record.checks
    ]
    lines = [
        f"## {record.decision}: {record.num_documents:,} held-out documents",
        "",
        _said(f"{record.why[0].upper()}{record.why[1:]}."),
        "",
        *_table(["metric", "champion", "challenger"], numbers),
        "",
        *_table(["check", "measured", "limit", ""], checks),
        "",
        f"- champion: {'none' if record.champion_digest is None else f'`{record.champion_digest}`'}",
        f"- challenger: `{record.challenger_digest}`",
        f"- corpus: `{record.corpus_uri}`",
        f"- decision: `{record.id}`",
    ]
    if record.labels_without_documents:
        lines.append(f"- labels without held-out documents: {', '.join(map(_label, record.labels_without_documents))}")
    return "\n".join(lines) + "\n"


def promotion_summary(promotion: Promotion) -> str:
    """What became of a challenger."""
    words = {
        "promoted": "is the champion now",
        "held": "stays the challenger: not every check passed",
        "rejected": "is rejected; the champion stays",
        "declined": "was declined; the champion stays",
        "taken back": "was made the champion by this very decision before, and somebody took it back: that stays so. "
        "`belt models assign` makes it the champion all the same",
        "champion already": "is the champion already, so nothing was measured",
    }
    entry = promotion.entry
    told = f"{promotion.challenger_digest} {words[promotion.outcome]}."
    lines = [told] if entry is None else [told, "", f"- {_moved(entry)}"]
    return "\n".join([*lines, *(["", decision_summary(promotion.record)] if promotion.record else [""])])


def models_summary(listed: ModelList) -> str:
    """The models of a registry: which has which alias, where they are from, and every move."""
    of_digest: dict[str, list[str]] = {}
    for alias, entry in listed.aliases.items():
        of_digest.setdefault(entry.to_digest, []).append(alias)
    models = [
        [
            model.digest,
            ", ".join(of_digest.get(model.digest, [])),
            f"{model.head.task} ({len(model.head.labels)})",
            _number(model.metrics.get(METRICS[model.head.task][0])),
            f"{model.at:%Y-%m-%d %H:%M}",
            _said(model.who),
            _said(model.source_uri),
        ]
        for model in listed.models
    ]
    moves = [
        [
            _count(entry.number),
            entry.alias,
            "" if entry.from_digest is None else entry.from_digest[:12],
            entry.to_digest[:12],
            f"{entry.at:%Y-%m-%d %H:%M}",
            _said(entry.who),
            _said(entry.why),
            entry.decision or "",
        ]
        for entry in listed.history
    ]
    header = ["digest", "aliases", "task (labels)", "main metric in fine-tuning", "added (UTC)", "by", "from"]
    lines = [f"## models of {listed.registry_uri}", "", *_table(header, models)]
    header = ["", "alias", "from", "to", "at (UTC)", "by", "why", "decision"]
    return "\n".join([*lines, *(["", *_table(header, moves)] if moves else [])]) + "\n"


def alias_summary(entry: Entry) -> str:
    """One move of an alias."""
    return f"{_moved(entry)}.\n"


def _moved(entry: Entry) -> str:
    before = "" if entry.from_digest is None else f" instead of {entry.from_digest}"
    return f"{entry.alias} is {entry.to_digest}{before} (entry {entry.number}, {_said(entry.who)}: {_said(entry.why)})"


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
    rows = [["prepare", _count(prepared["num_documents"]), "", _seconds(prepare_s), f"{_rate(prepared, 'tokenize')}"]]
    for name, run in (
        (f"fine-tune, {len(fine_tuning.epochs)} epochs", prepared),
        ("evaluate", evaluation_run.run),
        ("score", scored),
    ):
        cost = [_seconds(run["encode_s"]), _rate(run, "encode")]
        rows.append([name, _count(run["num_documents"]), _count(run["num_chunks"]), *cost])
    rows.append(["publish", _count(scored["num_documents"]), "", _seconds(scored["write_s"]), ""])
    measured = evaluation.metrics
    predictions = _table_uri(scored, "predictions")
    model, limits = prepared["output_uri"], " and ".join(_limits(prepared))
    query = f"import polars as pl; print(pl.read_delta('{predictions}'))"
    return "\n".join(
        [
            "## belt demo: which library is a docstring from?",
            "",
            *_table(["stage", "documents", "chunks", "seconds", "tokens per second"], rows),
            "",
            f"- accuracy on the test split: **{measured['accuracy']:.3f}** ({measured['num_documents']} documents)",
            f"- accuracy of always guessing the commonest label: {measured['majority_baseline_accuracy']:.3f}",
            f"- rejected rows: {_rejected(scored['num_rejected'], scoring_run.rejected_by_reason)}, broken on purpose",
            f"- read back: polars found {read_back.polars_rows:,} predictions, DuckDB {read_back.duckdb_rows:,}",
            "",
            "By label, as DuckDB reads it:",
            "",
            *_table(
                ["label", "documents", "mean score"],
                [[_label(label), _count(count), f"{mean:.3f}"] for label, count, mean in read_back.labels],
            ),
            "",
            "The longest documents, as polars reads them; BERT alone would see the first 510 tokens:",
            "",
            *_table(
                ["doc_id", "label", "score", "tokens", "chunks"],
                [
                    [_label(doc_id), _label(label), f"{score:.3f}", _count(num_tokens), _count(num_chunks)]
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


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table; `|` in a cell is escaped, and a line break becomes a space."""
    shown = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *shown]]


def _said(words: str) -> str:
    """What others wrote, such as labels, in one line of Markdown that is neither markup nor a tag."""
    return re.sub(r"([\\`<\[\]])", r"\\\1", " ".join(pages.spelt_out(words).split()))


def _label(label: str) -> str:
    return _said(pages.short(label, MOST_CHARACTERS))


def _rejected(count: int, by_reason: dict[str, int]) -> str:
    reasons = ", ".join(f"{reason} {num:,}" for reason, num in sorted(by_reason.items()))
    return f"{count:,} ({reasons})" if count else "0"


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
    return _count(run["num_chunks"]) + (f", {redundant:.1%} of them redundant" if redundant else "")


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
    words = f"{documents:,} documents, {rejected:,} rejected rows, {_seconds(seconds)}"
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
        rows.append(["documents whose text was encoded already", _count(run["num_documents_reused"])])
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


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _pages(report: ScoreReport, links: Mapping[str, str] | None = None) -> list[str]:
    return [
        f"- report: {_link(report.report_uri, links)}",
        f"- data quality: {_link(report.quality_uri, links)}",
        f"- statistics: `{report.statistics_uri}`",
    ]


def _link(uri: str, links: Mapping[str, str] | None = None) -> str:
    """A place to copy, and to click on where something can open it: an address that is known, or a local file."""
    address = (links or {}).get(uri)
    if address is None and "://" not in uri:
        address = f"file://{quote(uri)}"
    return f"`{uri}`" if address is None else f"`{uri}` ([open]({address}))"


def _run_uri(run: dict[str, Any]) -> str:
    return storage.join(run["output_uri"], "runs", run["run_id"])


def _places(manifest: Manifest, table: str) -> list[str]:
    """The files of a run's table, as globs; those of a fine-tuning may be shared with other runs."""
    folders = {file.path.rpartition("/")[0] for file in manifest.files if file.table == table}
    return [storage.join(manifest.run["output_uri"], folder, "*.parquet") for folder in sorted(folders)]


def _table_uri(run: dict[str, Any], table: str) -> str:
    return storage.join(run["output_uri"], "tables", table)


def _count(number: int) -> str:
    return f"{number:,}"
