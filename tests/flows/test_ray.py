"""Scoring on Ray clusters: real ones, on this machine. Results, errors and what is left behind are those of threads."""

import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import psutil
import pydantic
import pytest
import torch
from polars.testing import assert_frame_equal
from prefect.blocks.system import Secret
from prefect.exceptions import ParameterTypeError

# as in a cluster that only this machine can reach; Ray reads all of this once
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)

from belt_tasks import checkpoint, progress, score_planning, score_tables, storage
from belt_tasks.errors import ConfigError, DeadlineError, ShardError
from belt_tasks.specs import ChunkSpec, CorpusSpec, RaySpec, ScoreSpec
from flows import tasks
from flows.ray_workers import ray_workers
from flows.score import score
from tests.conftest import labelled_rows
from tests.flows.conftest import write_files
from tests.s3_server import KEYS

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
CPU = ScoreSpec(device="cpu", max_rejected_share=1.0)
SLOW = ScoreSpec(device="cpu", chunks=ChunkSpec(chunk_size=30, stride=1))  # a chunk per token
TABLES = ("predictions", "evidence", "rejected")
STARTUP_S = 60


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@pytest.fixture(scope="module")
def cluster():
    """A cluster of four CPUs, and a GPU that it believes in."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    port, client_port = free_port(), free_port()
    options = [f"--port={port}", f"--ray-client-server-port={client_port}", f"--temp-dir={folder}"]
    options += ["--num-cpus=4", "--num-gpus=1", "--object-store-memory=83886080", "--include-dashboard=false"]
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(
            [BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", *options],
            stdout=said,
            stderr=said,
            # gRPC's handlers of forks now and then break the processes that Ray forks for its clients
            env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "GRPC_ENABLE_FORK_SUPPORT": "0"},
        )
    try:
        for each in (port, client_port):
            wait_for(each, process, folder / "said")
        yield SimpleNamespace(
            address=f"127.0.0.1:{port}", client=f"ray://127.0.0.1:{client_port}", folder=folder, pid=process.pid
        )
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(timeout=30)
        for child in psutil.wait_procs(children, timeout=60)[1]:
            child.kill()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(port: int, process: subprocess.Popen, said: Path) -> None:
    give_up_at = time.monotonic() + STARTUP_S
    while True:
        assert process.poll() is None, said.read_text()
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert time.monotonic() < give_up_at, said.read_text()
            time.sleep(0.1)
        else:
            return


@pytest.fixture(scope="module")
def slow_corpus(tmp_path_factory) -> str:
    """Five files of 12 documents each."""
    return write_files(tmp_path_factory.mktemp("slow") / "corpus", labelled_rows(60, most_words=200), num_files=5)


@contextmanager
def counted_progress() -> Iterator[Counter]:
    """How much of each stage was reported as done."""
    done: Counter = Counter()

    def advance(stage, num_done, _num_more):
        done[stage] += num_done

    with progress.listen(advance):
        yield done


@pytest.fixture(scope="module")
def by_threads(labelled_corpus, tiny_checkpoint, tmp_path_factory):
    """(manifest, output, progress) of a run without Ray."""
    output = str(tmp_path_factory.mktemp("threads"))
    with counted_progress() as done:
        manifest = score(labelled_corpus, tiny_checkpoint, output, CorpusSpec(), CPU)
    return manifest, output, done


def table(output, name: str = "predictions") -> pl.DataFrame:
    frame = score_tables.read_table(str(output), name)
    return frame.select(pl.exclude("scored_at", "run_id")).sort(pl.exclude("score", "scores", "logits", "contribution"))


def check_same(output, expected) -> None:
    for name in TABLES:
        assert_frame_equal(table(output, name), table(expected, name), abs_tol=1e-6)


def workers_of(pid: int) -> list[psutil.Process]:
    """Belt's workers among the descendants of a process."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            found += [process] if "RemoteWorker" in " ".join(process.cmdline()) else []
        except psutil.NoSuchProcess:
            continue
    return found


def receipts(output: Path) -> list[Path]:
    return sorted(output.glob("runs/*/receipts/*.json"))


