"""Services of deployments/docker/compose.yaml, as far as they run without containers."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import yaml

from belt_tasks import doctor, object_stores

COMPOSE = Path(__file__).parents[2] / "deployments" / "docker" / "compose.yaml"


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on; the store takes their neighbours 10,000 above as well."""
    with ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < number:
            port = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            ports += [port] if port < 50_000 else []
        return ports


def test_the_object_store_takes_its_key_from_the_environment(tmp_path, monkeypatch):
    """With the options of the compose file, on the same version."""
    options = [
        option
        for option in yaml.safe_load(COMPOSE.read_text())["services"]["s3"]["command"].split()
        if "port=8333" not in option and "=/data" not in option and "bind" not in option
    ]
    s3, master, volume, filer = free_ports(4)
    ports = [f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"]
    command = [
        Path(sys.executable).parent / "weed",
        options[0],
        f"-dir={tmp_path}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        *ports,
        *options[1:],
    ]
    who = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, env=os.environ | who, stdout=log, stderr=log)
    try:
        give_up_at = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{s3}/healthz", timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < give_up_at
                time.sleep(0.2)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3}")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        statuses = []
        for secret in ("secret", "wrong"):
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
            object_stores.configure({})
            (found,) = doctor.examine("places", lambda: doctor.place_checks(output_uri="s3://belt/out"))
            statuses.append(found.status)
    finally:
        object_stores.configure({})
        process.kill()
        process.wait()

    assert statuses == ["ok", "problem"]
