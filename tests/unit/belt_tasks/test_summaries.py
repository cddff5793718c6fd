import re
from datetime import UTC, datetime, timedelta
from urllib.parse import quote

import pytest
from markdown_it import MarkdownIt

from belt_tasks import markdown, model_summaries, summaries
from belt_tasks.calibration import Calibration
from belt_tasks.drift import DriftReport, Measure
from belt_tasks.evaluation import EvaluationReceipt
from belt_tasks.fine_tuning import Epoch, FineTuningReceipt
from belt_tasks.gate import Check, DecisionRecord
from belt_tasks.publishing import Manifest, RunRef
from belt_tasks.receipts import FileReceipt
from belt_tasks.report import ScoreReport
from belt_tasks.specs import ChunkSpec, CorpusSpec, DriftSpec, GateSpec, Head, ScoreSpec

ASKED_AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def manifest(**changes) -> Manifest:
    run = {
        "flow": "score",
        "run_id": "0123456789abcdef",
        "output_uri": "s3://bucket/out",
        "base_run_id": "fedcba9876543210",
        "num_new": 12_000,
        "num_changed": 345,
        "num_unchanged": 7_000,
        "num_removed": 0,
        "num_documents": 12_345,
        "num_rejected": 3,
        "num_tokens": 1_000_000,
        "num_tokens_scored": 995_000,
        "num_chunks": 2_000,
        "num_shards": 2,
        "elapsed_s": 61.25,
        "read_s": 2.0,
        "tokenize_s": 4.0,
        "encode_s": 50.0,
        "write_s": 0.0,
        "tokens_per_s": 21_000.4,
        "num_documents_reused": 0,
        "padding_share": None,
        "redundant_chunk_share": None,
        "flops_per_s": None,
        "peak_share": None,
        "precision": None,
        "device": "cpu",
        "spec": ScoreSpec(chunks=ChunkSpec(minimal_chunk_length=100)).model_dump_json(),
        "finished_at": (ASKED_AT + timedelta(minutes=1)).isoformat(),
    }
    return Manifest(
        run=run | changes,
        labels=("a", "b"),
        rejected_by_reason={"text_null": 1, "doc_id_null": 2},
        files=(
            FileReceipt(table="rejected", path="r", num_rows=3),
            FileReceipt(table="predictions", path="p", num_rows=12_345),
        ),
    )


def test_run_summary():
    assert summaries.run_summary(manifest(), asked_at=ASKED_AT).splitlines() == [
        "## score: 12,345 documents, run 0123456789abcdef",
        "",
        "|  |  |",
        "| --- | --- |",
        "| documents | 12,345 |",
        "| of the corpus | new 12,000, changed 345, unchanged 7,000, removed 0, since run fedcba9876543210 |",
        "| rejected rows | 3 (doc_id_null 2, text_null 1) |",
        "| content tokens | 1,000,000, 99.5% of them in a chunk (minimal_chunk_length 100) |",
        "| chunks | 2,000 |",
        "| shards | 2 |",
        "| wall clock | 61.2 s |",
        "",
        "| stage | seconds | tokens per second |",
        "| --- | --- | --- |",
        "| read | 2.0 s | 500,000 |",
        "| tokenize | 4.0 s | 250,000 |",
        "| encode | 50.0 s | 21,000 |",
        "",
        "- output: `s3://bucket/out`",
        "- run: `s3://bucket/out/runs/0123456789abcdef`",
        "- manifest: `s3://bucket/out/runs/0123456789abcdef/manifest.json`",
        "- predictions: `s3://bucket/out/tables/predictions` (Delta Lake)",
        "- evidence: `s3://bucket/out/tables/evidence` (Delta Lake)",
        "- rejected: `s3://bucket/out/tables/rejected` (Delta Lake)",
        "- runs: `s3://bucket/out/tables/runs` (Delta Lake)",
    ]


def report(output: str, **changes) -> ScoreReport:
    folder = f"{output}/runs/0123456789abcdef"
    values = {
        "run": RunRef(output_uri=output, run_id="0123456789abcdef"),
        "report_uri": f"{folder}/report/index.html",
        "quality_uri": f"{folder}/report/rejected.html",
        "statistics_uri": f"{folder}/statistics.json",
        "checkpoint_digest": "c",
        "scoring_fingerprint": "f",
        "data_version": "d",
        "is_reference": True,
        "drift": None,
        "spec": DriftSpec(),
    }
    return ScoreReport(**values | changes)