def test_rows_run_and_progress_are_those_of_threads(
    cluster, labelled_corpus, tiny_checkpoint, tmp_path, by_threads, caplog
):
    manifest, expected, progressed = by_threads
    ray = RaySpec(address=cluster.address, num_workers=2, num_gpus=0.5)
    with caplog.at_level(logging.INFO, logger="belt_tasks"), counted_progress() as done:
        found = score(labelled_corpus, tiny_checkpoint, str(tmp_path / "out"), CorpusSpec(), CPU, runner="ray", ray=ray)

    assert found.run["run_id"] == manifest.run["run_id"]
    assert found.run["scoring_fingerprint"] == manifest.run["scoring_fingerprint"]
    assert found.rejected_by_reason == manifest.rejected_by_reason
    check_same(tmp_path / "out", expected)
    assert done["encode"] >= progressed.pop("encode")  # each process encodes equal texts once
    assert {stage: done[stage] for stage in progressed} == progressed
    assert progressed["tokenize"] == progressed["score"] == 35
    # the log of the workers reaches this process, and says that each has loaded the model once
    loaded = [record.process for record in caplog.records if record.getMessage().startswith("loaded checkpoint")]
    assert 1 <= len(loaded) == len(set(loaded)) <= 2
    assert os.getpid() not in loaded


def test_a_worker_has_its_cores_says_what_is_wrong_and_ends_with_its_pool(cluster, tmp_path):
    with ray_workers(RaySpec(address=cluster.address, num_workers=1, num_cpus=3)) as workers:
        assert workers().call(torch.get_num_threads) == 3
        assert workers().call(os.getenv, "RAYON_NUM_THREADS") == "3"
        with pytest.raises(ConfigError, match=rf"^cannot read {tmp_path}/none: no such file or directory$"):
            workers().call(storage.read_bytes, f"{tmp_path}/none")
        with pytest.raises(pydantic.ValidationError, match=r"^1 validation error for ChunkSpec"):
            workers().call(ChunkSpec, stride=0)
        (process,) = workers_of(cluster.pid)
        assert workers().call(os.getpid) == process.pid

    assert psutil.wait_procs([process], timeout=60)[1] == []


