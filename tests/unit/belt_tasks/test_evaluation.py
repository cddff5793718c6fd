"""Evaluation: a run's predictions against labels, for every task, with the rows that could not be compared."""

import json

import polars as pl
import pytest
import torch

from belt_tasks import checkpoint as checkpoints
from belt_tasks import evaluation, planning, score_tables, storage
from belt_tasks.encoder import ChunkModel, load_body
from belt_tasks.errors import ConfigError
from belt_tasks.score_corpus import score_corpus
from belt_tasks.specs import ChunkSpec, CorpusSpec, Head, PoolingSpec, ScoreSpec
from tests.conftest import words

LABELS = {
    "binary": (("no", "yes"), lambda i: ["no", "yes"][i % 2], "maybe"),
    "multiclass": (("a", "b", "c"), lambda i: "abc"[i % 3], "d"),
    "multilabel": (("a", "b"), lambda i: [["a"], [], ["a", "b"]][i % 3], ["a", "z"]),
    "regression": (("stars",), lambda i: i / 4, float("inf")),
}


def evaluate(encoder, corpus_uri, tmp_path, task):
    checkpoint_uri, pooling = str(tmp_path / "checkpoint"), PoolingSpec()
    head = Head(task=task, labels=LABELS[task][0])
    torch.manual_seed(0)
    checkpoints.save_checkpoint(
        ChunkModel(load_body(encoder), num_logits=head.num_logits, pooling=pooling),
        checkpoint_uri,
        tokenizer_source=str(encoder),
        head=head,
        chunks=ChunkSpec(chunk_size=30, stride=30),
        pooling=pooling,
        data_fingerprint="0" * 64,
        metrics={},
        training={},
    )
    corpus = CorpusSpec()
    labelled = planning.plan_evaluation(corpus_uri, checkpoint_uri, corpus)
    manifest = score_corpus(
        corpus_uri, checkpoint_uri, str(tmp_path / "out"), corpus, ScoreSpec(max_rejected_share=0.2)
    )
    return evaluation.evaluate_run(labelled, corpus, manifest), manifest


@pytest.mark.parametrize("task", LABELS)
def test_metrics_are_of_the_documents_with_a_prediction_and_a_label(tiny_encoder, write_corpus, tmp_path, task):
    _, label, unusable = LABELS[task]
    labels = [label(i) for i in range(12)]
    rows = [(f"d{i}", words(40, seed=i), labels[i]) for i in range(12)]
    rows += [("unknown", "x", unusable), ("missing", "x", None), ("d0", "again", label(1)), ("no text", None, label(0))]
    corpus_uri = write_corpus(pl.DataFrame(rows, schema=["doc_id", "text", "label"], orient="row"), num_files=2)

    receipt, manifest = evaluate(tiny_encoder, corpus_uri, tmp_path, task)

    assert receipt.metrics["num_documents"] == 12
    kind = "target_not_finite" if task == "regression" else "label_unknown"
    assert receipt.rejected_by_reason == {kind: 1, "label_null": 1}
    assert manifest.run["num_documents"] == 14
    assert json.loads(storage.read_bytes(receipt.metrics_uri)) == receipt.metrics
    assert all(storage.read_bytes(uri).startswith(b"\x89PNG") for uri in receipt.plot_uris)
    predicted = score_tables.read_table(str(tmp_path / "out"), "predictions").filter(
        pl.col("doc_id").str.starts_with("d")
    )
    joined = predicted.sort("doc_id").join(
        pl.DataFrame({"doc_id": [f"d{i}" for i in range(12)], "y": labels}), "doc_id"
    )
    if task in ("binary", "multiclass"):
        assert receipt.metrics["accuracy"] == pytest.approx((joined["label"] == joined["y"]).mean())
    if task == "regression":
        assert receipt.metrics["mse"] == pytest.approx(((joined["score"] - joined["y"]) ** 2).mean())


def test_an_evaluation_is_of_its_run_whatever_is_published_since(tiny_encoder, write_corpus, tmp_path):
    rows = [(f"d{i}", words(40, seed=i), i / 4) for i in range(12)]
    corpus_uri = write_corpus(pl.DataFrame(rows, schema=["doc_id", "text", "label"], orient="row"))
    before, manifest = evaluate(tiny_encoder, corpus_uri, tmp_path, "regression")
    checkpoint_uri, chunks = str(tmp_path / "checkpoint"), ChunkSpec(chunk_size=5, stride=5)
    score_corpus(corpus_uri, checkpoint_uri, str(tmp_path / "out"), spec=ScoreSpec(chunks=chunks))

    plan = planning.plan_evaluation(corpus_uri, checkpoint_uri, CorpusSpec())
    assert evaluation.evaluate_run(plan, CorpusSpec(), manifest) == before
    stranger = manifest.model_copy(update={"run": manifest.run | {"run_id": "0" * 16}})
    with pytest.raises(ConfigError, match=r"table predictions never showed run 0{16}"):
        evaluation.evaluate_run(plan, CorpusSpec(), stranger)


def test_nothing_to_compare_is_one_clear_error(tiny_encoder, write_corpus, tmp_path):
    corpus_uri = write_corpus({"doc_id": ["a"], "text": ["x"], "label": ["never seen"]})

    with pytest.raises(ConfigError, match=r"nothing to evaluate: of 0 labelled and 1 scored .*label_unknown"):
        evaluate(tiny_encoder, corpus_uri, tmp_path, "binary")


def test_labels_of_the_wrong_type_are_refused_before_scoring(tiny_encoder, write_corpus, tmp_path):
    corpus_uri = write_corpus({"doc_id": ["a"], "text": ["x"], "label": [["list"]]})

    with pytest.raises(ConfigError, match="column 'label' must hold class names"):
        evaluate(tiny_encoder, corpus_uri, tmp_path, "binary")