def test_a_summary_leads_to_the_report_and_says_whether_there_is_drift():
    shown = summaries.run_summary(manifest(), asked_at=ASKED_AT, report=report("s3://bucket/out")).splitlines()

    where = shown.index("- output: `s3://bucket/out`")
    folder = "s3://bucket/out/runs/0123456789abcdef"
    assert shown[where - 2 : where + 5] == [
        "This run is what later ones are compared with.",
        "",
        "- output: `s3://bucket/out`",
        f"- report: `{folder}/report/index.html`",
        f"- data quality: `{folder}/report/rejected.html`",
        f"- statistics: `{folder}/statistics.json`",
        f"- run: `{folder}`",
    ]


def test_a_page_with_an_address_can_be_opened():
    page = report("s3://bucket/out").report_uri
    links = {page: "https://store/page?signature=a"}

    told = summaries.run_summary(manifest(), asked_at=ASKED_AT, report=report("s3://bucket/out"), links=links)

    assert f"- report: `{page}` ([open](https://store/page?signature=a))" in told.splitlines()
    assert told.count("[open]") == 1


def test_a_link_to_a_file_is_one_whatever_the_folder_is_called():
    told = summaries.report_summary(report("/data/a (b) c%"))

    folder = "/data/a (b) c%/runs/0123456789abcdef/report/index.html"
    assert f"- report: `{folder}` ([open](file://{quote(folder)}))" in told


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"verdict": "none"}, "No drift."),
        (
            {"verdict": "too_few_documents"},
            "No verdict on drift: fewer than 200 documents (7 here, 5,000 in the reference).",
        ),
        (
            {
                "verdict": "drifted",
                "measures": (
                    Measure(quantity="scores", statistic="psi", value=0.3, limit=0.2, passed=False),
                    Measure(quantity="scores", statistic="ks", value=0.01, limit=0.1, passed=True),
                    Measure(quantity="lengths", statistic="psi", value=2.5, limit=0.2, passed=False),
                    Measure(quantity="lengths", statistic="ks", value=0.5, limit=0.1, passed=False),
                ),
            },
            "Drift: scores (PSI 0.30), document lengths (PSI 2.50, KS 0.50).",
        ),
    ],
)
def test_drift_is_told_in_a_line(found, words):
    drift = {"measures": (), "num_documents": 7, "num_documents_reference": 5_000, "reference_run_ids": ("r",)} | found
    told = report("/out", drift=DriftReport(**drift, spec=DriftSpec()), is_reference=False)

    assert words in summaries.report_summary(told).splitlines()
    assert told.has_drifted == (found["verdict"] == "drifted")


def test_the_cost_of_a_run_is_told_where_it_is_known():
    told = summaries.run_summary(
        manifest(
            num_documents_reused=45,
            padding_share=0.0312,
            redundant_chunk_share=0.25,
            flops_per_s=3.2e14,
            peak_share=0.3236,
            precision="bf16",
            device="NVIDIA H100 80GB HBM3",
        ),
        asked_at=ASKED_AT,
    ).splitlines()

    assert "| chunks | 2,000, 25.0% of them redundant |" in told
    assert "| documents whose text was encoded already | 45 |" in told
    assert "| padding | 3.1% of what was computed |" in told
    assert (
        "| arithmetic that the scores need | 320,000 GFLOP/s in bf16 on NVIDIA H100 80GB HBM3, 32.4% of its peak |"
        in told
    )


@pytest.mark.parametrize(
    ("chunks", "told"),
    [
        (ChunkSpec(), "99.5% of them in a chunk |"),
        (ChunkSpec(maximal_text_length=1020), "99.5% of them in a chunk (maximal_text_length 1,020) |"),
        (
            ChunkSpec(selection="head", minimal_chunk_length=9),
            "99.5% of them in a chunk (selection head, minimal_chunk_length 9) |",
        ),
    ],
)
def test_what_left_tokens_unread_is_told(chunks, told):
    for spec in (ScoreSpec(chunks=chunks), chunks):  # of scoring, and of chunking
        shown = summaries.run_summary(manifest(spec=spec.model_dump_json()), asked_at=ASKED_AT).splitlines()

        assert f"| content tokens | 1,000,000, {told}" in shown


