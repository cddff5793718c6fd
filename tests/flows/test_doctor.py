"""`belt doctor` with a real Prefect server: what it says of the server, its pools, their workers and the block."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prefect.blocks.system import Secret
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectNotFound

from belt_tasks import object_stores
from flows.doctor import check_storage_block, check_work_pool

BELT = str(Path(sys.executable).parent / "belt")
STARTUP_S = 120


def findings(*arguments: str, **more: str) -> tuple[int, dict[str, dict[str, str]], str]:
    """(exit code, findings by what was looked at, all that was printed) of `belt doctor --json`."""
    command = [BELT, "doctor", "--json", *arguments]
    done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    told = json.loads(done.stdout)
    assert told["ok"] == (done.returncode == 0)
    return done.returncode, {each["check"]: each for each in told["findings"]}, done.stdout


@pytest.fixture
def pool(client) -> Iterator[str]:
    """A work pool, gone after the test."""
    client.create_work_pool(WorkPoolCreate(name="examined", type="process"))
    yield "examined"
    client.delete_work_pool("examined")


@contextmanager
def guarded_server(home: Path, password: str) -> Iterator[str]:
    """A Prefect server that wants to know who asks; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.local_server", str(listening.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[listening.fileno()],
            env=os.environ | {"PREFECT_SERVER_API_AUTH_STRING": password, "PREFECT_HOME": str(home)},
        )
    try:
        give_up_at = time.monotonic() + STARTUP_S
        while True:
            try:
                urllib.request.urlopen(f"{url}/ready", timeout=STARTUP_S).close()  # noqa: S310 - http
            except urllib.error.HTTPError as error:
                error.close()
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < give_up_at
                time.sleep(0.2)
            else:
                break
        yield url
    finally:
        process.stdin.close()
        process.wait()


def test_a_server_that_fits(prefect_server):
    code, found, _ = findings()

    assert code == 0
    assert found["Prefect server"]["status"] == "ok"
    assert prefect_server in found["Prefect server"]["found"]
    assert {"work pool cpu", "work pool gpu"} <= found.keys()


def test_no_server_is_no_problem(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    command = [BELT, "doctor"]
    environment["PREFECT_HOME"] = str(tmp_path / "home")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    assert "each command has a private one" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("problem: 0")


def test_a_block_without_a_server_is_a_problem(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    environment["PREFECT_HOME"] = str(tmp_path / "home")
    command = [BELT, "doctor", "--storage-block", "ours"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert "storage block ours" in done.stdout
    assert "no server is named that has it" in " ".join(done.stdout.split())


def test_a_server_that_does_not_answer_is_a_problem():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

    code, found, _ = findings(PREFECT_API_URL=f"http://127.0.0.1:{port}/api")

    assert code == 1
    assert found["Prefect server"]["status"] == "problem"
    assert "no Prefect server answers" in found["Prefect server"]["found"]
    assert found["torch"]["status"] == "ok"


def test_a_server_that_wants_to_know_who_asks(tmp_path):
    with guarded_server(tmp_path / "home", "admin:hush") as url:
        code, found, _ = findings(PREFECT_API_URL=url)
        allowed, known, told = findings(PREFECT_API_URL=url, PREFECT_API_AUTH_STRING="admin:hush")

    assert (code, allowed) == (1, 0)
    assert "401 Unauthorized; set PREFECT_API_AUTH_STRING" in found["Prefect server"]["found"]
    assert known["Prefect server"]["status"] == "ok"
    assert known["work pool gpu"]["status"] == "warning"  # nobody has made it
    assert "hush" not in told


def test_settings_that_prefect_refuses_are_a_problem():
    code, found, _ = findings(PREFECT_API_REQUEST_TIMEOUT="soon")

    assert code == 1
    assert found["Prefect"]["status"] == "problem"
    assert found["torch"]["status"] == "ok"


def test_settings_that_end_other_commands_are_told():
    code, found, _ = findings(BELT_METRICS_PORT="many")

    assert code == 1
    assert found["logs and metrics"]["found"].startswith("BELT_METRICS_PORT: Input should be a valid integer")


def test_a_pool_is_ready_when_somebody_works_for_it(pool, client):
    assert check_work_pool(pool).status == "warning"
    assert check_work_pool(pool).advice == "prefect worker start --pool examined, on a machine that is to work"

    client.request("POST", "/work_pools/{name}/workers/heartbeat", path_params={"name": pool}, json={"name": "w"})
    assert (check_work_pool(pool).status, check_work_pool(pool).found) == ("ok", "type process, 1 workers online")

    client.update_work_pool(pool, WorkPoolUpdate(is_paused=True))
    assert check_work_pool(pool).status == "warning"
    assert check_work_pool(pool).advice == "prefect work-pool resume examined"


def test_a_pool_that_is_not_there(client):
    with pytest.raises(ObjectNotFound):
        client.read_work_pool("nobody")

    assert check_work_pool("nobody").status == "warning"


def test_a_storage_block_is_put_to_use(tmp_path, s3_server):
    who = s3_server.environment()
    options = {
        "key": who["AWS_ACCESS_KEY_ID"],
        "secret": who["AWS_SECRET_ACCESS_KEY"],
        "endpoint_url": who["AWS_ENDPOINT_URL"],
        "region_name": who["AWS_REGION"],
    }
    Secret(value=json.dumps({"s3": options})).save("doctors-store", overwrite=True)
    Secret(value="{}").save("doctors-empty", overwrite=True)
    try:
        found = check_storage_block("doctors-store")
        assert (found.status, found.found) == ("ok", "options of s3")
        assert check_storage_block("doctors-empty").status == "ok"
    finally:
        object_stores.configure({})

    places = ["--output", "s3://belt/examined", "--corpus", str(tmp_path)]
    code, there, told = findings("--storage-block", "doctors-store", *places)
    assert (code, there["output"]["status"], there["corpus"]["status"]) == (1, "ok", "problem")
    assert options["secret"] not in told
    code, there, _ = findings("--storage-block", "nothing-of-the-kind")
    assert (code, there["storage block nothing-of-the-kind"]["status"]) == (1, "problem")
