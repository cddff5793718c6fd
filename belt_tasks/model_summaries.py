"""Summaries of models: what a fine-tuning, an evaluation or a decision did, as Markdown for people."""

from belt_tasks import calibration, length_words, markdown, metrics
from belt_tasks.evaluation import EvaluationReceipt
from belt_tasks.fine_tuning import FineTuningReceipt
from belt_tasks.gate import DecisionRecord
from belt_tasks.import_belt_nlp import Imported
from belt_tasks.length_comparison import LengthGroup, LengthReport
from belt_tasks.model_store import ModelList
from belt_tasks.promotion import Promotion
from belt_tasks.registry import Entry
from belt_tasks.resampling import METRICS
from belt_tasks.specs import ChunkSpec

NUM_LABELS = 10  # named
USEFUL_AUC = 0.6
NEARLY = 1.01  # as a search ends
MEASURED_BY = {"ece": "expected calibration error", "log_loss": "log loss"}


def fine_tuning_summary(receipt: FineTuningReceipt) -> str:
    """Losses and metrics by epoch, cost, and where the checkpoint is."""
    rows = []
    for epoch in receipt.epochs:
        validation = epoch.validation or {}
        shown = [markdown.number(validation.get(name)) for name in ("loss", METRICS[receipt.task][0])]
        best = " (kept)" if epoch.number == receipt.best_epoch else ""
        rows.append([f"{epoch.number}{best}", markdown.number(epoch.training_loss), *shown])
    rate = receipt.num_tokens_encoded * len(receipt.epochs) / receipt.training_s
    labels = ", ".join(map(markdown.label, receipt.labels[:NUM_LABELS])) + (
        ", ..." if len(receipt.labels) > NUM_LABELS else ""
    )
    return "\n".join(
        [
            f"## fine-tuning: {receipt.task} ({labels})",
            "",
            *markdown.table(["epoch", "training loss", "validation loss", METRICS[receipt.task][0]], rows),
            "",
            f"- trained on {receipt.num_training_documents:,} documents, {receipt.num_validation_documents:,} held out",
            *_stopped(receipt),
            *_learned_nothing(receipt),
            *_calibration(receipt),
            *_lonely(receipt),
            f"- {receipt.num_chunks:,} chunks",
            f"- {markdown.seconds(receipt.training_s)}, {rate:,.0f} tokens per second",
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
    labels = ", ".join(map(markdown.label, card.head.labels))
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


def _stopped(receipt: FineTuningReceipt) -> list[str]:
    if receipt.patience is None:
        return []
    epochs = f"{receipt.patience:,} epoch{'' if receipt.patience == 1 else 's'}"
    return [f"- stopped early: {epochs} without a better one than epoch {receipt.best_epoch}"]


def _learned_nothing(receipt: FineTuningReceipt) -> list[str]:
    """A word on a model that a guess equals on the documents held out."""
    names = ("accuracy", "majority_baseline_accuracy", "auc", "r2")
    accuracy, guess, auc, r2 = (receipt.metrics.get(name) for name in names)
    if accuracy is not None and guess is not None and accuracy <= guess:
        said = f"right on {accuracy:.1%} of them, no more than who always guesses the commonest label ({guess:.1%})"
        if auc is not None and auc >= USEFUL_AUC:  # of rare labels, that is usual
            return [f"- {said}, though it ranks them (AUC {auc:.3f})"]
    elif r2 is not None and r2 <= 0:
        said = f"no nearer to their numbers than their mean is (R2 {r2:.3f})"
    else:
        return []
    return [f"- **{said}: nothing that helps has been learned**"]


def _lonely(receipt: FineTuningReceipt) -> list[str]:
    if not receipt.lonely_labels:
        return []
    names = ", ".join(map(markdown.label, receipt.lonely_labels[:NUM_LABELS]))
    more = f" and {len(receipt.lonely_labels) - NUM_LABELS} more" if len(receipt.lonely_labels) > NUM_LABELS else ""
    return [f"- **labels with a single training document, which cannot be learned from it: {names}{more}**"]


def _calibration(receipt: FineTuningReceipt) -> list[str]:
    if receipt.calibration is None:
        return []
    before, after = receipt.metrics["uncalibrated"], receipt.metrics
    slopes = receipt.calibration.slope
    how = f"temperature {1 / slopes[0]:.2f}" if len(slopes) == 1 else "slope and offset of each label"
    changes = (f"{words} {before[name]:.3f} to {after[name]:.3f}" for name, words in MEASURED_BY.items())
    least, most = calibration.SLOPES
    is_at_limit = min(slopes) < NEARLY * least or max(slopes) > most / NEARLY
    limits = (
        f"; a slope is at the end of {least:g} to {most:g}, and one beyond would fit them better" if is_at_limit else ""
    )
    return [f"- calibrated on them ({how}): {', '.join(changes)}{limits}"]


def evaluation_summary(receipt: EvaluationReceipt) -> str:
    """The main metrics, and where all of them and the plots are."""
    measured = receipt.metrics
    rows = [[words, markdown.number(measured[name])] for name, words in metrics.IN_WORDS.items() if name in measured]
    lines = [
        f"## evaluation: {measured['num_documents']:,} documents",
        "",
        *markdown.table(["metric", "value"], rows),
        "",
    ]
    if receipt.rejected_by_reason:
        count = sum(receipt.rejected_by_reason.values())
        lines.append(f"- labels put aside: {markdown.rejected(count, receipt.rejected_by_reason)}")
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
        rows.append([length_words.group_name(group), markdown.count(group.num_documents), *cells])
    costs = [
        [
            name,
            markdown.count(each.num_tokens_encoded),
            markdown.seconds(each.encode_s),
            length_words.trained_with(each),
            markdown.said(each.checkpoint_uri),
        ]
        for name, each in zip(names, report.readings, strict=True)
    ]
    return [
        "## does reading further pay?",
        "",
        *(line for sentence in length_words.answer(report) for line in (markdown.said(sentence), "")),
        *(line for sentence in length_words.caveats(report) for line in (f"**{markdown.said(sentence)}**", "")),
        *markdown.table(
            ["tokens", "documents", *(f"{name}: {metrics.IN_WORDS[report.metric]} ({confidence})" for name in names)],
            rows,
        ),
        "",
        *markdown.table(["read", "tokens encoded", "encoder", "checkpoint fine-tuned with", "checkpoint"], costs),
        "",
        f"- length report: {markdown.link(report.report_uri)}",
        f"- its numbers: `{report.table_uri}` (Parquet) and `{report.numbers_uri}`",
    ]


def _length_values(report: LengthReport, group: LengthGroup) -> list[str]:
    found = [report.row(group, reading.selection) for reading in report.readings]
    return [f"{length_words.number(row.metric, row.value)} ({length_words.interval(row)})" for row in found]


def decision_summary(record: DecisionRecord) -> str:
    """What was decided on a challenger, and on what it rests."""
    numbers = [
        [words, markdown.number(record.champion_metrics.get(name)), markdown.number(record.challenger_metrics[name])]
        for name, words in metrics.IN_WORDS.items()
        if name in record.challenger_metrics
    ]
    marks = {True: "passed", False: "**not passed**", None: "could not be measured"}
    checks = [
        [
            check.name + (f" of {markdown.label(check.label)}" if check.label else ""),
            *(
                f"{value:,.0f}" if check.name == "documents" else markdown.number(value)
                for value in (check.number, check.limit)
            ),
            "not passed, may be chance" if check.may_be_chance else marks[check.passed],
        ]
        for check in record.checks
    ]
    lines = [
        f"## {record.decision}: {record.num_documents:,} held-out documents",
        "",
        markdown.said(f"{record.why[0].upper()}{record.why[1:]}."),
        "",
        *markdown.table(["metric", "champion", "challenger"], numbers),
        "",
        *markdown.table(["check", "measured", "limit", ""], checks),
        "",
        f"- champion: {'none' if record.champion_digest is None else f'`{record.champion_digest}`'}",
        f"- challenger: `{record.challenger_digest}`",
        f"- corpus: `{record.corpus_uri}`",
        f"- decision: `{record.id}`",
    ]
    if record.labels_without_documents:
        lines.append(
            f"- labels without held-out documents: {', '.join(map(markdown.label, record.labels_without_documents))}"
        )
    return "\n".join(lines) + "\n"


def promotion_summary(promotion: Promotion) -> str:
    """What became of a challenger."""
    words = {
        "promoted": "is the champion now",
        "held": "stays the challenger: not every check passed",
        "rejected": "is rejected; the champion stays",
        "declined": "was declined; the champion stays",
        "taken back": "was the champion before, and somebody took it back: that stays so until a person approves of it "
        "by a new decision. `belt models assign` makes it the champion all the same",
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
            markdown.number(model.metrics.get(METRICS[model.head.task][0])),
            f"{model.at:%Y-%m-%d %H:%M}",
            markdown.said(model.who),
            markdown.said(model.source_uri),
        ]
        for model in listed.models
    ]
    moves = [
        [
            markdown.count(entry.number),
            entry.alias,
            "" if entry.from_digest is None else entry.from_digest[:12],
            entry.to_digest[:12],
            f"{entry.at:%Y-%m-%d %H:%M}",
            markdown.said(entry.who),
            markdown.said(entry.why),
            entry.decision or "",
        ]
        for entry in listed.history
    ]
    header = ["digest", "aliases", "task (labels)", "main metric in fine-tuning", "added (UTC)", "by", "from"]
    lines = [f"## models of {listed.registry_uri}", "", *markdown.table(header, models)]
    header = ["", "alias", "from", "to", "at (UTC)", "by", "why", "decision"]
    return "\n".join([*lines, *(["", *markdown.table(header, moves)] if moves else [])]) + "\n"


def alias_summary(entry: Entry) -> str:
    """One move of an alias."""
    return f"{_moved(entry)}.\n"


def _moved(entry: Entry) -> str:
    before = "" if entry.from_digest is None else f" instead of {entry.from_digest}"
    said = f"{markdown.said(entry.who)}: {markdown.said(entry.why)}"
    return f"{entry.alias} is {entry.to_digest}{before} (entry {entry.number}, {said})"