def test_a_shard_that_cannot_be_read_fails_as_with_threads(
    cluster, labelled_corpus, tiny_checkpoint, tmp_path, monkeypatch
):
    corpus = tmp_path / "corpus"
    shutil.copytree(labelled_corpus, corpus)
    whole = (corpus / "part-1.parquet").read_bytes()

    def plan_and_break(*arguments):
        plan = score_planning.plan_scoring(*arguments)
        (corpus / "part-1.parquet").write_bytes(whole[: len(whole) // 2])
        return plan

    monkeypatch.setattr(tasks, "plan_scoring", tasks.bind(plan_and_break))
    said = []
    for runner in ("threads", "ray"):
        (corpus / "part-1.parquet").write_bytes(whole)
        ray = RaySpec(address=cluster.address, num_workers=2)
        with pytest.raises(ShardError) as raised:
            score(str(corpus), tiny_checkpoint, str(tmp_path / runner), CorpusSpec(), CPU, runner=runner, ray=ray)
        said.append(str(raised.value))
        assert len(receipts(tmp_path / runner)) == 2

    assert said[0] == said[1]
    assert said[0].startswith("1 of 3 shards failed, so nothing was published")


def test_a_worker_that_is_killed_costs_a_retry_and_nothing_else(
    cluster, slow_corpus, tiny_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(tasks, "RETRY_DELAYS_S", [0.1, 0.1, 0.1])
    output, killed, said = tmp_path / "out", [], []
    over = threading.Event()

    def kill_one() -> None:
        while not receipts(output) and not over.wait(0.01):
            pass
        (process, *_) = workers_of(cluster.pid)
        process.kill()
        killed.append(process.pid)

    ray = RaySpec(address=cluster.address, num_workers=2)
    with ThreadPoolExecutor(1) as thread, progress.listen(lambda *_: None, said.append):
        killing = thread.submit(kill_one)
        try:
            score(slow_corpus, tiny_checkpoint, str(output), CorpusSpec(), SLOW, runner="ray", ray=ray)
        finally:
            over.set()
        killing.result()

    assert len(killed) == 1
    assert [words for words in said if words.startswith("score_shard: its Ray worker was lost (")]
    score(slow_corpus, tiny_checkpoint, str(tmp_path / "undisturbed"), CorpusSpec(), SLOW)
    check_same(output, tmp_path / "undisturbed")


def test_a_run_that_takes_too_long_ends_its_workers_and_the_next_attempt_goes_on(
    cluster, labelled_corpus, tiny_checkpoint, tmp_path, monkeypatch, by_threads
):
    output = tmp_path / "out"
    ray = RaySpec(address=cluster.address, num_workers=1)
    # hours go by here once a shard is finished there
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 7200.0 if receipts(output) else 0.0))
    with pytest.raises(DeadlineError, match=r"not done within the 3,600 s that the run may take"):
        score(
            labelled_corpus, tiny_checkpoint, str(output), CorpusSpec(), CPU, time_limit_s=3600, runner="ray", ray=ray
        )
    monkeypatch.undo()

    psutil.wait_procs(workers_of(cluster.pid), timeout=60)
    assert workers_of(cluster.pid) == []
    finished = receipts(output)
    before = [path.stat().st_mtime_ns for path in finished]
    assert 1 <= len(finished) < 3
    assert score_tables.shown(str(output)) is None
    score(labelled_corpus, tiny_checkpoint, str(output), CorpusSpec(), CPU)
    assert [path.stat().st_mtime_ns for path in finished] == before
    check_same(output, by_threads[1])


def test_workers_have_the_options_of_object_stores_and_ray_keeps_none(
    cluster, s3, s3_root, labelled_corpus, tiny_checkpoint, by_threads, tmp_path
):
    """Neither the cluster nor the command has them in its environment; the command is Ray's client."""
    storage.put_directory(Path(labelled_corpus), f"{s3_root}/corpus", last="")
    storage.put_directory(Path(checkpoint.resolve(tiny_checkpoint)), f"{s3_root}/model", last="belt.json")
    key, secret, _ = KEYS["belt"]
    options = {"key": key, "secret": secret, "endpoint_url": s3.endpoint, "region_name": "us-east-1"}
    Secret(value=json.dumps({"s3": options})).save("for-ray", overwrite=True)

    environment = {name: value for name, value in os.environ.items() if name not in s3.environment()}
    arguments = ["--checkpoint", f"{s3_root}/model", "--output", f"{s3_root}/out", "--storage-block", "for-ray"]
    arguments += ["--device", "cpu", "--max-rejected-share", "1", "--runner", "ray", "--address", cluster.client]
    meters = tmp_path / "belt.prom"
    done = subprocess.run(
        [BIN / "belt", "score", f"{s3_root}/corpus", *arguments, "--num-workers", "1"],
        env=environment | {"BELT_METRICS_TEXTFILE": str(meters)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, complaints(done.stderr)) == (0, "")
    assert_frame_equal(table(f"{s3_root}/out"), table(by_threads[1]), abs_tol=1e-6)
    num_documents = len(table(by_threads[1]))
    assert f'belt_documents_total{{stage="score"}} {num_documents:.1f}' in meters.read_text()  # of the workers
    kept = [path for path in cluster.folder.rglob("*") if path.is_file()]
    assert any(path.stat().st_size for path in kept)
    for path in kept:
        assert secret.encode() not in path.read_bytes(), path


def test_a_cluster_with_another_belt_is_told_once_and_keeps_nobody_waiting(
    cluster, labelled_corpus, tiny_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr("flows.ray_workers.version", lambda _: "9.9")

    with pytest.raises(ConfigError, match=r"^ray: the cluster's nodes have belt \S+ installed, this is belt 9\.9$"):
        score(
            labelled_corpus,
            tiny_checkpoint,
            str(tmp_path),
            CorpusSpec(),
            CPU,
            runner="ray",
            ray=RaySpec(address=cluster.address, num_workers=1),
        )


def test_what_is_asked_of_a_cluster_is_checked(cluster, labelled_corpus, tiny_checkpoint, tmp_path, monkeypatch):
    def fails(ray: RaySpec, words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            score(labelled_corpus, tiny_checkpoint, str(tmp_path), CorpusSpec(), CPU, runner="ray", ray=ray)

    fails(RaySpec(address="127.0.0.1:1"), r"^ray: cannot connect to a cluster at 127\.0\.0\.1:1: .*refused")
    fails(
        RaySpec(address=cluster.address, num_cpus=64),
        r"^ray: no node has num_cpus 64 and num_gpus 0 for a worker; the cluster has 1 nodes: 4 CPUs and 1 GPUs \(",
    )
    fails(
        RaySpec(address=cluster.address, num_cpus=64, num_workers=1, start_timeout_s=1),
        r"^ray: no worker started within start_timeout_s \(1\); each needs num_cpus 64 and num_gpus 0 free on one node",
    )
    with pytest.raises(ParameterTypeError, match=r"ray\.num_gpus"):
        score(labelled_corpus, tiny_checkpoint, str(tmp_path), runner="ray", ray={"num_gpus": 2})
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    fails(RaySpec(), r"^runner must be 'threads' where Ray is not installed, got 'ray': pip install 'belt\[ray\]'$")


def command(corpus: str, checkpoint_uri: str, output: Path, home: Path, *more: str) -> subprocess.Popen:
    """`belt score` on a private cluster, with nothing in the environment that speaks of Ray."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    options = ["--checkpoint", checkpoint_uri, "--output", output, "--device", "cpu", "--max-rejected-share", "1"]
    return subprocess.Popen(
        [BIN / "belt", "score", corpus, *options, "--runner", "ray", "--num-workers", "2", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"HOME": str(home), "HF_HUB_OFFLINE": "1"},
        start_new_session=True,
    )


def complaints(said: str) -> str:
    """Standard error without the lines that say how far a long run is."""
    return "".join(line for line in said.splitlines(keepends=True) if not re.match(r"(tokenize|encode): [\d,]+ ", line))


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


FOLDER = r"/tmp/belt-ray-\w+"  # noqa: S108 - where the paths of sockets are short


def ray_folders_of(pid: int) -> set[Path]:
    """Where a run's own cluster keeps its files; other runs may have theirs at the same time."""
    found: set[Path] = set()
    for child in descendants(pid):
        with suppress(psutil.Error):
            found |= {Path(path) for path in re.findall(FOLDER, " ".join(child.cmdline()))}
    return found


def test_a_private_cluster_listens_to_this_machine_alone_and_leaves_nothing(
    labelled_corpus, tiny_checkpoint, tmp_path, by_threads
):
    seen, names, addresses = set(), set(), set()
    folders: set[Path] = set()
    (tmp_path / "home").mkdir()
    with command(labelled_corpus, tiny_checkpoint, tmp_path / "out", tmp_path / "home") as process:
        while process.poll() is None:
            folders |= ray_folders_of(process.pid)
            for child in [psutil.Process(process.pid), *descendants(process.pid)]:
                try:
                    found = child.net_connections()
                    names.add(child.name())
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
                seen.add(child)
                addresses |= {each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN}
            time.sleep(0.2)
        shown, said = process.communicate()

    assert (process.returncode, complaints(said)) == (0, "")
    assert "## score: 35 documents" in shown
    check_same(tmp_path / "out", by_threads[1])
    assert {"raylet", "gcs_server"} <= names
    assert addresses <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert psutil.wait_procs(seen, timeout=60)[1] == []
    assert folders
    assert not any(folder.exists() for folder in folders)
    assert list((tmp_path / "home").rglob("*auth_token*")) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_cancelled_or_killed_ends_its_cluster(slow_corpus, tiny_checkpoint, tmp_path, number):
    """SIGTERM is how Prefect cancels a run."""
    output = tmp_path / "out"
    slow = ("--chunk-size", "30", "--stride", "1")
    with command(slow_corpus, tiny_checkpoint, output, tmp_path, *slow) as process:
        try:
            while not receipts(output):
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.01)
            # those of Ray's that look after the others see for themselves, within a minute or two, that these are gone
            children = [child for child in descendants(process.pid) if "Agent" not in child.name()]
            folders = ray_folders_of(process.pid)
            assert folders
            assert workers_of(process.pid)
            os.kill(process.pid, number)
            _, said = process.communicate(timeout=200)
        finally:
            process.kill()

    assert psutil.wait_procs(children, timeout=60)[1] == []
    assert score_tables.shown(str(output)) is None
    assert 1 <= len(receipts(output)) < 5
    if number == signal.SIGTERM:
        assert process.returncode == 128 + number
        assert (
            complaints(said) == "Terminated. Finished shards, if any, are kept; run the same command again to go on.\n"
        )
        assert not list(output.rglob("*.tmp"))
        assert not any(folder.exists() for folder in folders)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
