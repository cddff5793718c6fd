"""The report: figures against numbers worked out by hand, and a peer that failed has a line and a reason."""

import io
import json

import pytest
from matplotlib.image import imread

from tests.benchmarks import plot, report
from tests.benchmarks.report import Asked, Scored
from tests.benchmarks.rounds import Outcome

ALL = Asked(num_documents=10, num_chunks=20, num_content_tokens=5_000, needed_flops=3e9)
FIRST = Asked(num_documents=10, num_chunks=10, num_content_tokens=3_000, needed_flops=2e9)
MB = 1_000_000


def outcome(peer, seconds, **more):
    return Outcome(peer=peer, seconds=seconds, peak_rss_bytes=[100 * MB, 300 * MB, 200 * MB][: len(seconds)], **more)


@pytest.fixture
def scored():
    outcomes = [
        outcome("belt", [2.0, 1.0, 5.0], largest_difference=1.25e-7),
        outcome("belt-bf16", [1.0, 1.0, 1.0], largest_difference=0.002),
        outcome("hf-loop", [4.0, 6.0, 5.0], largest_difference=0.0),
        outcome("hf-pipeline", [3.0, 3.0, 3.0], configuration="batch 8"),
        Outcome(peer="onnxruntime", reason="onnxruntime is not installed"),
    ]
    asked = {one.peer: FIRST if one.peer == "hf-pipeline" else ALL for one in outcomes}
    ceilings = [{"fp32": 4e9, "bf16": None}, {"fp32": 6e9, "bf16": None}, {"fp32": 5e9, "bf16": None}, {}]
    return Scored(title="long, 510/510", outcomes=outcomes, asked=asked, ceilings=ceilings)


def test_figures_come_from_the_median_round_and_the_best_limit(scored):
    belt = scored.rows()[0]

    assert (belt.seconds, belt.documents_per_s, belt.tokens_per_s) == (2.0, 5.0, 2_500.0)
    assert belt.of_limit == 3e9 / 2.0 / 6e9
    assert belt.peak_rss_bytes == 300 * MB
    assert belt.spread == 2.0


def test_ratios_say_how_many_times_as_fast_belt_is(scored):
    ratios = {row.peer: row.belt_ratio for row in scored.rows()}

    assert ratios["belt"] == {"fp32": 1.0, "bf16": 2.0}
    assert ratios["hf-loop"] == {"fp32": 2.5, "bf16": 5.0}
    assert ratios["onnxruntime"] == {"fp32": None, "bf16": None}


def test_less_work_is_counted_as_less(scored):
    pipeline = scored.rows()[3]

    assert pipeline.less_work
    assert (pipeline.tokens_per_s, pipeline.of_limit) == (1_000.0, 2e9 / 3.0 / 6e9)


def test_without_belt_there_is_no_ratio(scored):
    alone = Scored(title="", outcomes=scored.outcomes[2:3], asked=scored.asked, ceilings=[])

    (row,) = alone.rows()

    assert row.belt_ratio == {"fp32": None, "bf16": None}
    assert row.of_limit is None
    assert "belt fp32 is" not in report.table([row])


def test_the_table_is_markdown(scored):
    lines = report.table(scored.rows()).splitlines()

    assert len({len(line) for line in lines}) == 1
    assert [cell.strip() for cell in lines[0].split("|")[1:4]] == ["peer", "documents/s", "chunk tokens/s"]
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "belt fp32",
        "5.00",
        "2,500",
        "1.00 x",
        "2.00 x",
        "25%",
        "1.2e-07",
        "300 MB",
        "200%",
        "contracts, digest, manifest",
    ]


def test_a_peer_that_failed_has_a_line_and_a_reason(scored):
    text = report.markdown([scored], report.machine(2, busy=0.0))

    assert "| ONNX Runtime fp32" in text
    assert "- ONNX Runtime fp32: no result: onnxruntime is not installed" in text
    assert "- HF pipeline, truncation: fastest on the probe with batch 8" in text
    assert "limit of this machine: 6 GFLOP/s in fp32" in text


def test_a_busy_machine_is_told(scored):
    text = report.markdown([scored], report.machine(2, busy=0.5))

    assert "Other programs kept 50% of this machine busy before the start" in text
    assert "Other programs" not in report.markdown([scored], report.machine(2, busy=0.05))


def test_without_the_reference_the_report_says_so(scored):
    alone = Scored(title="", outcomes=scored.outcomes[:1], asked=scored.asked, ceilings=[])

    assert "nothing to compare probabilities with: hf-loop did not run" in report.markdown(
        [alone], report.machine(2, busy=0.0)
    )


@pytest.mark.parametrize(
    ("value", "expected"), [(None, "-"), (0.01234, "0.0123"), (4.0, "4.00"), (99.96, "100"), (12_345.6, "12,346")]
)
def test_rates_have_three_digits(value, expected):
    assert report.rate(value) == expected


def test_every_figure_is_in_the_json(scored):
    figures = json.loads(json.dumps(report.figures(scored)))

    assert [peer["peer"] for peer in figures["peers"]] == [one.peer for one in scored.outcomes]
    assert figures["peers"][0]["rounds"]["seconds"] == [2.0, 1.0, 5.0]
    assert figures["peers"][0]["asked"]["num_chunks"] == 20


def test_the_plot_is_a_png_that_grows_with_its_bars(scored):
    rows = scored.rows()

    one = imread(io.BytesIO(plot.bars_png([("long", rows[:1])], "a machine")))
    two = imread(io.BytesIO(plot.bars_png([("long", rows), ("short", rows)], "a machine")))

    assert one.shape[1] == two.shape[1]
    assert one.shape[0] < two.shape[0]


def test_a_plot_without_results_is_still_a_plot(scored):
    assert plot.bars_png([("long", scored.rows()[-1:])], "").startswith(b"\x89PNG")
