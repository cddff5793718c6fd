"""One fine-tuning on several machines: a launcher starts the same command on each."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from belt_tasks import fine_tuning, publishing
from belt_tasks.publishing import RunRef
from tests.conftest import labelled_rows

OPTIONS = ["--chunk-size", "24", "--stride", "18", "--epochs", "1", "--device", "cpu"]
OPTIONS += ["--documents-per-batch", "3", "--validation-fraction", "0.3", "--learning-rate", "2e-3"]
BIN = Path(sys.executable).parent


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def machines(arguments, *, size=2, environment=os.environ):
    """The command as PyTorch's launcher starts it on several machines, here all in one; what each said."""
    port = free_port()
    started = [
        subprocess.Popen(
            [
                *(str(BIN / "torchrun"), "--nnodes", str(size), "--node-rank", str(rank), "--nproc-per-node", "1"),
                *("--master-addr", "127.0.0.1", "--master-port", str(port)),
                *("--no-python", str(BIN / "belt"), *arguments),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**environment, "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(size)
    ]
    said = [process.communicate(timeout=200)[0] for process in started]
    return [process.returncode for process in started], said


def receipt_of(output):
    run = publishing.read_manifest(str(output)).run
    return fine_tuning.read_receipt(RunRef(output_uri=str(output), run_id=run["run_id"]))


@pytest.fixture
def labelled_corpus(write_corpus):
    return write_corpus(labelled_rows(36, most_words=60), num_files=2, name="labelled")


def test_two_machines_learn_what_one_does_and_a_complete_run_lets_all_go(labelled_corpus, tiny_encoder, tmp_path):
    command = ["fine-tune", labelled_corpus, "--encoder", str(tiny_encoder), *OPTIONS, "--output"]
    alone = subprocess.run([BIN / "belt", *command, tmp_path / "one"], capture_output=True, text=True, check=False)
    assert alone.returncode == 0, alone.stderr

    codes, said = machines([*command, str(tmp_path / "two")])
    assert codes == [0, 0], said
    assert "fine-tuning: binary" in said[0]
    assert "fine-tuning: binary" not in said[1]  # it helped
    one, two = receipt_of(tmp_path / "one"), receipt_of(tmp_path / "two")
    assert two.epochs[0].training_loss == pytest.approx(one.epochs[0].training_loss, rel=1e-4)
    assert two.epochs[0].validation["loss"] == pytest.approx(one.epochs[0].validation["loss"], rel=1e-4)

    codes, said = machines([*command, str(tmp_path / "two")])
    assert codes == [0, 0], said


def test_a_mistake_ends_all_of_them(tiny_encoder, tmp_path):
    codes, said = machines(
        ["fine-tune", str(tmp_path / "none"), "--encoder", str(tiny_encoder), "--output", str(tmp_path)]
    )

    assert 0 not in codes
    assert "no such file, directory or glob" in said[0]
