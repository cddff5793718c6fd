"""Fine-tuning by several processes, on a CPU as it would be on GPUs: the same weights, and nobody is left behind."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from belt_tasks import checkpoint as checkpoints
from belt_tasks import data_parallel, fine_tuning, progress
from belt_tasks.data_parallel import Ranks
from belt_tasks.errors import ConfigError, TransientError
from belt_tasks.scoring import score_texts
from belt_tasks.specs import BatchSpec, ChunkSpec, PoolingSpec, ScoreSpec, TrainSpec
from tests.conftest import labelled_rows
from tests.fine_tuned import fine_tuned, prepared

SPEC = TrainSpec(
    chunks=ChunkSpec(chunk_size=24, stride=18),
    batches=BatchSpec(max_batch_tokens=200),
    device="cpu",
    epochs=2,
    learning_rate=2e-3,
    documents_per_batch=3,  # one process has two of them, the other has one, and of the last batch perhaps none
    dropout=0.0,
    validation_fraction=0.2,
)


@pytest.fixture
def labelled_corpus(write_corpus) -> str:
    return write_corpus(labelled_rows(36, most_words=60), num_files=3, name="labelled")


def others() -> list[psutil.Process]:
    """The other ranks of this process."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if data_parallel.ENTRY in child.cmdline():
                found.append(child)
    return found


@pytest.fixture(autouse=True)
def nobody_is_left():
    threads = torch.get_num_threads()
    yield
    assert others() == []
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pooling": PoolingSpec(pooling_strategy="attention"), "accumulation_steps": 2, "max_grad_norm": 0.1},
        {"pooling": PoolingSpec(pooling_strategy="max"), "documents_per_batch": 1, "epochs": 1},
    ],
    ids=["mean", "attention", "nothing to do for one"],
)
def test_two_processes_learn_what_one_does(labelled_corpus, tiny_encoder, tmp_path, changes):
    spec = SPEC.model_copy(update=changes)
    one = fine_tuned(labelled_corpus, tiny_encoder, tmp_path / "1", spec)
    two = fine_tuned(labelled_corpus, tiny_encoder, tmp_path / "2", spec.model_copy(update={"num_devices": 2}))

    assert two.best_epoch == one.best_epoch
    for left, right in zip(one.epochs, two.epochs, strict=True):
        assert right.training_loss == pytest.approx(left.training_loss, rel=1e-4)
        assert right.validation["loss"] == pytest.approx(left.validation["loss"], rel=1e-4)
        assert right.validation["accuracy"] == left.validation["accuracy"]
    texts = labelled_rows(20, seed=9, most_words=60)["text"].to_list()
    loaded = [checkpoints.load_checkpoint(receipt.checkpoint_uri) for receipt in (one, two)]
    said = [score_texts(texts, each, ScoreSpec(device="cpu")).logits_DL for each in loaded]
    np.testing.assert_allclose(said[1], said[0], atol=1e-3)


def test_two_processes_drop_what_one_does(labelled_corpus, tiny_encoder, tmp_path):
    """Which numbers a chunk loses does not depend on who forwards it."""
    spec = SPEC.model_copy(update={"dropout": 0.3, "epochs": 1})
    one = fine_tuned(labelled_corpus, tiny_encoder, tmp_path / "1", spec)
    two = fine_tuned(labelled_corpus, tiny_encoder, tmp_path / "2", spec.model_copy(update={"num_devices": 2}))
    none = fine_tuned(labelled_corpus, tiny_encoder, tmp_path / "0", spec.model_copy(update={"dropout": 0.0}))

    assert two.epochs[0].training_loss == pytest.approx(one.epochs[0].training_loss, rel=1e-4)
    assert none.epochs[0].training_loss != pytest.approx(one.epochs[0].training_loss, rel=1e-3)


def test_whoever_stops_ends_all(labelled_corpus, tiny_encoder, tmp_path):
    spec = SPEC.model_copy(update={"num_devices": 2})
    plan, receipts = prepared(labelled_corpus, tiny_encoder, tmp_path, spec)
    there = []

    def stop(stage, num_done, _):
        if stage == "fine-tune" and num_done:
            there.extend(others())
            raise KeyboardInterrupt

    with progress.listen(stop), pytest.raises(KeyboardInterrupt):
        fine_tuning.fine_tune_prepared(plan, receipts, spec)

    assert len(there) == 1
    assert not there[0].is_running()


def test_a_process_that_is_killed_is_noticed_and_another_attempt_may_succeed(labelled_corpus, tiny_encoder, tmp_path):
    spec = SPEC.model_copy(update={"num_devices": 2})
    plan, receipts = prepared(labelled_corpus, tiny_encoder, tmp_path, spec)

    def kill(stage, num_done, _):
        if stage == "fine-tune" and num_done:
            for each in others():
                each.kill()

    with progress.listen(kill), pytest.raises(TransientError, match=r"rank 1 of the fine-tuning ended: exit code -9"):
        fine_tuning.fine_tune_prepared(plan, receipts, spec)

    fine_tuning.fine_tune_prepared(plan, receipts, spec)


