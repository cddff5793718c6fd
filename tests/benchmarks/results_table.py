"""The table of the results, and what it is made of: kept results are merged corpus by corpus, never made up.

The README's block between BEGIN and END is this and nothing else.
"""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from belt_tasks import length_words, storage
from belt_tasks.errors import ConfigError
from belt_tasks.length_comparison import LengthRow
from belt_tasks.metrics import IN_WORDS
from belt_tasks.resampling import LOWER_IS_BETTER
from belt_tasks.specs import Metric, Selection
from tests.benchmarks.results_corpora import CORPORA, SELECTIONS
from tests.benchmarks.results_runs import CorpusResult, SeedResult

Results = Mapping[str, CorpusResult]

BEGIN = "<!-- results: what follows is written by `make results` -->"
END = "<!-- end of results -->"
NOTHING = "There are no results yet: `make results DATA=DIR` fine-tunes, compares, and writes them here."
HEADER = (
    "corpus",
    "what reads",
    "metric (95 % CI)",
    "all instead changes it by (95 % CI)",
    "trained: tokens, time",
    "scored: tokens, time",
)
READERS: dict[Selection, str] = {"head": "the head", "head_tail": "head and tail", "all": "all"}
MINUTE, HOUR = 60, 3600


def read(path: Path) -> dict[str, CorpusResult]:
    """Results that were kept, or those of a run.

    Raises:
        ConfigError: they are not there, or are none.
    """
    try:
        kept = json.loads(path.read_bytes())["results"]
        return {name: CorpusResult.model_validate(result) for name, result in kept.items()}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: must hold results, got {type(error).__name__}: {error}") from error


def merge(kept: Results, new: Results) -> dict[str, CorpusResult]:
    """Corpora of the new results replace those of the same name; in the order of the table."""
    both = {**kept, **new}
    return {name: both[name] for name in CORPORA if name in both}


def as_json(results: Results) -> dict[str, object]:
    """What `read` reads."""
    return {"results": {name: result.model_dump(mode="json") for name, result in results.items()}}


def write_kept(path: Path, results: Results) -> None:
    """Keep results."""
    storage.write_bytes(str(path), (json.dumps(as_json(results), indent=1) + "\n").encode())


def write_readme(path: Path, results: Results) -> None:
    """Put the block of the results into a README, and leave the rest of it.

    Raises:
        ConfigError: it has not exactly one place for it.
    """
    text = path.read_text(encoding="utf-8")
    storage.write_bytes(str(path), with_block(text, block(results), where=str(path)).encode())


