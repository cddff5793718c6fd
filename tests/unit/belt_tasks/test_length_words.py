"""Length words: the sentences say what was measured, and admit what was not."""

import json
from html.parser import HTMLParser

import pytest

from belt_tasks import length_contents, length_words, model_summaries, pages
from belt_tasks.evaluation import EvaluationReceipt
from belt_tasks.length_comparison import LengthGroup, LengthReport, LengthRow, Reading
from belt_tasks.specs import ChunkSpec, Head, LengthSpec

DIFFERENCES = {"head": (0.0234, 0.005, 0.0412), "head_tail": (-0.0004, -0.011, 0.01)}
RUN = {
    "run_id": "0" * 16,
    "corpus_uri": "<script>alert(1)</script>",
    "belt_version": "0.1.0",
    "finished_at": "2026-01-02T03:04:05+00:00",
}


def report_of(
    differences=DIFFERENCES,
    *,
    metric="accuracy",
    head=None,
    num_longer=280,
    trained=("head", "head_tail", "all"),
    **more,
) -> LengthReport:
    """A report of 400 documents, of which some are longer than a chunk of 510 tokens."""
    chunks = ChunkSpec(maximal_text_length=more.pop("maximal_text_length", None))
    counts = [("all", 0, None, 400), ("longer", 511, None, num_longer), ("bucket", 0, 510, 400 - num_longer)]
    counts.append(("bucket", 511, 1020, num_longer))
    groups = [
        LengthGroup(kind=kind, min_tokens=least, max_tokens=most, num_documents=count, is_too_small=count < 30)
        for kind, least, most, count in counts
    ]
    rows = []
    for group in groups:
        numbers = [("head", None, (0.88, 0.85, 0.91)), ("head_tail", None, (0.9, 0.88, 0.92))]
        numbers += [("all", None, (0.9034, 0.88, 0.93)), *(("all", other, it) for other, it in differences.items())]
        for selection, other, it in numbers:
            value, lower, upper = (None, None, None) if group.is_too_small else it
            rows.append(
                LengthRow(
                    **group.model_dump(exclude={"is_too_small"}), metric=metric, selection=selection,
                    compared_with=other, value=value, lower=lower, upper=upper, num_tokens_encoded=7,
                )
            )  # fmt: skip
    readings = [
        Reading(
            selection=selection, checkpoint_uri=f"s3://models/{selection}<i>", checkpoint_digest="d" * 64,
            trained_with=None if before is None else chunks.model_copy(update={"selection": before}),
            chunks=chunks.model_copy(update={"selection": selection}), run_id="0" * 16, output_uri="s3://out",
            device="cpu", precision="fp32", num_tokens_encoded=tokens, encode_s=seconds,
        )
        for selection, before, tokens, seconds in zip(
            ("head", "head_tail", "all"), trained, (200_000, 340_000, 520_000), (4.75, 8.1, 12.34), strict=True
        )
    ]  # fmt: skip
    head = head or Head(task="multiclass", labels=("<script>alert(2)</script>", "ham & eggs"))
    values = {
        "run_id": "0" * 16, "report_uri": "/out/length.html", "numbers_uri": "/out/length.json",
        "table_uri": "/out/length.parquet", "head": head,
        "metric": metric, "num_documents": 400, "num_left_out": 0, "readings": readings, "groups": groups,
        "rows": rows, "spec": LengthSpec(),
    }  # fmt: skip
    return LengthReport(**(values | more))


def test_the_answer():
    past, longer, both = length_words.answer(report_of())

    assert past == (
        "Reading past the first 510 tokens changes accuracy by +2.3 points (95 % CI +0.5 to +4.1) and costs 2.6 times "
        "as much (520,000 tokens encoded against 200,000, 12.3 s of the encoder against 4.75 s). That is a gain beyond "
        "chance."
    )
    assert longer == (
        "280 of 400 documents (70.0%) are longer than that; among them it changes accuracy by +2.3 points (95 % CI "
        "+0.5 to +4.1). That is a gain beyond chance."
    )
    assert both == (
        "Reading all instead of the first and the last 510 tokens changes accuracy by +0.0 points (95 % CI -1.1 to "
        "+1.0) and costs 1.5 times as much (520,000 tokens encoded against 340,000, 12.3 s of the encoder against 8.10 "
        "s). That is no difference beyond chance."
    )


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (
            (-0.5, -0.9, -0.1),
            "changes the mean squared error by -0.5 (95 % CI -0.9 to -0.1; lower is better) and costs",
        ),
        ((-0.5, -0.9, -0.1), "That is a gain beyond chance."),
        ((0.25, 0.125, 0.5), "That is a loss beyond chance."),
        ((0.25, 0.0, 0.5), "That is no difference beyond chance."),
        ((0.0, 0.0, 0.0), "by +0 (95 % CI +0 to +0; lower is better)"),
    ],
)
def test_of_a_regression_less_is_better_and_there_are_no_points(difference, words):
    report = report_of(
        {"head": difference, "head_tail": difference}, metric="mse", head=Head(task="regression", labels=("stars",))
    )

    for said in (length_words.answer(report)[0], length_words.answer(report)[2]):
        assert words in said
        assert "points" not in said


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ((0.02, 0.01, 0.03), "a gain beyond chance"),
        ((-0.02, -0.03, -0.01), "a loss beyond chance"),
        ((-0.02, -0.03, 0.0), "no difference beyond chance"),
        ((0.02, -0.01, 0.05), "no difference beyond chance"),
        ((None, None, None), "not known"),
    ],
)
def test_what_an_interval_says(change, verdict):
    report = report_of({"head": change, "head_tail": change})

    assert length_words.verdict(report.row(report.group("all"), "all", "head")) == verdict
    assert f"That is {verdict}." in length_words.answer(report)[0]


