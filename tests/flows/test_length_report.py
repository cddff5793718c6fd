"""`belt evaluate --length-report`: its numbers are those of other means, and nothing is scored twice."""

import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import scipy.stats
import torch
from typer.testing import CliRunner

from belt_tasks import checkpoint as checkpoints
from belt_tasks import score_tables
from belt_tasks.length_comparison import LengthReport
from belt_tasks.scoring import score_texts
from belt_tasks.specs import ChunkSpec, ScoreSpec
from flows import cli
from flows.evaluate import evaluate
from tests.conftest import save_tiny_checkpoint, save_tiny_encoder, words

LABELS = ("<b>ham</b>", "other", "spam")
WAYS = ("head", "head_tail", "all")


def belt(*arguments):
    """(exit code, stdout, stderr) of a command."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


TEXTS = [words(length, seed=length) for length in range(0, 160, 2)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Checkpoints of the selections that they were made for; none says the same of every text."""
    root = tmp_path_factory.mktemp("models")
    found = {}
    for seed, selection in enumerate(("all", "head")):
        (root / f"encoder-{seed}").mkdir()
        encoder = save_tiny_encoder(root / f"encoder-{seed}", "bert", seed=seed)
        checkpoint = checkpoints.load_checkpoint(save_tiny_checkpoint(root / f"as-made-{seed}", encoder, LABELS))
        logits_DL = score_texts(TEXTS, checkpoint, ScoreSpec(device="cpu")).logits_DL
        with torch.no_grad():
            checkpoint.model.head.linear.bias -= torch.from_numpy(np.median(logits_DL, axis=0))
        checkpoints.save_checkpoint(
            checkpoint.model,
            str(root / selection),
            tokenizer_source=str(encoder),
            head=checkpoint.head,
            chunks=checkpoint.chunks.model_copy(update={"selection": selection}),
            pooling=checkpoint.pooling,
            data_fingerprint="0" * 64,
            metrics={},
            training={},
        )
        found[selection] = str(root / selection)
    return found


@pytest.fixture(scope="module")
def documents(models) -> pl.DataFrame:
    """Of 0 to some 240 tokens; of two in three the label is what a model says of them."""
    said = score_texts(TEXTS, checkpoints.load_checkpoint(models["all"]), ScoreSpec(device="cpu")).logits_DL
    labels = [LABELS[(row.argmax() + (i % 3 == 0)) % 3] for i, row in enumerate(said)]
    return pl.DataFrame({"doc_id": [f"d{i:02}" for i in range(len(TEXTS))], "text": TEXTS, "label": labels})


def expected(models, documents) -> dict[str, np.ndarray]:
    """Whether each way is right of each document, by scoring texts in memory."""
    true = np.array([LABELS.index(label) for label in documents["label"]])
    right = {}
    for selection in WAYS:
        checkpoint = checkpoints.load_checkpoint(models["head" if selection == "head" else "all"])
        chunks = ChunkSpec(chunk_size=30, stride=30, selection=selection)
        scores = score_texts(documents["text"].to_list(), checkpoint, ScoreSpec(device="cpu", chunks=chunks))
        right[selection] = scores.scores_DL.argmax(axis=1) == true
    return right


