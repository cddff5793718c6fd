"""Length words: what a length report says, in sentences. The same stand on its page and in the summary."""

from belt_tasks import metrics
from belt_tasks.length_comparison import LengthGroup, LengthReport, LengthRow, Reading
from belt_tasks.resampling import LOWER_IS_BETTER
from belt_tasks.specs import ChunkSpec, Metric, Selection

SELECTIONS: dict[Selection, str] = {"head": "the head", "head_tail": "head and tail", "all": "all"}
POINTS = {"accuracy", "macro_f1", "micro_f1", "subset_accuracy"}
"""Metrics whose differences are told in points: hundredths."""
ALIKE = "all ways read the same text, and differ by their checkpoints and windows alone"
FEW = 100
"""Documents below which a word of caution stands beside the whole comparison."""


def answer(report: LengthReport) -> list[str]:
    """Whether reading further pays, in sentences: against the head, with longer documents alone, and against both."""
    everything, longer = report.group("all"), report.group("longer")
    size = f"{report.reading('all').chunks.chunk_size:,}"
    if not _reads_on(report):
        return [f"{_nothing(report)}: {ALIKE}.", *_few(report)]
    said = [
        _difference(report, everything, "head", f"Reading past the first {size} tokens{_limit(report)}"),
        _of_longer(report, longer),
        _difference(
            report,
            everything,
            "head_tail",
            f"Reading all instead of the first and the last {size} tokens{_limit(report)}",
        ),
    ]
    return [*said, *_few(report)]


def verdict(row: LengthRow) -> str:
    """Whether a difference is one: none beyond chance, gain, loss, or not known."""
    if row.value is None or row.lower is None or row.upper is None:
        return "not known"
    if row.lower <= 0 <= row.upper:
        return "no difference beyond chance"
    is_gain = (row.value > 0) != (row.metric in LOWER_IS_BETTER)
    return f"a {'gain' if is_gain else 'loss'} beyond chance"


def caveats(report: LengthReport) -> list[str]:
    """What speaks against the comparison: documents left out, and ways that a checkpoint was not trained for."""
    said = []
    if report.num_left_out:
        said.append(
            f"{_documents(report.num_left_out)} left out: not every way gave a score to the same text "
            "(see the rejected rows of its run)."
        )
    strange = [reading for reading in report.readings if not reading.is_at_home]
    if strange:
        ways = _listed([f"{SELECTIONS[reading.selection]} ({_trained(reading)})" for reading in strange])
        said.append(
            f"Of these ways the checkpoint was not fine-tuned for the selection that it read: {ways}. A comparison is "
            "biased against a selection that the checkpoint was not trained with: for a fair one fine-tune a "
            "checkpoint with each selection, and name them by --head-checkpoint and --head-tail-checkpoint."
        )
    if _reads_on(report) and all(_is_alike(report, other) for other in ("head", "head_tail")):
        said.append(
            "On every document each way is as right as the others. So is a model that says the same of every document, "
            "whatever it reads: see whether the evaluation's metrics are better than those of a guess."
        )
    devices = {(reading.device, reading.precision) for reading in report.readings}
    if len(devices) > 1:
        said.append("The ways were not scored on the same device in the same precision: their seconds do not compare.")
    return said


def _is_alike(report: LengthReport, other: Selection) -> bool:
    row = report.row(report.group("all"), "all", other)
    return row.value == row.lower == row.upper == 0.0


def trained_with(reading: Reading) -> str:
    """Windows of a checkpoint's fine-tuning, as far as they differ from what it was scored with, in words."""
    before = reading.trained_with
    if before is None:
        return "not known"
    others = [
        f"{name} {getattr(before, name)}"
        for name in ChunkSpec.model_fields
        if name not in ("selection", "seed", "num_random_chunks")
        and getattr(before, name) != getattr(reading.chunks, name)
    ]
    return ", ".join([f"selection {before.selection}", *others])


def group_name(group: LengthGroup) -> str:
    """Documents of like length, by their tokens."""
    if group.kind == "all":
        return "all documents"
    if group.max_tokens is None:
        return f"more than {group.min_tokens - 1:,}"
    return f"{group.min_tokens:,} to {group.max_tokens:,}"


def number(metric: Metric, value: float | None) -> str:
    """A metric's value."""
    if value is None:
        return "undefined"
    return f"{value:.4f}" if metric in POINTS else f"{value:.4g}"


