"""A fine-tuning that is killed goes on from its last whole state, to the same weights bit for bit."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from belt_tasks import fine_tuning, fitting, progress, storage, training_state
from belt_tasks.errors import ConfigError
from belt_tasks.publishing import RunRef
from belt_tasks.specs import BatchSpec, ChunkSpec, CorpusSpec, TrainSpec
from belt_tasks.training_state import TrainingState, TrainingStates
from tests.conftest import labelled_rows
from tests.fine_tuned import fine_tuned, prepared

SPEC = TrainSpec(
    chunks=ChunkSpec(chunk_size=24, stride=18),
    batches=BatchSpec(max_batch_tokens=200),
    device="cpu",
    epochs=3,
    learning_rate=2e-3,
    documents_per_batch=3,
    accumulation_steps=2,
    dropout=0.1,
    validation_fraction=0.3,
    save_every_s=1e-9,  # after every step
)


@pytest.fixture
def labelled_corpus(write_corpus) -> str:
    return write_corpus(labelled_rows(40, most_words=60), num_files=2, name="labelled")


def weights_of(receipt):
    folder = Path(receipt.checkpoint_uri)
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "head.safetensors")}


def steps_done(num_batches, num_documents):
    """Optimizer steps that are whole after some batches of documents."""
    batches_per_epoch = -(-num_documents // SPEC.documents_per_batch)
    epochs, batches = divmod(num_batches, batches_per_epoch)
    return epochs * -(-batches_per_epoch // SPEC.accumulation_steps) + batches // SPEC.accumulation_steps


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


class Interruption(BaseException):
    """Stands for what ends a process between two steps."""


def interrupted_after(num_reports):
    """A listener that ends the training after some batches of documents."""
    seen = []

    def listen(stage, num_done, _):
        if stage == "fine-tune" and num_done:
            seen.append(num_done)
            if len(seen) == num_reports:
                raise Interruption

    return listen


@pytest.mark.parametrize("num_reports", [1, 2, 7, 10, 12, 24, 29])
def test_an_interrupted_run_ends_with_the_bytes_of_one_that_was_not(
    labelled_corpus, tiny_encoder, tmp_path, num_reports
):
    whole = fine_tuned(labelled_corpus, tiny_encoder, tmp_path / "whole", SPEC)
    plan, receipts = prepared(labelled_corpus, tiny_encoder, tmp_path / "cut", SPEC)
    with progress.listen(interrupted_after(num_reports)), pytest.raises(Interruption):
        fine_tuning.fine_tune_prepared(plan, receipts, SPEC)

    found = fine_tuning.fine_tune_prepared(plan, receipts, SPEC)

    assert found.resumed_from_step == (steps_done(num_reports - 1, whole.num_training_documents) or None)
    assert found.checkpoint_digest == whole.checkpoint_digest
    assert_equal(weights_of(found), weights_of(whole))
    assert found.epochs == whole.epochs
    assert found.calibration == whole.calibration
    timeless = [
        [{name: value for name, value in line.items() if name != "seconds"} for line in fitting.read_metrics(run)]
        for run in (plan.run, prepared(labelled_corpus, tiny_encoder, tmp_path / "whole", SPEC)[0].run)
    ]
    assert timeless[0] == timeless[1]
    fitting.forget(plan.run)
    assert not (Path(plan.run.uri) / "training").exists()


LONG = SPEC.model_copy(update={"epochs": 12})
CHILD = """
import sys
from pathlib import Path
from tests.unit.belt_tasks import test_resuming as here
corpus, encoder, output = sys.argv[1:]
here.fine_tuned(corpus, Path(encoder), Path(output), here.LONG)
"""


def test_killed_at_any_moment_again_and_again(labelled_corpus, tiny_encoder, tmp_path):
    """SIGKILL as soon as a step's state is there, whatever the process does then; a last one gets through."""
    whole = fine_tuned(labelled_corpus, tiny_encoder, tmp_path / "whole", LONG)
    plan, _ = prepared(labelled_corpus, tiny_encoder, tmp_path / "cut", LONG)
    states = Path(plan.run.uri) / "training"

    def last_step():
        return max((int(path.name.split("-")[1]) for path in states.glob("step-*")), default=0)

    codes = []
    for kill_at in (3, 17, 24, None):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, labelled_corpus, str(tiny_encoder), str(tmp_path / "cut")],
            cwd=Path(__file__).parents[3],
        )
        while kill_at is not None and child.poll() is None:
            if last_step() >= kill_at:
                child.kill()
                break
            time.sleep(0.001)
        codes.append(child.wait())

    assert codes == [-signal.SIGKILL] * 3 + [0]
    found = fine_tuning.read_receipt(plan.run)
    assert found.resumed_from_step >= 24
    assert_equal(weights_of(found), weights_of(whole))
    assert found.epochs == whole.epochs


