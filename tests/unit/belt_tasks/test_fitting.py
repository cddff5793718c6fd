"""What people expect around a training loop: weights, splits, the best epoch, patience, and measurements elsewhere."""

import json
import logging
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from belt_tasks import checkpoint as checkpoints
from belt_tasks import fine_tuning, fitting, heads, planning, storage, trainer, training_log
from belt_tasks.errors import ConfigError
from belt_tasks.model_summaries import fine_tuning_summary
from belt_tasks.scoring import score_texts
from belt_tasks.specs import BatchSpec, ChunkSpec, CorpusSpec, Head, ScoreSpec, TrainSpec
from belt_tasks.training_loop import DivergedError
from belt_tasks.training_set import TrainingSet, label_weights
from tests.conftest import labelled_rows, words
from tests.fine_tuned import fine_tuned, prepared, validation_shards

SPEC = TrainSpec(
    chunks=ChunkSpec(chunk_size=24, stride=18),
    batches=BatchSpec(max_batch_tokens=200),
    device="cpu",
    epochs=2,
    learning_rate=2e-3,
    documents_per_batch=3,
    dropout=0.0,
    validation_fraction=0.3,
)
ROWS = labelled_rows(40, most_words=60)


def rejected_of(plan, receipts):
    uris = [storage.join(plan.run.output_uri, file.path) for each in receipts for file in each.files_of("rejected")]
    return pl.concat([pl.DataFrame(storage.read_parquet(uri)) for uri in uris]).sort("row_index")


# the best epoch and patience


def fit_with(monkeypatch, write_corpus, encoder, output, values, **changes):
    """Fine-tune while validation says what it is told to; returns the receipt, or raises."""
    said = iter(values)
    really = trainer.Trainer.measure

    def measure(self, *args):
        return really(self, *args) | next(said, {})

    monkeypatch.setattr(trainer.Trainer, "measure", measure)
    spec = SPEC.model_copy(update={"epochs": len(values), **changes})
    return fine_tuned(write_corpus(ROWS, name="labelled"), encoder, output, spec)


@pytest.mark.parametrize(
    ("values", "changes", "num_epochs", "best"),
    [
        ([{"loss": 0.5}, {"loss": 0.4}, {"loss": 0.6}, {"loss": 0.3}], {}, 4, 4),
        ([{"loss": 0.5}, {"loss": 0.4}, {"loss": 0.6}, {"loss": 0.3}], {"early_stopping_patience": 1}, 3, 2),
        ([{"loss": 0.5}, {"loss": 0.6}, {"loss": 0.4}, {"loss": 0.7}], {"early_stopping_patience": 2}, 4, 3),
        ([{"auc": auc, "loss": 0.5} for auc in (0.5, 0.9, None, 0.9)], {"metric_for_best_model": "auc"}, 4, 2),
        ([{"log_loss": 0.5}, {"log_loss": 0.9}], {"metric_for_best_model": "log_loss"}, 2, 1),
        ([{"auc": 0.5, "loss": 0.9}, {"auc": 0.5, "loss": 0.7}], {"metric_for_best_model": "auc"}, 2, 2),
        ([{"loss": float("nan")}, {"loss": 2.0}], {}, 2, 2),
    ],
)
def test_the_best_epoch_is_kept_and_patience_ends(
    monkeypatch, write_corpus, tiny_encoder, tmp_path, values, changes, num_epochs, best
):
    receipt = fit_with(monkeypatch, write_corpus, tiny_encoder, tmp_path, values, **changes)

    assert (len(receipt.epochs), receipt.best_epoch) == (num_epochs, best)
    told = f"stopped early: {receipt.patience} epoch without a better one than epoch {best}"
    assert (told in fine_tuning_summary(receipt)) == (num_epochs < len(values))