def with_block(text: str, between: str, *, where: str) -> str:
    """A text whose block is another.

    Raises:
        ConfigError: it has not exactly one block.
    """
    if (text.count(BEGIN), text.count(END)) != (1, 1) or text.index(BEGIN) > text.index(END):
        raise ConfigError(f"{where}: must have one line {BEGIN!r} and behind it one {END!r}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{between}\n{END}{rest.split(END)[1]}"


def block(results: Results) -> str:
    """The table, and a sentence on each corpus."""
    if not results:
        return NOTHING
    lines = [HEADER, ("---", "---", "---:", "---:", "---:", "---:")]
    lines += [line for result in results.values() for line in _lines(result)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([table, "\n".join(f"- {sentence(result)}" for result in results.values())])


def sentence(result: CorpusResult) -> str:
    """Whether reading further paid on a corpus, in the words of the length report; and how it was measured."""
    first = result.seeds[0]
    size, limit = f"{result.settings.chunk_size:,}", result.settings.maximal_text_length
    until = "" if limit is None else f", up to {limit:,},"
    lower = " (lower is better)" if result.metric in LOWER_IS_BETTER else ""
    costs = " and ".join(
        _times(first.run("all").num_tokens_scored, first.run(other).num_tokens_scored) for other in SELECTIONS[:2]
    )
    return (
        f"{result.corpus}, {CORPORA[result.corpus].about}: reading past the first {size} tokens{until} changes the "
        f"{IN_WORDS[result.metric]}{lower} {_changes(result.seeds, 'head')}, reading all instead of the first and the "
        f"last {size} tokens {_changes(result.seeds, 'head_tail')}; that is {costs} times as many tokens. "
        f"{_measured(result)}"
    )


def _lines(result: CorpusResult) -> Iterable[tuple[str, ...]]:
    metric, baseline, first = result.metric, result.baseline, result.seeds[0]
    longer = f"{first.num_longer / first.num_test_documents:.0%}"
    name = (
        f"{result.corpus}: {IN_WORDS[metric]}; {baseline.num_training_documents:,} training and "
        f"{first.num_test_documents:,} test documents, {longer} of these longer than a chunk"
    )
    value = f"{length_words.number(metric, baseline.value)} ({_ends(metric, baseline.lower, baseline.upper)})"
    yield (name, "tf-idf + linear", value, "", "", "")
    for selection in SELECTIONS:
        rows = [seed.row(selection) for seed in result.seeds]
        gains = [] if selection == "all" else [seed.row("all", selection) for seed in result.seeds]
        runs = [seed.run(selection) for seed in result.seeds]
        yield (
            "",
            READERS[selection],
            _cell(rows),
            _cell(gains),
            _cost([(run.num_tokens_trained, run.training_s) for run in runs]),
            _cost([(run.num_tokens_scored, run.scoring_s) for run in runs]),
        )


def _cell(rows: Sequence[LengthRow]) -> str:
    """Mean and standard deviation over seeds, and the interval of each."""
    if not rows:
        return ""
    value, spread = _mean(rows)
    is_in_points = rows[0].compared_with is not None and rows[0].metric in length_words.POINTS
    ends = "; ".join(length_words.interval(row) or "unknown" for row in rows)
    return f"{value}{spread}{' points' if is_in_points else ''} ({ends})"


def _mean(rows: Sequence[LengthRow]) -> tuple[str, str]:
    """In the metric's own digits; the second is empty of a single seed."""
    metric, values = rows[0].metric, [row.value for row in rows if row.value is not None]
    told = length_words.number if rows[0].compared_with is None else length_words.change
    value = told(metric, statistics.fmean(values) if values else None)
    if len(values) < 2:
        return value, ""
    return value, f" ± {told(metric, statistics.stdev(values)).removeprefix('+')}"


def _changes(seeds: Sequence[SeedResult], other: Selection) -> str:
    rows = [seed.row("all", other) for seed in seeds]
    points = " points" if rows[0].metric in length_words.POINTS else ""
    value, spread = _mean(rows)
    verdicts = [length_words.verdict(row) for row in rows]
    if len(rows) == 1:
        return f"by {value}{points} (95 % CI {length_words.interval(rows[0])}), {verdicts[0]}"
    counted = [f"{verdict} with {verdicts.count(verdict)}" for verdict in dict.fromkeys(verdicts)]
    return f"by {value}{spread}{points} over {len(rows)} seeds ({' and '.join(counted)} of {len(rows)})"


def _measured(result: CorpusResult) -> str:
    settings, first = result.settings, result.seeds[0]
    run = first.run("all")
    seeds = ", ".join(str(seed.seed) for seed in result.seeds)
    cpu = f"{first.machine['cpu']}, {first.machine['cores']} cores"
    where = cpu if run.training_device == "cpu" else run.training_device
    epochs = _counted(settings.epochs, "epoch")
    best = "" if settings.epochs == 1 else f", the best of them by {settings.validation_fraction:.0%} held out"
    return (
        f"{result.encoder}, {epochs}{best}, learning rate {settings.learning_rate:g}, "
        f"{_counted(settings.documents_per_batch, 'document')} a batch, {settings.pooling_strategy} pooling, "
        f"{run.precision}, seed{'' if len(result.seeds) == 1 else 's'} {seeds}; {where}, {first.date}."
    )


def _counted(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def _ends(metric: Metric, lower: float, upper: float) -> str:
    return f"{length_words.number(metric, lower)} to {length_words.number(metric, upper)}"


def _cost(parts: Sequence[tuple[int, float]]) -> str:
    tokens = statistics.fmean(tokens for tokens, _ in parts)
    return f"{_tokens(tokens)}, {_time(statistics.fmean(seconds for _, seconds in parts))}"


def _tokens(number: float) -> str:
    return f"{number / 1e6:.2f} M" if number >= 1e6 else f"{number:,.0f}"


def _time(seconds: float) -> str:
    if seconds >= HOUR:
        return f"{seconds / HOUR:.1f} h"
    return f"{seconds / MINUTE:.1f} min" if seconds >= MINUTE else f"{seconds:.1f} s"


def _times(more: int, less: int) -> str:
    return f"{more / less:.1f}" if less else "an unknown number of"