def test_a_broken_state_is_noticed_and_the_one_before_it_is_taken(labelled_corpus, tiny_encoder, tmp_path, caplog):
    whole = fine_tuned(labelled_corpus, tiny_encoder, tmp_path / "whole", SPEC)
    plan, receipts = prepared(labelled_corpus, tiny_encoder, tmp_path / "cut", SPEC)
    with progress.listen(interrupted_after(9)), pytest.raises(Interruption):
        fine_tuning.fine_tune_prepared(plan, receipts, SPEC)
    *_, before, last = sorted((Path(plan.run.uri) / "training").iterdir())
    last.write_bytes(last.read_bytes()[:-100])

    with caplog.at_level(logging.WARNING):
        found = fine_tuning.fine_tune_prepared(plan, receipts, SPEC)

    assert f"{last} is damaged" in caplog.text
    assert found.resumed_from_step == int(before.name.split("-")[1]) == 3
    assert_equal(weights_of(found), weights_of(whole))


def state(number, size=10):
    return TrainingState(
        num_steps=number, tensors={"a": torch.full((size,), float(number))}, told={"num_steps": number, "more": [1.5]}
    )


def test_states_come_back_as_they_were_and_two_are_kept(tmp_path):
    states = TrainingStates(str(tmp_path / "states"))
    assert states.last() is None

    for number in (9, 10, 11):
        states.save(state(number))

    found = states.last()
    assert (found.num_steps, found.told) == (11, {"num_steps": 11, "more": [1.5]})
    assert torch.equal(found.tensors["a"], torch.full((10,), 11.0))
    assert [path.name[:15] for path in sorted((tmp_path / "states").iterdir())] == [
        "step-0000000010",
        "step-0000000011",
    ]
    states.remove()
    assert states.last() is None


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
def test_every_damage_is_noticed(tmp_path, damage):
    states = TrainingStates(str(tmp_path))
    states.save(state(1))
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes({"cut": path.read_bytes()[:-1], "flipped": bytes(content), "emptied": b""}[damage])

    assert states.last() is None


def test_a_full_disk_is_a_sentence_and_the_state_before_it_stays(labelled_corpus, tiny_encoder, tmp_path, monkeypatch):
    plan, receipts = prepared(labelled_corpus, tiny_encoder, tmp_path / "out", SPEC)
    save_file, saved = training_state.save_file, []

    def until_full(tensors, path, metadata):
        saved.append(path)
        if len(saved) == 4:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(training_state, "save_file", until_full)
    with pytest.raises(ConfigError, match=r"cannot write .*training: No space left on device"):
        fine_tuning.fine_tune_prepared(plan, receipts, SPEC)
    names = sorted(path.name for path in (Path(plan.run.uri) / "training").iterdir())
    assert [name[:15] for name in names] == ["step-0000000002", "step-0000000003"]

    monkeypatch.undo()
    assert fine_tuning.fine_tune_prepared(plan, receipts, SPEC).resumed_from_step == 3


def test_a_finished_training_whose_checkpoint_is_missing_is_not_trained_again(
    labelled_corpus, tiny_encoder, tmp_path, monkeypatch
):
    """Killed between the last epoch and the checkpoint."""
    plan, receipts = prepared(labelled_corpus, tiny_encoder, tmp_path, SPEC)

    def fail(*_, **__):
        raise Interruption

    monkeypatch.setattr(fine_tuning, "save_checkpoint", fail)
    with pytest.raises(Interruption):
        fine_tuning.fine_tune_prepared(plan, receipts, SPEC)
    monkeypatch.undo()
    reports = []
    with progress.listen(lambda *report: reports.append(report)):
        found = fine_tuning.fine_tune_prepared(plan, receipts, SPEC)

    assert sum(done for stage, done, _ in reports if stage == "fine-tune") == 0
    assert len(found.epochs) == 3


def test_a_finished_training_that_was_not_published_is_not_trained_again(labelled_corpus, tiny_encoder, tmp_path):
    """Killed between the checkpoint and the manifest."""
    plan, receipts = prepared(labelled_corpus, tiny_encoder, tmp_path, SPEC)
    whole = fine_tuning.fine_tune_prepared(plan, receipts, SPEC)
    reports = []
    with progress.listen(lambda *report: reports.append(report)):
        found = fine_tuning.fine_tune_prepared(plan, receipts, SPEC)

    assert sum(done for stage, done, _ in reports if stage == "fine-tune") == 0
    assert found.checkpoint_digest == whole.checkpoint_digest
    assert (found.epochs, found.metrics) == (whole.epochs, whole.metrics)