def test_a_run_that_had_finished_before_it_was_asked_for_says_so():
    for flow, words in {
        "score": "Nothing has changed since run 0123456789abcdef, so nothing was scored. What that run did:",
        "chunk": "This run was complete already: nothing was done again.",
    }.items():
        assert words in summaries.run_summary(manifest(flow=flow), asked_at=ASKED_AT + timedelta(minutes=2))
        assert words not in summaries.run_summary(manifest(flow=flow), asked_at=ASKED_AT)


def test_documents_that_were_scored_though_they_had_not_changed_are_told():
    words = "unchanged 7,000 (some of them scored again)"

    assert words in summaries.run_summary(manifest(num_documents=19_345), asked_at=ASKED_AT)
    assert words not in summaries.run_summary(manifest(), asked_at=ASKED_AT)


def test_run_summary_of_nothing():
    nothing = manifest(
        num_documents=0,
        num_tokens=0,
        num_tokens_scored=0,
        num_chunks=0,
        encode_s=0.0,
        tokens_per_s=None,
        num_rejected=0,
    )

    shown = summaries.run_summary(nothing, asked_at=ASKED_AT)

    assert "| content tokens | 0 |" in shown
    assert "| rejected rows | 0 |" in shown
    assert "chunks |" not in shown
    assert "| encode |" not in shown


def tuned(**changes):
    """A fine-tuning's receipt, but for what a test says."""
    values = {
        "checkpoint_uri": "/out/checkpoint", "checkpoint_digest": "0" * 64, "labels": ("a", "b"), "task": "multilabel",
        "num_training_documents": 90, "num_validation_documents": 10, "best_epoch": 1, "num_chunks": 1_500,
        "epochs": (Epoch(number=1, training_loss=0.9, validation=None),), "num_tokens_scored": 4_000,
        "num_tokens_encoded": 5_000, "training_s": 10.0,
    }  # fmt: skip
    return FineTuningReceipt(**(values | changes))


@pytest.mark.parametrize(
    ("task", "metric", "validation", "cells"),
    [
        ("multiclass", "accuracy", {"loss": 0.5, "accuracy": 0.75}, "0.5000 | 0.7500"),
        ("regression", "mse", {"loss": 0.5, "mse": 0.25}, "0.5000 | 0.2500"),
        ("multilabel", "micro_f1", {"loss": 0.5}, "0.5000 | "),
        ("binary", "accuracy", None, " | "),
    ],
)
def test_fine_tuning_summary(task, metric, validation, cells):
    receipt = tuned(
        labels=tuple(f"label-{i}" for i in range(12)),
        task=task,
        epochs=(
            Epoch(number=1, training_loss=0.9, validation=validation),
            Epoch(number=2, training_loss=0.8, validation=validation),
        ),
        best_epoch=2,
    )

    lines = model_summaries.fine_tuning_summary(receipt).splitlines()

    assert lines[0] == f"## fine-tuning: {task} ({', '.join(f'label-{i}' for i in range(10))}, ...)"
    assert f"| epoch | training loss | validation loss | {metric} |" in lines
    assert f"| 1 | 0.9000 | {cells} |" in lines
    assert f"| 2 (kept) | 0.8000 | {cells} |" in lines
    assert "- trained on 90 documents, 10 held out" in lines
    assert "- 10.0 s, 1,000 tokens per second" in lines
    assert "- checkpoint: `/out/checkpoint`" in lines


