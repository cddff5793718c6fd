"""Fine-tuning: it learns, repeats itself, keeps the best epoch, and stops clearly when it cannot go on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from belt_tasks import checkpoint as checkpoints
from belt_tasks import data_parallel, fine_tuning, metrics, progress, trainer, training_loop
from belt_tasks.errors import ConfigError
from belt_tasks.scoring import score_texts
from belt_tasks.specs import BatchSpec, ChunkSpec, Head, PoolingSpec, ScoreSpec, TrainSpec
from belt_tasks.tokens import load_tokenizer
from belt_tasks.training_loop import TrainingLoop
from belt_tasks.training_set import TrainingSet
from tests.conftest import labelled_rows

ROWS = labelled_rows(60, most_words=60)
SPEC = TrainSpec(
    chunks=ChunkSpec(chunk_size=24, stride=18),
    batches=BatchSpec(max_batch_tokens=200),
    epochs=3,
    learning_rate=2e-3,
    documents_per_batch=4,
    dropout=0.0,
    validation_fraction=0.2,
)


def make_set(encoder, *, head=None, target=None):
    tokens = load_tokenizer(encoder).tokenize(ROWS["text"].to_list())
    return TrainingSet(
        doc_ids=ROWS["doc_id"].to_list(),
        input_ids_T=tokens.input_ids_T,
        first_token_D=tokens.offsets[:-1],
        num_tokens_D=tokens.num_tokens_D,
        document_seed_D=np.arange(len(ROWS)),
        target=(ROWS["label"] == "window").cast(int).to_numpy() if target is None else target,
        head=head or Head(task="binary", labels=("fox", "window")),
        fingerprint="f" * 64,
    )


def run(encoder, folder, spec=SPEC, **fields):
    with data_parallel.alone("cpu", spec.precision) as ranks:
        return fine_tuning.fine_tune(
            make_set(encoder, **fields), spec, encoder_source=str(encoder), checkpoint_uri=str(folder), ranks=ranks
        )


@pytest.mark.parametrize("strategy", ["mean", "max", "attention"])
def test_it_learns_and_its_checkpoint_scores_as_it_measured(tiny_encoder, tmp_path, strategy):
    spec = SPEC.model_copy(update={"pooling": PoolingSpec(pooling_strategy=strategy)})

    receipt = run(tiny_encoder, tmp_path / "made", spec)

    assert receipt.epochs[-1].training_loss < 0.7 * receipt.epochs[0].training_loss
    checkpoint = checkpoints.load_checkpoint(str(tmp_path / "made"))
    held_out_D = make_set(tiny_encoder).held_out_D(0.2, 0)
    scores = score_texts(ROWS["text"].filter(held_out_D).to_list(), checkpoint, ScoreSpec())
    found = np.array(checkpoint.head.labels)[scores.scores_DL.argmax(axis=1)]
    best = receipt.epochs[receipt.best_epoch - 1].validation
    assert np.mean(found == ROWS["label"].filter(held_out_D).to_numpy()) == pytest.approx(best["accuracy"])
    assert checkpoint.digest == receipt.checkpoint_digest


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_a_calibrated_checkpoint_scores_as_its_card_says(tiny_encoder, tmp_path, task):
    spec = SPEC.model_copy(update={"validation_fraction": 0.5, "learning_rate": 5e-4, "epochs": 2})
    fields = {}
    if task == "multilabel":
        is_window = (ROWS["label"] == "window").to_numpy()
        fields = {
            "head": Head(task="multilabel", labels=("fox", "window")),
            "target": np.stack([~is_window, is_window], axis=1),
        }

    receipt = run(tiny_encoder, tmp_path / "made", spec, **fields)
    plain = run(tiny_encoder, tmp_path / "plain", spec.model_copy(update={"calibration": "none"}), **fields)

    checkpoint = checkpoints.load_checkpoint(str(tmp_path / "made"))
    assert checkpoint.calibration == receipt.calibration is not None
    best = plain.epochs[plain.best_epoch - 1].validation
    assert plain.calibration is None
    assert best == {name: plain.metrics[name] for name in best}
    training_set = make_set(tiny_encoder, **fields)
    held_out_D = training_set.held_out_D(0.5, 0)
    texts, target = ROWS["text"].filter(held_out_D).to_list(), training_set.target[held_out_D]
    scores = score_texts(texts, checkpoint, ScoreSpec())
    measured = metrics.task_metrics(task, target, scores.scores_DL, checkpoint.head.labels)
    for name in ("log_loss", "ece"):
        assert measured[name] == pytest.approx(receipt.metrics[name], abs=1e-4)
        assert receipt.metrics["uncalibrated"][name] == pytest.approx(plain.metrics[name], abs=1e-6)
    assert measured["log_loss"] < receipt.metrics["uncalibrated"]["log_loss"]
    raw = score_texts(texts, checkpoints.load_checkpoint(str(tmp_path / "plain")), ScoreSpec())
    assert scores.logits_DL == pytest.approx(raw.logits_DL, abs=1e-5)


def test_a_changed_calibration_is_noticed(tiny_encoder, tmp_path):
    run(tiny_encoder, tmp_path / "made", SPEC.model_copy(update={"validation_fraction": 0.5}))
    card = tmp_path / "made" / "belt.json"
    told = json.loads(card.read_text())
    told["calibration"]["slope"] = [9.0]
    card.write_text(json.dumps(told))

    with pytest.raises(ConfigError, match="damaged checkpoint"):
        checkpoints.load_checkpoint(str(tmp_path / "made"))


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tiny_encoder, tmp_path):
    spec = SPEC.model_copy(update={"epochs": 1, "dropout": None})
    digests = [run(tiny_encoder, tmp_path / str(i), spec).checkpoint_digest for i in range(2)]
    other = run(tiny_encoder, tmp_path / "other", spec.model_copy(update={"seed": 1})).checkpoint_digest

    assert digests[0] == digests[1] != other


def test_the_mini_batch_budget_does_not_change_what_is_learned(tiny_encoder, tmp_path):
    receipts = [
        run(tiny_encoder, tmp_path / str(n), SPEC.model_copy(update={"batches": BatchSpec(max_batch_tokens=n)}))
        for n in (30, 100_000)
    ]

    for few, many in zip(*(receipt.epochs for receipt in receipts), strict=True):
        assert few.training_loss == pytest.approx(many.training_loss, rel=1e-3)


def test_accumulated_batches_are_one_large_batch(tiny_encoder, tmp_path):
    """Also for the last, smaller step: every document of a step weighs the same."""
    shared = {"epochs": 1, "validation_fraction": 0.0}
    losses = [
        run(tiny_encoder, tmp_path / str(size), SPEC.model_copy(update={**shared, **fields}))
        for size, fields in enumerate(
            [{"documents_per_batch": 14}, {"documents_per_batch": 7, "accumulation_steps": 2}]
        )
    ]
    weights = [checkpoints.load_checkpoint(str(tmp_path / str(i))).model.head.linear.weight for i in range(2)]

    assert losses[0].epochs[0].training_loss == pytest.approx(losses[1].epochs[0].training_loss, rel=1e-4)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)


def test_the_best_epoch_is_kept(tiny_encoder, tmp_path, monkeypatch):
    states, losses = [], [0.9, 0.2, 0.4]

    def logits(trainer, documents):
        states.append(trainer.model.head.linear.weight.detach().clone())
        return torch.full((len(documents), 1), float(len(states)))

    def measure(_, logits_DL, *__):
        number = int(logits_DL[0].item())
        return {"loss": losses[number - 1], "epoch": number}

    monkeypatch.setattr(trainer.Trainer, "logits", logits)
    monkeypatch.setattr(trainer.Trainer, "measure", measure)
    receipt = run(tiny_encoder, tmp_path / "made")

    assert receipt.best_epoch == 2
    saved = checkpoints.load_checkpoint(str(tmp_path / "made")).model.head.linear.weight
    assert torch.equal(saved, states[1])
    assert not torch.equal(saved, states[2])
    card = json.loads(Path(tmp_path / "made" / "belt.json").read_text())
    assert card["metrics"] == {"loss": 0.2, "epoch": 2}


def test_without_held_out_documents_the_last_epoch_is_kept(tiny_encoder, tmp_path):
    receipt = run(tiny_encoder, tmp_path / "made", SPEC.model_copy(update={"validation_fraction": 0.0, "epochs": 2}))

    assert receipt.best_epoch == 2
    assert [epoch.validation for epoch in receipt.epochs] == [None, None]
    assert receipt.num_training_documents == 60


@pytest.mark.parametrize(
    ("head", "target"),
    [
        (Head(task="multiclass", labels=("a", "b", "c")), np.arange(60) % 3),
        (Head(task="multilabel", labels=("a", "b")), np.stack([np.arange(60) % 2, np.arange(60) % 3 == 0], axis=1) > 0),
        (Head(task="regression", labels=("stars",)), np.linspace(-1, 1, 60)),
    ],
)
def test_every_task_trains_and_scores(tiny_encoder, tmp_path, head, target):
    receipt = run(tiny_encoder, tmp_path / "made", SPEC.model_copy(update={"epochs": 1}), head=head, target=target)

    checkpoint = checkpoints.load_checkpoint(str(tmp_path / "made"))
    assert checkpoint.head == head
    assert receipt.epochs[0].validation["num_documents"] == receipt.num_validation_documents > 0
    assert score_texts(["x"], checkpoint, ScoreSpec()).scores_DL.shape == (1, len(head.labels))


def test_bf16_autocast_trains_close_to_fp32(tiny_encoder, tmp_path):
    full = run(tiny_encoder, tmp_path / "fp32", SPEC.model_copy(update={"epochs": 1}))
    half = run(tiny_encoder, tmp_path / "bf16", SPEC.model_copy(update={"epochs": 1, "precision": "bf16"}))

    assert half.epochs[0].training_loss == pytest.approx(full.epochs[0].training_loss, rel=0.1)
    assert half.epochs[0].training_loss != full.epochs[0].training_loss


def test_a_loss_that_is_no_number_stops_with_the_learning_rate(tiny_encoder, tmp_path):
    with pytest.raises(ConfigError, match=r"the loss became (nan|inf) in epoch 1.*lower learning_rate \(1e\+18\)"):
        run(tiny_encoder, tmp_path, SPEC.model_copy(update={"learning_rate": 1e18, "max_grad_norm": None}))


def test_nothing_left_to_train_on_is_refused(tiny_encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingSet, "held_out_D", lambda *_: np.ones(60, dtype=bool))

    with pytest.raises(ConfigError, match="holds out all 60"):
        run(tiny_encoder, tmp_path)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    linear = training_loop.schedule(TrainSpec(warmup_fraction=0.2), 10)
    constant = training_loop.schedule(TrainSpec(warmup_fraction=0.2, schedule="constant"), 10)

    assert [round(linear(step), 3) for step in range(11)] == [
        0.333, 0.667, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0,
    ]  # fmt: skip
    assert [constant(step) for step in (2, 9)] == [1.0, 1.0]


def test_every_epoch_has_its_own_order():
    orders = [tuple(training_loop.epoch_order(50, seed=0, epoch=epoch)) for epoch in range(3)]

    assert len(set(orders)) == 3
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_biases_and_normalisation_do_not_decay(tiny_encoder, monkeypatch):
    groups = []
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda given, **more: groups.extend(given) or adamw(given, **more))
    with data_parallel.alone("cpu", "fp32") as ranks:
        built = trainer.build_trainer(make_set(tiny_encoder), SPEC, encoder_source=str(tiny_encoder), ranks=ranks)

        TrainingLoop(trainer=built, documents=np.arange(4))

    decayed, others = groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (SPEC.weight_decay, 0.0)
    assert {weight.ndim for weight in decayed["params"]} == {2}
    assert {weight.ndim for weight in others["params"]} == {1}


def test_progress_counts_every_document_of_every_epoch(tiny_encoder, tmp_path):
    reports = []
    with progress.listen(lambda *report: reports.append(report)):
        receipt = run(tiny_encoder, tmp_path)

    seen = [(done, more) for stage, done, more in reports if stage == "fine-tune"]
    assert sum(done for done, _ in seen) == 3 * receipt.num_training_documents
    assert sum(more or 0 for _, more in seen) == 3 * receipt.num_training_documents


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_learns_on_a_gpu(tiny_encoder, tmp_path, precision):
    receipt = run(tiny_encoder, tmp_path, SPEC.model_copy(update={"device": "cuda", "precision": precision}))

    assert receipt.epochs[-1].training_loss < 0.8 * receipt.epochs[0].training_loss