def test_patience_outlasts_a_crash(monkeypatch, write_corpus, tiny_encoder, tmp_path):
    """A state saved when patience was at its end does not train on."""
    corpus = write_corpus(ROWS, name="labelled")
    spec = SPEC.model_copy(update={"epochs": 9, "early_stopping_patience": 1})
    whole = fine_tuned(corpus, tiny_encoder, tmp_path / "whole", spec.model_copy(update={"learning_rate": 1e-9}))
    plan, receipts = prepared(corpus, tiny_encoder, tmp_path / "cut", spec.model_copy(update={"learning_rate": 1e-9}))

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(fine_tuning, "save_checkpoint", fail)
    with pytest.raises(KeyboardInterrupt):
        fine_tuning.fine_tune_prepared(plan, receipts, spec.model_copy(update={"learning_rate": 1e-9}))
    monkeypatch.undo()
    found = fine_tuning.fine_tune_prepared(plan, receipts, spec.model_copy(update={"learning_rate": 1e-9}))

    assert len(found.epochs) == len(whole.epochs) < 9
    assert found.checkpoint_digest == whole.checkpoint_digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"metric_for_best_model": "mse"},
            "metric_for_best_model of a binary or multiclass task must be one of .*, got 'mse'",
        ),
        (
            {"validation_fraction": 0.0, "early_stopping_patience": 2},
            r"need documents held out, but there are none: raise validation_fraction \(0.0\)",
        ),
        ({"label_weights": {"fux": 2.0}}, "label_weights: no such labels as 'fux'; the training documents have 'fox'"),
        ({"validation_split": "test"}, "validation_split 'test' needs a column that tells splits apart"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(write_corpus, tiny_encoder, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        fine_tuned(write_corpus(ROWS, name="labelled"), tiny_encoder, tmp_path, SPEC.model_copy(update=changes))


@pytest.mark.parametrize(
    ("column", "changes", "message"),
    [
        (pl.lit(0.5), {"label_weights": "balanced"}, "label_weights: a regression has no labels to weigh"),
        (pl.lit(0.5), {"metric_for_best_model": "auc"}, "of a regression task must be one of mse, .*, got 'auc'"),
        (
            pl.lit(["fox"]),
            {"metric_for_best_model": "mse"},
            "of a multilabel task must be one of micro_f1, .*, got 'mse'",
        ),
    ],
)
def test_what_does_not_fit_the_label_column_is_refused_before_work_starts(
    write_corpus, tiny_encoder, tmp_path, column, changes, message
):
    corpus = write_corpus(ROWS.with_columns(label=column), name="labelled")

    with pytest.raises(ConfigError, match=message):
        planning.plan_fine_tuning(
            corpus, str(tiny_encoder), str(tmp_path), CorpusSpec(), SPEC.model_copy(update=changes)
        )


def test_what_does_not_fit_the_task_is_refused_without_a_plan_too(write_corpus, tiny_encoder, tmp_path):
    plan, receipts = prepared(write_corpus(ROWS, name="labelled"), tiny_encoder, tmp_path, SPEC)

    with pytest.raises(ConfigError, match=r"metric_for_best_model of a binary task must be one of .*, got 'mse'"):
        fine_tuning.fine_tune_prepared(plan, receipts, SPEC.model_copy(update={"metric_for_best_model": "mse"}))


# divergence


def test_a_loss_that_diverges_leaves_the_last_good_epoch(monkeypatch, write_corpus, tiny_encoder, tmp_path):
    corpus = write_corpus(ROWS, name="labelled")
    plan, receipts = prepared(corpus, tiny_encoder, tmp_path, SPEC.model_copy(update={"epochs": 3}))
    really = trainer.Trainer.add_gradient

    def add_gradient(self, documents, *, epoch, **more):
        loss = really(self, documents, epoch=epoch, **more)
        return loss if epoch < 2 else float("nan")

    monkeypatch.setattr(trainer.Trainer, "add_gradient", add_gradient)
    with pytest.raises(
        ConfigError, match=r"the loss became nan in epoch 3.*the weights of epoch [12] are kept in"
    ) as caught:
        fine_tuning.fine_tune_prepared(plan, receipts, SPEC.model_copy(update={"epochs": 3}))

    kept = checkpoints.load_checkpoint(str(caught.value).rpartition(" ")[2])
    assert score_texts(["fox fox"], kept, ScoreSpec(device="cpu")).scores_DL.shape == (1, 2)
    assert len(fitting.read_metrics(plan.run)) > 2


def test_a_gradient_that_is_no_number_moves_no_weight(write_corpus, tiny_encoder, tmp_path):
    spec = SPEC.model_copy(update={"learning_rate": 1e18, "max_grad_norm": None})

    with pytest.raises(ConfigError, match=r"became (nan|inf) in epoch 1.*lower learning_rate \(1e\+18\)$"):
        fine_tuned(write_corpus(ROWS, name="labelled"), tiny_encoder, tmp_path, spec)


def test_what_only_the_documents_held_out_show_is_divergence_too(write_corpus, tiny_encoder, tmp_path):
    """The one step of the epoch does the damage, after its loss was measured."""
    changes = {"learning_rate": 1e18, "max_grad_norm": None, "warmup_fraction": 0.0, "documents_per_batch": 1000}

    with pytest.raises(
        DivergedError, match=r"largest logit of the documents held out became (nan|inf) in epoch 1, after 1 steps"
    ):
        fine_tuned(write_corpus(ROWS, name="labelled"), tiny_encoder, tmp_path, SPEC.model_copy(update=changes))


def test_epochs_keep_numbers_and_no_matrices(write_corpus, tiny_encoder, tmp_path):
    """Of a thousand labels, a confusion matrix of every epoch would not fit into a state."""
    receipt = fine_tuned(write_corpus(ROWS, name="labelled"), tiny_encoder, tmp_path, SPEC)

    assert {"loss", "accuracy", "auc"} <= set(receipt.epochs[0].validation)
    assert all(isinstance(value, int | float) for epoch in receipt.epochs for value in epoch.validation.values())
    assert "confusion_matrix" in receipt.metrics


# labels and splits


def test_a_validation_split_is_held_out_and_labels_that_only_it_has_are_put_aside(write_corpus, tiny_encoder, tmp_path):
    rows = ROWS.with_columns(
        label=pl.when(pl.col("doc_id") == "doc-0005").then(pl.lit("owl")).otherwise("label"),
    )
    corpus, columns = write_corpus(rows, name="labelled"), CorpusSpec(split_column="split", split="train")
    spec = SPEC.model_copy(update={"validation_split": "test"})
    plan, receipts = prepared(corpus, tiny_encoder, tmp_path, spec, columns)
    validation = validation_shards(corpus, plan, receipts, spec)

    found = fine_tuning.fine_tune_prepared(plan, receipts, spec, validation)

    assert (found.num_training_documents, found.num_validation_documents) == (32, 7)
    assert found.labels == ("fox", "window")
    put_aside = rejected_of(plan, validation)
    assert put_aside.select("doc_id", "reason").rows() == [("doc-0005", "label_unknown")]


def test_a_document_of_both_splits_is_trained_on_alone(write_corpus, tiny_encoder, tmp_path):
    """Held out, it would say what was learned by heart."""
    twice = ROWS.filter(split="train").head(2).with_columns(split=pl.lit("test"))
    corpus = write_corpus(pl.concat([twice, ROWS]), name="labelled")
    spec, columns = (
        SPEC.model_copy(update={"validation_split": "test"}),
        CorpusSpec(split_column="split", split="train"),
    )
    plan, receipts = prepared(corpus, tiny_encoder, tmp_path, spec, columns)
    validation = validation_shards(corpus, plan, receipts, spec)

    found = fine_tuning.fine_tune_prepared(plan, receipts, spec, validation)

    assert (found.num_training_documents, found.num_validation_documents) == (32, 8)
    put_aside = rejected_of(plan, validation)
    assert put_aside["doc_id"].to_list() == twice["doc_id"].to_list()
    assert put_aside["reason"].unique().to_list() == ["doc_id_duplicate"]


def test_the_split_to_train_on_cannot_be_held_out(write_corpus, tiny_encoder, tmp_path):
    columns = CorpusSpec(split_column="split", split="train")
    with pytest.raises(ConfigError, match="validation_split must be another split than the one to train on, 'train'"):
        fine_tuned(
            write_corpus(ROWS, name="labelled"),
            tiny_encoder,
            tmp_path,
            SPEC.model_copy(update={"validation_split": "train"}),
            columns,
        )


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_a_label_of_one_document_is_trained_on_and_told_of(write_corpus, tiny_encoder, tmp_path, kind):
    """Wherever its doc_id falls: the hash holds out about half."""
    labels = [["fox", "window"][i % 2] if i >= 8 else f"rare-{i}" for i in range(40)]
    column = labels if kind == "multiclass" else [[label, "all"] for label in labels]
    rows = ROWS.with_columns(label=pl.Series(column))
    spec = SPEC.model_copy(update={"validation_fraction": 0.5, "epochs": 1})

    receipt = fine_tuned(write_corpus(rows, name="labelled"), tiny_encoder, tmp_path, spec)

    assert receipt.lonely_labels == tuple(f"rare-{i}" for i in range(8))
    assert receipt.num_training_documents + receipt.num_validation_documents == 40
    assert receipt.num_validation_documents > 8


def test_a_corpus_whose_rows_are_all_rejected_says_why(write_corpus, tiny_encoder, tmp_path):
    rows = ROWS.with_columns(label=pl.lit(float("nan")))

    with pytest.raises(
        ConfigError, match=r"left to train on: all \d+ rows were rejected \(target_not_finite \d+\)"
    ) as it:
        fine_tuned(write_corpus(rows, name="broken"), tiny_encoder, tmp_path, SPEC)

    where = Path(str(it.value).rpartition(" listed in ")[2])
    assert sum(len(pl.read_parquet(file)) for file in where.glob("*.parquet")) == len(ROWS)


def test_a_validation_split_without_rows_is_named(write_corpus, tiny_encoder, tmp_path):
    corpus = write_corpus(ROWS.with_columns(part=pl.lit("train")), name="split")
    spec = SPEC.model_copy(update={"validation_split": "dev"})

    with pytest.raises(ConfigError, match=r"no row has 'dev' in column 'part' .choose with --validation-split, or"):
        fine_tuned(corpus, tiny_encoder, tmp_path, spec, CorpusSpec(split_column="part", split="train"))


# weights


def make_set(task, target, head):
    number = len(target)
    return TrainingSet(
        doc_ids=list(map(str, range(number))),
        input_ids_T=np.empty(0, dtype=np.int32),
        first_token_D=np.zeros(number, dtype=np.int64),
        num_tokens_D=np.zeros(number, dtype=np.int64),
        document_seed_D=np.zeros(number, dtype=np.int64),
        target=target,
        head=Head(task=task, labels=head),
        fingerprint="",
    )


@given(st.lists(st.integers(0, 2), min_size=3, max_size=60))
def test_balanced_weights_give_every_label_the_same_sum_and_documents_a_mean_of_one(labels):
    target = np.array([0, 1, 2, *labels])
    found_L = label_weights(make_set("multiclass", target, ("a", "b", "c")), np.arange(len(target)), "balanced")

    sums = np.bincount(target, weights=found_L[target])
    np.testing.assert_allclose(sums, len(target) / 3)


def test_balanced_multilabel_weights_give_those_with_and_without_a_label_the_same():
    target = np.array([[True, True], [False, True], [False, True], [False, False]])
    found_L = label_weights(make_set("multilabel", target, ("a", "b")), np.arange(4), "balanced")

    np.testing.assert_allclose(found_L * target.sum(axis=0), (~target).sum(axis=0))


def test_weights_by_name_are_one_where_a_label_is_not_named():
    found_L = label_weights(make_set("binary", np.array([0, 1]), ("a", "b")), np.arange(2), {"b": 3.0})

    assert found_L.tolist() == [1.0, 3.0]


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_weighted_losses_are_those_of_pytorch(task):
    logits = torch.randn(6, 1 if task == "binary" else 3, dtype=torch.float64)
    head = Head(task=task, labels=("a", "b") if task == "binary" else ("a", "b", "c"))
    if task == "multilabel":
        target, weights = torch.rand(6, 3) < 0.5, torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
        expected = torch.nn.BCEWithLogitsLoss(pos_weight=weights)(logits, target.double())
        assert heads.losses(logits, target, head, weights).mean() == pytest.approx(expected)
        return
    target = torch.tensor([0, 1, 0, 1, 1, 0])
    weights = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)[: len(head.labels)]
    both = torch.cat([torch.zeros_like(logits), logits], dim=1) if task == "binary" else logits
    expected = torch.nn.CrossEntropyLoss(weight=weights, reduction="sum")(both, target) / 6
    assert heads.losses(logits, target, head, weights).mean() == pytest.approx(expected)


def test_labels_of_hardly_any_weight_are_hardly_ever_found(write_corpus, tiny_encoder, tmp_path):
    corpus, texts = write_corpus(ROWS, name="labelled"), labelled_rows(30, seed=5, most_words=60)["text"].to_list()
    shares = {}
    for label in ("fox", "window"):
        spec = SPEC.model_copy(update={"label_weights": {label: 1e-6}})
        receipt = fine_tuned(corpus, tiny_encoder, tmp_path / label, spec)
        scored = score_texts(texts, checkpoints.load_checkpoint(receipt.checkpoint_uri), ScoreSpec(device="cpu"))
        shares[label] = np.mean(scored.scores_DL.argmax(axis=1) == receipt.labels.index(label))

    assert max(shares.values()) < 0.2


def test_a_document_weighed_with_nothing_like_zero_is_as_if_it_were_not_there(write_corpus, tiny_encoder, tmp_path):
    """Wrong labels of hardly any weight do not teach; the same labels at full weight do."""
    is_wrong = pl.int_range(pl.len()) % 4 < 2
    flipped = pl.when(is_wrong).then(pl.when(pl.col("label") == "fox").then(pl.lit("window")).otherwise(pl.lit("fox")))
    rows = ROWS.with_columns(label=flipped.otherwise("label"), weight=pl.when(is_wrong).then(1e-6).otherwise(1.0))
    corpus = write_corpus(rows, name="labelled")
    spec = SPEC.model_copy(update={"epochs": 6, "validation_fraction": 0.0})
    texts = labelled_rows(30, seed=5, most_words=60)

    right = {}
    for name, columns in (("weighed", CorpusSpec(weight_column="weight")), ("equal", CorpusSpec())):
        receipt = fine_tuned(corpus, tiny_encoder, tmp_path / name, spec, columns)
        scored = score_texts(
            texts["text"].to_list(), checkpoints.load_checkpoint(receipt.checkpoint_uri), ScoreSpec(device="cpu")
        )
        found = np.array(receipt.labels)[scored.scores_DL.argmax(axis=1)]
        right[name] = np.mean(found == texts["label"].to_numpy())

    assert right["weighed"] > 0.9
    assert right["equal"] < 0.9


def test_equal_weights_change_nothing(write_corpus, tiny_encoder, tmp_path):
    corpus = write_corpus(ROWS.with_columns(weight=pl.lit(7)), name="labelled")
    plain = fine_tuned(corpus, tiny_encoder, tmp_path / "plain", SPEC)
    weighed = fine_tuned(corpus, tiny_encoder, tmp_path / "weighed", SPEC, CorpusSpec(weight_column="weight"))

    assert [epoch.training_loss for epoch in weighed.epochs] == [
        pytest.approx(epoch.training_loss, rel=1e-6) for epoch in plain.epochs
    ]


def test_documents_without_a_usable_weight_are_put_aside(write_corpus, tiny_encoder, tmp_path):
    weights = [None, 0.0, -1.0, float("nan"), float("inf"), *[1.5] * 35]
    corpus = write_corpus(ROWS.with_columns(weight=pl.Series(weights)), name="labelled")
    columns = CorpusSpec(weight_column="weight")
    plan, receipts = prepared(corpus, tiny_encoder, tmp_path, SPEC, columns)

    assert rejected_of(plan, receipts)["reason"].to_list() == ["weight_null", *["weight_not_positive"] * 4]
    with fine_tuning.load(plan, receipts) as (found, _):
        assert found.weight_D.tolist() == [1.5] * 35
    with pytest.raises(ConfigError, match=r"no column 'wait'.*--weight-column"):
        prepared(corpus, tiny_encoder, tmp_path, SPEC, CorpusSpec(weight_column="wait"))


# measurements elsewhere


@pytest.fixture
def mlflow_store(tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def test_mlflow_has_every_step_and_epoch(write_corpus, tiny_encoder, tmp_path, mlflow_store):
    from mlflow import MlflowClient

    receipt = fine_tuned(write_corpus(ROWS, name="labelled"), tiny_encoder, tmp_path / "out", SPEC)

    client = MlflowClient(mlflow_store)
    experiment = client.get_experiment_by_name("belt")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["learning_rate"] == "0.002"
    assert run.data.params["chunks.chunk_size"] == "24"
    lines = [json.loads(line) for line in Path(receipt.metrics_uri).read_text().splitlines()]
    for kind, key in (("step", "loss"), ("epoch", "training_loss")):
        expected = [(line["step"], line[key]) for line in lines if line["kind"] == kind]
        found = client.get_metric_history(run.info.run_id, f"{kind}/{key}")
        assert sorted((metric.step, metric.value) for metric in found) == expected
    accuracy = client.get_metric_history(run.info.run_id, "epoch/validation.accuracy")
    assert [metric.value for metric in accuracy] == [epoch.validation["accuracy"] for epoch in receipt.epochs]


def test_a_run_that_goes_on_is_one_run_of_mlflow(monkeypatch, write_corpus, tiny_encoder, tmp_path, mlflow_store):
    from mlflow import MlflowClient

    plan, receipts = prepared(write_corpus(ROWS, name="labelled"), tiny_encoder, tmp_path / "out", SPEC)

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(fine_tuning, "save_checkpoint", fail)
    with pytest.raises(KeyboardInterrupt):
        fine_tuning.fine_tune_prepared(plan, receipts, SPEC)
    monkeypatch.setattr(fine_tuning, "save_checkpoint", checkpoints.save_checkpoint)
    fine_tuning.fine_tune_prepared(plan, receipts, SPEC)

    client = MlflowClient(mlflow_store)
    (run,) = client.search_runs([client.get_experiment_by_name("belt").experiment_id])
    assert run.info.status == "FINISHED"


def test_an_mlflow_that_does_not_answer_stops_nothing(monkeypatch, write_corpus, tiny_encoder, tmp_path, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    with caplog.at_level(logging.WARNING):
        receipt = fine_tuned(write_corpus(ROWS, name="labelled"), tiny_encoder, tmp_path / "out", SPEC)

    assert len(receipt.epochs) == 2
    assert "MLflow does not take this fine-tuning's metrics" in caplog.text
    assert "secret" not in caplog.text


def test_mlflow_that_is_configured_but_not_installed_is_told(monkeypatch, write_corpus, tiny_encoder, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(training_log, "find_spec", lambda _: None)

    with pytest.raises(ConfigError, match="mlflow is not installed: install belt's extra mlflow, or unset"):
        fine_tuned(write_corpus(ROWS, name="labelled"), tiny_encoder, tmp_path, SPEC)


def test_the_tokens_are_mapped_and_leave_no_file(write_corpus, tiny_encoder, tmp_path, monkeypatch):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    plan, receipts = prepared(write_corpus(ROWS, name="labelled"), tiny_encoder, tmp_path / "out", SPEC)

    with fine_tuning.load(plan, receipts) as (found, path):
        assert isinstance(found.input_ids_T, np.memmap)
        assert not list(temporary.iterdir())  # it has no name
        with fine_tuning.load(plan, receipts, tokens_path=path) as (other, _):
            assert other.input_ids_T.tolist() == found.input_ids_T.tolist()
            assert not other.input_ids_T.flags.writeable


def test_documents_without_any_token_train(write_corpus, tiny_encoder, tmp_path):
    rows = ROWS.with_columns(text=pl.lit(""))

    assert len(fine_tuned(write_corpus(rows, name="labelled"), tiny_encoder, tmp_path, SPEC).epochs) == 2
    assert words(0) == ""


def test_documents_are_evaluated_in_parts_that_fit_memory(monkeypatch, write_corpus, tiny_encoder, tmp_path):
    corpus = write_corpus(ROWS, name="labelled")
    whole = fine_tuned(corpus, tiny_encoder, tmp_path / "whole", SPEC)
    sizes = []
    really = trainer.Trainer._logits
    monkeypatch.setattr(trainer, "EVALUATION_TOKENS", 100)
    monkeypatch.setattr(
        trainer.Trainer, "_logits", lambda self, part, encoder: sizes.append(len(part)) or really(self, part, encoder)
    )

    parts = fine_tuned(corpus, tiny_encoder, tmp_path / "parts", SPEC)

    assert len(sizes) > 2 * SPEC.epochs
    assert sum(sizes) == SPEC.epochs * whole.num_validation_documents
    assert parts.epochs[0].validation["loss"] == pytest.approx(whole.epochs[0].validation["loss"], rel=1e-5)


def test_a_regression_begins_at_the_mean_of_its_targets(write_corpus, tiny_encoder, tmp_path):
    stars = np.linspace(900.0, 1100.0, 40)
    rows = ROWS.with_columns(label=pl.Series(stars))
    spec = SPEC.model_copy(update={"learning_rate": 1e-9, "epochs": 1})

    receipt = fine_tuned(write_corpus(rows, name="labelled"), tiny_encoder, tmp_path, spec)

    assert receipt.epochs[0].training_loss < 1.3 * stars.var()  # not a million


def test_chunks_are_redrawn_only_where_they_are_drawn():
    with pytest.raises(ValueError, match="redraw_chunks needs selection random_k, got selection 'all'"):
        TrainSpec(redraw_chunks=True)