def test_measurements_stay_where_a_state_cannot_be_taken_up(labelled_corpus, tiny_encoder, tmp_path, monkeypatch):
    plan, receipts = prepared(labelled_corpus, tiny_encoder, tmp_path, SPEC)
    with progress.listen(interrupted_after(12)), pytest.raises(Interruption):
        fine_tuning.fine_tune_prepared(plan, receipts, SPEC)
    before = fitting.read_metrics(plan.run)

    def fail(_):
        raise Interruption

    monkeypatch.setattr(TrainingStates, "last", fail)
    with pytest.raises(Interruption):
        fine_tuning.fine_tune_prepared(plan, receipts, SPEC)

    assert fitting.read_metrics(plan.run) == before != []


def test_two_processes_go_on_too(labelled_corpus, tiny_encoder, tmp_path):
    spec = SPEC.model_copy(update={"num_devices": 2, "epochs": 2})
    whole = fine_tuned(labelled_corpus, tiny_encoder, tmp_path / "whole", spec)
    plan, receipts = prepared(labelled_corpus, tiny_encoder, tmp_path / "cut", spec)
    with progress.listen(interrupted_after(12)), pytest.raises(Interruption):
        fine_tuning.fine_tune_prepared(plan, receipts, spec)

    found = fine_tuning.fine_tune_prepared(plan, receipts, spec)

    assert found.resumed_from_step == steps_done(11, whole.num_training_documents)
    assert_equal(weights_of(found), weights_of(whole))


def test_another_spec_is_another_run_with_the_same_tokens(labelled_corpus, tiny_encoder, tmp_path):
    """Tokens are made once for all runs of an output that read the same content with the same tokenizer."""
    one, receipts = prepared(labelled_corpus, tiny_encoder, tmp_path, SPEC)
    two, again = prepared(labelled_corpus, tiny_encoder, tmp_path, SPEC.model_copy(update={"learning_rate": 1e-3}))

    assert one.run != two.run
    assert one.prepare.run == two.prepare.run
    assert [receipt.files for receipt in again] == [receipt.files for receipt in receipts]
    assert all(receipt.reused for receipt in again)


def test_another_tokenizer_or_column_is_tokenized_anew(labelled_corpus, tiny_encoders, tmp_path):
    runs = [
        prepared(labelled_corpus, tiny_encoders(family), tmp_path, SPEC, columns)[0].prepare.run.run_id
        for family, columns in [
            ("bert", CorpusSpec()),
            ("roberta", CorpusSpec()),
            ("bert", CorpusSpec(text_column="doc_id")),
            ("bert", CorpusSpec(split_column="split", split="train")),
        ]
    ]

    assert len(set(runs)) == 4


def test_the_log_says_what_every_step_and_epoch_measured(labelled_corpus, tiny_encoder, tmp_path):
    receipt = fine_tuned(labelled_corpus, tiny_encoder, tmp_path, SPEC)

    lines = [json.loads(line) for line in Path(receipt.metrics_uri).read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    assert sum(line["num_documents"] for line in steps) == 3 * receipt.num_training_documents
    assert all(line["gradient_norm"] > 0 and line["seconds"] > 0 and line["num_tokens"] > 0 for line in steps)
    assert steps[-1]["learning_rate"] < steps[0]["learning_rate"] or steps[0]["learning_rate"] < 2e-3
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [line["training_loss"] for line in epochs] == [epoch.training_loss for epoch in receipt.epochs]
    assert [line["validation"]["accuracy"] for line in epochs] == [e.validation["accuracy"] for e in receipt.epochs]
    assert Path(receipt.curves_uri).read_bytes().startswith(b"\x89PNG")


def test_states_lie_in_the_folder_of_their_run_and_go_with_what_a_kill_left(tmp_path):
    run = RunRef(output_uri=str(tmp_path), run_id="0" * 16)
    TrainingStates(storage.join(run.uri, "training")).save(state(1))
    (Path(run.uri) / "training" / ".staged.0123.tmp").write_bytes(b"half")

    fitting.forget(run)

    assert TrainingStates(storage.join(run.uri, "training")).last() is None
    assert list(Path(run.uri).iterdir()) == []
