"""Runs that are killed or interrupted halfway: nothing is published, and the next attempt goes on where they were."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from polars.testing import assert_frame_equal

from belt_tasks import score_tables
from belt_tasks.specs import ChunkSpec, CorpusSpec, ScoreSpec
from flows.score import score
from tests.conftest import labelled_rows
from tests.flows.conftest import write_files

SPEC = ScoreSpec(chunks=ChunkSpec(chunk_size=30, stride=1))  # a chunk per token: a shard takes a second or so
BELT = Path(sys.executable).parent / "belt"


@pytest.fixture(scope="module")
def slow_corpus(tmp_path_factory) -> str:
    """Four files of 20 documents each."""
    return write_files(tmp_path_factory.mktemp("slow") / "corpus", labelled_rows(80, most_words=200), num_files=4)


@pytest.fixture(scope="module")
def undisturbed(slow_corpus, tiny_checkpoint, tmp_path_factory):
    """The predictions of a run that nothing disturbs."""
    output = str(tmp_path_factory.mktemp("undisturbed"))
    score(slow_corpus, tiny_checkpoint, output, CorpusSpec(), SPEC)
    return table(output)


def table(output: str):
    return score_tables.read_table(output, "predictions").drop("scored_at")


def receipts(output: Path) -> list[Path]:
    return sorted(output.glob("runs/*/receipts/*.json"))


def kill_after_first_receipt(
    corpus: str,
    checkpoint: str,
    output: Path,
    number: signal.Signals,
    *,
    kill: Callable[[int, int], None] = os.kill,
) -> tuple[int, str]:
    """Start `belt score`, send it a signal once a shard is finished; returns exit code and what it said.

    `kill` is `os.kill` for a signal to the command alone, or `os.killpg` for one to its process group, as a terminal's
    Ctrl-C, `timeout` and systemd send it. The command has a private Prefect server, which must end with it.
    """
    options = ["--checkpoint", checkpoint, "--output", str(output), "--chunk-size", "30", "--stride", "1"]
    with subprocess.Popen(
        [BELT, "score", corpus, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"},
    ) as process:
        children = []
        try:
            while not receipts(output):
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.01)
            children = psutil.Process(process.pid).children(recursive=True)
            kill(process.pid, number)
            said, _ = process.communicate(timeout=30)
        finally:
            process.kill()
        _, orphans = psutil.wait_procs(children, timeout=10)
        assert len(children) == 1
        assert not orphans
    return process.returncode, said


def check_that_nothing_is_published(output: Path) -> None:
    assert 1 <= len(receipts(output)) < 4
    assert not list(output.glob("runs/*/manifest.json"))
    assert score_tables.shown(str(output)) is None


def check_that_it_goes_on(corpus: str, checkpoint: str, output: Path, undisturbed) -> None:
    """Run again: finished shards stay as they are, and the table is that of an undisturbed run."""
    finished = [next(output.glob(f"runs/*/predictions/{receipt.stem}.parquet")) for receipt in receipts(output)]
    before = [(path.stat().st_mtime_ns, path.stat().st_ino) for path in finished]

    manifest = score(corpus, checkpoint, str(output), CorpusSpec(), SPEC)

    assert [(path.stat().st_mtime_ns, path.stat().st_ino) for path in finished] == before
    assert_frame_equal(table(str(output)), undisturbed, abs_tol=1e-6)
    assert len(manifest.uris(str(output), "predictions")) == 4
    assert not [file.path for file in manifest.files if file.path.endswith(".tmp")]


def test_kill_9(slow_corpus, tiny_checkpoint, tmp_path, undisturbed):
    output = tmp_path / "out"

    code, _ = kill_after_first_receipt(slow_corpus, tiny_checkpoint, output, signal.SIGKILL)

    assert code == -signal.SIGKILL
    check_that_nothing_is_published(output)
    check_that_it_goes_on(slow_corpus, tiny_checkpoint, output, undisturbed)


def test_ctrl_c(slow_corpus, tiny_checkpoint, tmp_path, undisturbed):
    output = tmp_path / "out"

    code, said = kill_after_first_receipt(slow_corpus, tiny_checkpoint, output, signal.SIGINT, kill=os.killpg)

    assert code == 130
    assert said == "Interrupted. Finished shards, if any, are kept; run the same command again to go on.\n"
    check_that_nothing_is_published(output)
    assert not list(output.rglob("*.tmp"))
    check_that_it_goes_on(slow_corpus, tiny_checkpoint, output, undisturbed)


@pytest.mark.parametrize(("number", "kill"), [(signal.SIGTERM, os.killpg), (signal.SIGHUP, os.kill)])
def test_termination(slow_corpus, tiny_checkpoint, tmp_path, number, kill):
    """A container's stop, `timeout`, a closed terminal: the process leaves in order, so its temporary files go too."""
    code, said = kill_after_first_receipt(slow_corpus, tiny_checkpoint, tmp_path / "out", number, kill=kill)

    assert code == 128 + number
    assert said == "Terminated. Finished shards, if any, are kept; run the same command again to go on.\n"
    check_that_nothing_is_published(tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tmp"))