def change(metric: Metric, value: float | None, *, unit: bool = False) -> str:
    """A metric's difference, with its sign; in points where it is a share."""
    if value is None:
        return "undefined"
    shown = f"{100 * value:+.1f}" if metric in POINTS else f"{value:+.4g}"
    if float(shown) == 0:
        shown = shown.replace("-", "+")
    return f"{shown} points" if unit and metric in POINTS else shown


def interval(row: LengthRow) -> str:
    """The ends of an interval."""
    told = number if row.compared_with is None else change
    return "" if row.lower is None else f"{told(row.metric, row.lower)} to {told(row.metric, row.upper)}"


def ratio(report: LengthReport, selection: Selection) -> float | None:
    """How many times as many tokens all chunks have as those of a selection."""
    less = report.reading(selection).num_tokens_encoded
    return report.reading("all").num_tokens_encoded / less if less else None


def _difference(report: LengthReport, group: LengthGroup, other: Selection, begin: str) -> str:
    row = report.row(group, "all", other)
    return f"{begin} {_changes(report, row)} and costs {_cost(report, other)}. That is {verdict(row)}."


def _changes(report: LengthReport, row: LengthRow) -> str:
    name = f"{'the ' if row.metric in LOWER_IS_BETTER else ''}{metrics.IN_WORDS[row.metric]}"
    if row.value is None:
        return f"changes {name} by an unknown amount, since it is undefined on these documents,"
    lower = "; lower is better" if row.metric in LOWER_IS_BETTER else ""
    confidence = f"{100 * report.spec.confidence:g} % CI"
    return f"changes {name} by {change(row.metric, row.value, unit=True)} ({confidence} {interval(row)}{lower})"


def _cost(report: LengthReport, other: Selection) -> str:
    times = ratio(report, other)
    one, two = report.reading("all"), report.reading(other)
    told = "what cannot be told, for no token was encoded" if times is None else f"{times:.1f} times as much"
    seconds = f"{_seconds(one.encode_s)} of the encoder against {_seconds(two.encode_s)}"
    return f"{told} ({one.num_tokens_encoded:,} tokens encoded against {two.num_tokens_encoded:,}, {seconds})"


def _reads_on(report: LengthReport) -> bool:
    """Whether any way reads more than another."""
    chunks = report.reading("all").chunks
    is_read = chunks.maximal_text_length is None or chunks.maximal_text_length > chunks.chunk_size
    return is_read and report.group("longer").num_documents > 0


def _nothing(report: LengthReport) -> str:
    """Why none does."""
    chunks = report.reading("all").chunks
    if report.group("longer").num_documents == 0:
        return f"No document is longer than {chunks.chunk_size:,} tokens, so there is nothing to read past them"
    return f"maximal_text_length {chunks.maximal_text_length:,} ends every document within its first chunk"


def _few(report: LengthReport) -> list[str]:
    if report.num_documents >= FEW:
        return []
    return [f"These are only {_documents(report.num_documents)}: others might say something else."]


def _of_longer(report: LengthReport, longer: LengthGroup) -> str:
    share = f"{longer.num_documents:,} of {_documents(report.num_documents)} ({_share(report, longer)})"
    verb = "is" if longer.num_documents == 1 else "are"
    if longer.is_too_small:
        return f"Only {share} {verb} longer than that, too few to be measured alone."
    row = report.row(longer, "all", "head")
    return f"{share} {verb} longer than that; among them it {_changes(report, row)}. That is {verdict(row)}."


def _limit(report: LengthReport) -> str:
    most = report.reading("all").chunks.maximal_text_length
    return "" if most is None else f", up to {most:,},"


def _share(report: LengthReport, group: LengthGroup) -> str:
    return f"{group.num_documents / report.num_documents:.1%}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 10 else f"{seconds:.2f} s"  # noqa: PLR2004 - three digits are enough


def _documents(count: int) -> str:
    return f"{count:,} document{'' if count == 1 else 's'}"


def _trained(reading: Reading) -> str:
    if reading.trained_with is None:
        return "its training is not known"
    return f"trained with {reading.trained_with.selection}"


def _listed(words: list[str]) -> str:
    return " and ".join([*([", ".join(words[:-1])] if len(words) > 1 else []), words[-1]])