@pytest.mark.parametrize(
    ("num_longer", "said"),
    [
        (1, "Only 1 of 400 documents (0.2%) is longer than that, too few to be measured alone."),
        (29, "Only 29 of 400 documents (7.2%) are longer than that, too few to be measured alone."),
    ],
)
def test_few_long_documents(num_longer, said):
    assert length_words.answer(report_of(num_longer=num_longer))[1] == said


def test_where_no_document_is_longer_no_gain_of_reading_on_is_claimed():
    none, few = length_words.answer(report_of(num_longer=0, num_documents=99))

    assert none == (
        "No document is longer than 510 tokens, so there is nothing to read past them: all ways read the same text, "
        "and differ by their checkpoints and windows alone."
    )
    assert few == "These are only 99 documents: others might say something else."


def test_a_limit_within_the_first_chunk_leaves_nothing_to_compare():
    equal = dict.fromkeys(DIFFERENCES, (0.0, 0.0, 0.0))
    report = report_of(equal, maximal_text_length=510)

    (said,) = length_words.answer(report)
    assert said.startswith("maximal_text_length 510 ends every document within its first chunk: all ways read the same")
    assert length_words.caveats(report) == []  # of a model that always says the same
    assert length_words.answer(report_of(maximal_text_length=511))[0].startswith("Reading past the first 510 tokens")


def test_few_documents_and_a_limit_are_told():
    said = length_words.answer(report_of(num_documents=99, maximal_text_length=1020))

    assert said[0].startswith("Reading past the first 510 tokens, up to 1,020, changes accuracy")
    assert said[-1] == "These are only 99 documents: others might say something else."


def test_what_speaks_against_the_comparison():
    assert length_words.caveats(report_of()) == []
    left_out, trained = length_words.caveats(report_of(trained=("all", None, "all"), num_left_out=1))
    assert left_out.startswith("1 document left out")
    assert "the head (trained with all) and head and tail (its training is not known)" in trained
    assert "biased against a selection that the checkpoint was not trained with" in trained
    report = report_of()
    gpu = report.readings[0].model_copy(update={"device": "H100"})
    (other,) = length_words.caveats(report.model_copy(update={"readings": (gpu, *report.readings[1:])}))
    assert "not scored on the same device" in other


@pytest.mark.parametrize("alike", [(), ("head",), ("head", "head_tail")])
def test_ways_that_are_alike_on_every_document_may_be_those_of_a_model_that_guesses(alike):
    report = report_of()
    zero = {"value": 0.0, "lower": 0.0, "upper": 0.0}
    rows = [row.model_copy(update=zero) if row.compared_with in alike else row for row in report.rows]

    said = length_words.caveats(report.model_copy(update={"rows": tuple(rows)}))

    assert len(said) == len(alike) // 2
    assert all("So is a model that says the same of every document" in sentence for sentence in said)


def test_what_a_checkpoint_was_trained_with():
    reading = report_of().readings[0]
    assert length_words.trained_with(reading) == "selection head"
    other = reading.model_copy(update={"trained_with": ChunkSpec(chunk_size=200, stride=100)})
    assert length_words.trained_with(other) == "selection all, chunk_size 200, stride 100"
    assert length_words.trained_with(reading.model_copy(update={"trained_with": None})) == "not known"


class Shown(HTMLParser):
    """Text of a page, and the tags that it has."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("num_longer", [0, 29, 280])
def test_the_page_shows_all_of_it_and_brings_nothing_to_life(num_longer):
    report = report_of(num_longer=num_longer, trained=("all", "all", "all"))

    page = pages.render("length.html.j2", length_contents.of_length_report(report, RUN)).decode()

    shown = Shown(page)
    text = " ".join(" ".join(shown.text).split())
    for sentence in (*length_words.answer(report), *length_words.caveats(report)):
        assert sentence in text
    assert "<script>alert(2)</script>, ham & eggs" in text
    assert "s3://models/head_tail<i>" in text
    assert ("too few documents to tell" in text) == (num_longer < 30)
    tags = {tag for tag, _ in shown.tags}
    assert tags.isdisjoint({"script", "i", "iframe", "svg", "form", "a"})
    sources = [value for _, attrs in shown.tags for name, value in attrs.items() if name in ("src", "srcset", "href")]
    assert sources
    assert all(source.startswith("data:") for source in sources)
    (policy,) = (attrs["content"] for tag, attrs in shown.tags if tag == "meta" and "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_the_summary_says_the_same_and_a_table():
    report = report_of(num_longer=29)
    receipt = EvaluationReceipt(
        metrics={"num_documents": 400, "accuracy": 0.9}, rejected_by_reason={}, metrics_uri="/m", plot_uris=(),
        length=report,
    )  # fmt: skip

    lines = model_summaries.evaluation_summary(receipt).splitlines()

    for sentence in length_words.answer(report):
        assert sentence in lines
    values = "0.8800 (0.8500 to 0.9100) | 0.9000 (0.8800 to 0.9200) | 0.9034 (0.8800 to 0.9300)"
    assert f"| all documents | 400 | {values} |" in lines
    assert f"| 0 to 510 | 371 | {values} |" in lines
    assert "| 511 to 1,020 | 29 | too few | too few | too few |" in lines
    assert "| head and tail | 340,000 | 8.1 s | selection head_tail | s3://models/head_tail\\<i> |" in lines
    assert "- length report: `/out/length.html` ([open](file:///out/length.html))" in lines
    assert LengthReport.model_validate_json(json.dumps(receipt.model_dump()["length"])) == report