def test_what_goes_wrong_here_is_no_other_ranks_fault(labelled_corpus, tiny_encoder, tmp_path):
    def run_out_of_memory(stage, num_done, _num_more):
        if stage == "fine-tune" and num_done:
            raise RuntimeError("out of memory")

    with progress.listen(run_out_of_memory), pytest.raises(RuntimeError, match=r"^out of memory$"):
        fine_tuned(labelled_corpus, tiny_encoder, tmp_path / "out", SPEC.model_copy(update={"num_devices": 2}))


def test_what_another_rank_complains_of_is_told(labelled_corpus, tiny_encoder, tmp_path):
    plan, receipts = prepared(labelled_corpus, tiny_encoder, tmp_path, SPEC)
    job = {
        "plan": plan.model_dump(mode="json"),
        "receipts": [receipt.model_dump(mode="json") for receipt in receipts],
        "validation_receipts": [],
        "spec": SPEC.model_dump(mode="json"),
        "storage": {"ftp": {}},
        "tokens": None,
    }

    with (
        pytest.raises(ConfigError, match="rank 1 of the fine-tuning ended: storage options are for one of"),
        data_parallel.ranks(SPEC.model_copy(update={"num_devices": 2}), job),
    ):
        pytest.fail("it is not ready")


PARENT = """
import sys, time
from belt_tasks import data_parallel
from tests.unit.belt_tasks import test_data_parallel as here
from pathlib import Path
corpus, encoder, output = sys.argv[1:]
spec = here.SPEC.model_copy(update={"num_devices": 2, "epochs": 10_000})
here.fine_tuned(corpus, Path(encoder), Path(output), spec)
"""


def test_the_others_end_with_a_parent_that_is_killed_and_listen_to_this_machine_alone(
    labelled_corpus, tiny_encoder, tmp_path
):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, labelled_corpus, str(tiny_encoder), str(tmp_path)],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"TMPDIR": str(temporary)},
    )
    try:
        process = psutil.Process(parent.pid)
        children: list[psutil.Process] = []
        listening: set[str] = set()
        give_up_at = time.monotonic() + 120
        while not listening:
            assert time.monotonic() < give_up_at
            assert parent.poll() is None
            children = process.children()
            listening = {
                connection.laddr.ip
                for each in [process, *children]
                for connection in each.net_connections("inet")
                if connection.status == psutil.CONN_LISTEN
            }
            time.sleep(0.1)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()

    assert listening <= {"127.0.0.1", "::1"}
    assert len(children) == 1
    psutil.wait_procs(children, timeout=30)
    assert not children[0].is_running()
    assert list(temporary.glob("belt-ranks-*")) == []


@pytest.mark.parametrize(
    ("device", "num_devices", "words"),
    [
        ("cpu", 10_000, r"num_devices must be at most \d+, the cores of this machine, got 10000"),
        ("cuda", 5, "num_devices must be at most 4, the CUDA devices of this machine, got 5"),
        ("cuda:0", 2, r"device 'cuda:0' is one device, but num_devices is 2: say cuda, or auto"),
    ],
)
def test_more_devices_than_there_are_is_an_error_before_any_work(device, num_devices, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ConfigError, match=words):
        data_parallel.check(TrainSpec(num_devices=num_devices, device=device))


def test_the_plan_refuses_too(labelled_corpus, tiny_encoder, tmp_path):
    with pytest.raises(ConfigError, match="num_devices must be at most"):
        prepared(labelled_corpus, tiny_encoder, tmp_path, SPEC.model_copy(update={"num_devices": 10_000}))
    assert not (tmp_path / "runs").exists()


@given(num_documents=st.integers(0, 50), size=st.integers(1, 8))
def test_shares_are_a_partition_as_even_as_can_be(num_documents, size):
    documents = np.arange(100, 100 + num_documents)
    shares = [Ranks(SimpleNamespace(process_index=rank, num_processes=size)).share(documents) for rank in range(size)]

    assert sorted(np.concatenate(shares).tolist()) == documents.tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.gpu
def test_two_gpus_learn_what_one_does(labelled_corpus, tiny_encoder, tmp_path):
    """Its twin on the CPU is `test_two_processes_learn_what_one_does`."""
    assert torch.cuda.device_count() > 1, "this test needs two GPUs"
    spec = SPEC.model_copy(update={"device": "cuda"})
    one = fine_tuned(labelled_corpus, tiny_encoder, tmp_path / "1", spec)
    two = fine_tuned(labelled_corpus, tiny_encoder, tmp_path / "2", spec.model_copy(update={"num_devices": 2}))

    for left, right in zip(one.epochs, two.epochs, strict=True):
        assert right.training_loss == pytest.approx(left.training_loss, rel=1e-3)