def test_the_page_says_what_other_means_find(models, documents, tmp_path):
    (tmp_path / "corpus").mkdir()
    documents.write_parquet(tmp_path / "corpus" / "a.parquet")
    output = tmp_path / "out"
    arguments = ["evaluate", tmp_path / "corpus", "--checkpoint", models["all"], "--output", output, "--length-report"]
    arguments += ["--head-checkpoint", models["head"], "--min-bucket-documents", "10", "--num-resamples", "4000"]

    code, shown, said = belt(*arguments)

    assert code == 0, said
    (numbers,) = output.glob("runs/*/evaluation/length.json")
    report = LengthReport.model_validate_json(numbers.read_bytes())
    table = pl.read_parquet(numbers.with_suffix(".parquet"))
    assert table.to_dicts() == [row.model_dump() for row in report.rows]
    right = expected(models, documents)
    num_tokens = score_tables.read_table(str(output), "predictions")["num_tokens"].to_numpy()
    everything = report.group("all")
    for selection in WAYS:
        assert report.row(everything, selection).value == pytest.approx(right[selection].mean())
    for other in WAYS[:2]:
        row = report.row(everything, "all", other)
        assert row.value == pytest.approx(right["all"].mean() - right[other].mean())
        oracle = scipy.stats.bootstrap(
            (right["all"], right[other]), lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis), paired=True,
            vectorized=True, method="percentile", n_resamples=4000, rng=0,
        ).confidence_interval  # fmt: skip
        width = oracle.high - oracle.low
        assert width > 0
        assert (row.lower, row.upper) == pytest.approx((oracle.low, oracle.high), abs=0.15 * width)
    for group in report.buckets:
        inside = (num_tokens >= group.min_tokens) & (num_tokens <= group.max_tokens)
        assert (group.num_documents, group.is_too_small) == (inside.sum(), inside.sum() < 10)
        if not group.is_too_small:
            assert report.row(group, "head").value == pytest.approx(right["head"][inside].mean())

    read = {"head": np.minimum(num_tokens, 30).sum(), "all": num_tokens.sum()}
    points, lower, upper = (
        100 * getattr(report.row(everything, "all", "head"), n) for n in ("value", "lower", "upper")
    )
    sentence = (
        f"Reading past the first 30 tokens changes accuracy by {points:+.1f} points (95 % CI {lower:+.1f} to "
        f"{upper:+.1f}) and costs {read['all'] / read['head']:.1f} times as much ({read['all']:,} tokens encoded "
        f"against {read['head']:,}"
    )
    page = numbers.with_suffix(".html").read_text(encoding="utf-8")
    assert sentence in shown
    assert sentence.replace("+", "&#43;") in page or sentence in page
    assert "&lt;b&gt;ham&lt;/b&gt;" in page
    assert "<b>" not in page
    assert f"| {len(documents)} | {right['head'].mean():.4f} (" in shown
    assert "biased against a selection that the checkpoint was not trained with" in shown
    assert [reading.checkpoint_uri for reading in report.readings] == [models["head"], models["all"], models["all"]]
    assert [reading.trained_with.selection for reading in report.readings] == ["head", "all", "all"]
    assert "for the selection that it read: head and tail (trained with all)." in shown

    # the seconds are those of the runs, the evaluation's own is one of them, and only it is published
    runs = {run.name for run in output.glob("length/runs/*")}
    assert len(runs) == 2
    assert not (output / "length" / "tables").exists()
    for reading in report.readings:
        manifest = Path(reading.output_uri, "runs", reading.run_id, "manifest.json").read_text()
        assert f'"encode_s": {reading.encode_s}' in manifest
    assert report.reading("all").run_id == report.run_id
    assert len(list(output.glob("runs/*"))) == 1

    # killed before a way was complete, the same command goes on with its finished shards
    (output / "length" / "runs" / report.reading("head").run_id / "manifest.json").unlink()
    assert belt(*arguments)[0] == 0
    again = LengthReport.model_validate_json(numbers.read_bytes())
    assert again == report
    assert {run.name for run in output.glob("length/runs/*")} == runs


def test_a_mistake_is_told_before_anything_is_scored(models, documents, tiny_checkpoint, tmp_path):
    (tmp_path / "corpus").mkdir()
    documents.write_parquet(tmp_path / "corpus" / "a.parquet")
    arguments = ["evaluate", tmp_path / "corpus", "--checkpoint", models["all"], "--output", tmp_path / "out"]

    code, _, said = belt(*arguments, "--length-report", "--head-tail-checkpoint", tiny_checkpoint)

    assert code == 1
    assert re.fullmatch(
        "Error: head_tail_checkpoint_uri: must have the task and the labels of .*all .multiclass of <b>ham</b>, "
        "other, spam., got multiclass of ham, other, spam of .*\n",
        said,
    )
    assert not (tmp_path / "out").exists()
    state = evaluate(
        str(tmp_path / "corpus"), models["all"], str(tmp_path / "out"), head_checkpoint_uri="x", return_state=True
    )
    assert "go with length" in state.message