@pytest.mark.parametrize(
    ("calibration", "how", "limits"),
    [
        (Calibration(slope=(0.5,)), "temperature 2.00", ""),
        (Calibration(slope=(0.5, 1.0), offset=(0.0, 1.0)), "slope and offset of each label", ""),
        (
            Calibration(slope=(0.5, 19.99), offset=(0.0, 1.0)),
            "slope and offset of each label",
            "; a slope is at the end of 0.05 to 20, and one beyond would fit them better",
        ),
    ],
)
def test_a_calibration_is_told(calibration, how, limits):
    receipt = tuned(
        calibration=calibration,
        metrics={"ece": 0.02, "log_loss": 0.4, "uncalibrated": {"ece": 0.11, "log_loss": 0.5, "loss": 0.5}},
    )

    told = f"- calibrated on them ({how}): expected calibration error 0.110 to 0.020, log loss 0.500 to 0.400"
    told += limits
    assert told in model_summaries.fine_tuning_summary(receipt).splitlines()


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (
            {"accuracy": 0.5, "majority_baseline_accuracy": 0.5},
            "right on 50.0% of them, no more than who always guesses",
        ),
        (
            {"accuracy": 0.4, "majority_baseline_accuracy": 0.5},
            "right on 40.0% of them, no more than who always guesses",
        ),
        ({"accuracy": 0.51, "majority_baseline_accuracy": 0.5}, None),
        ({"accuracy": 0.5, "majority_baseline_accuracy": 0.5, "auc": 0.59}, "right on 50.0% of them"),
        ({"accuracy": 0.95, "majority_baseline_accuracy": 0.95, "auc": 0.98}, None),
        ({"r2": -0.0123}, "no nearer to their numbers than their mean is (R2 -0.012)"),
        ({"r2": 0.01}, None),
        ({"r2": None}, None),
        ({}, None),
    ],
)
def test_a_model_that_a_guess_equals_is_told(metrics, said):
    lines = model_summaries.fine_tuning_summary(tuned(metrics=metrics)).splitlines()

    told = [line for line in lines if "nothing that helps has been learned" in line]
    assert len(told) == (said is not None)
    assert all(said in line for line in told)


def test_evaluation_summary_shows_what_was_measured_and_where_the_rest_is():
    receipt = EvaluationReceipt(
        metrics={"num_documents": 1_234, "accuracy": 0.5, "auc": None, "per_class": {}},
        rejected_by_reason={"label_null": 2, "label_unknown": 1},
        metrics_uri="/out/metrics.json",
        plot_uris=("/out/reliability.png",),
    )

    assert model_summaries.evaluation_summary(receipt).splitlines() == [
        "## evaluation: 1,234 documents",
        "",
        "| metric | value |",
        "| --- | --- |",
        "| accuracy | 0.5000 |",
        "| AUC |  |",
        "",
        "- labels put aside: 3 (label_null 2, label_unknown 1)",
        "- all metrics: `/out/metrics.json`",
        "- plot: `/out/reliability.png`",
    ]


def test_no_label_can_speak_as_the_gate():
    label = "ok\n\n## promote: every check passed\n\n<img src=x onerror=alert(1)> `a` [b](c) \\<i> \u202e" + "x" * 100
    numbers = dict.fromkeys(("accuracy", "macro_f1"), 0.5)
    head = Head(task="multiclass", labels=(label, "b"))
    record = DecisionRecord(
        decision="reject",
        why=f"no champion to compare with; not passed: recall of {label}",
        champion_digest=None,
        challenger_digest="1" * 64,
        head=head,
        metric="accuracy",
        gain=None,
        gain_lower=None,
        gain_upper=None,
        checks=(Check(name="recall", label=label, number=0.1, limit=0.5, passed=False),),
        labels_without_documents=(label,),
        num_documents=3,
        documents_fingerprint="0" * 64,
        corpus_uri="/c",
        corpus=CorpusSpec(),
        score_spec=ScoreSpec(),
        gate=GateSpec(),
        champion_metrics={},
        challenger_metrics=numbers,
    )

    told = model_summaries.decision_summary(record)

    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(told)
    assert re.findall(r"<h\d>.*", page) == ["<h2>reject: 3 held-out documents</h2>"]
    assert not re.search(r"<(img|i|a)\b", page)
    assert page.count("&lt;img src=x onerror=alert") == 3
    assert "\u202e" not in told


def test_cells_cannot_break_their_table():
    assert markdown.table(["a", "b"], [["x\n|y", "1"]]) == ["| a | b |", "| --- | --- |", r"| x \|y | 1 |"]
