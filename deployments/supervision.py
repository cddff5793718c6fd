"""Supervision: supervisord keeps the services of a stack running, and what it says of them is checked.

A service does its work if its process runs, answers, and has its ports: on a port that another program has, somebody
else would answer.
"""

import configparser
import ctypes
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import xmlrpc.client
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from supervisor.xmlrpc import SupervisorTransport

from belt_tasks.errors import BeltError, ConfigError
from deployments.services import HOST, SERVICES, Stack, listener, wait_until

ROOT = Path(__file__).parents[1]
STOP_S = 60.0  # a run that is under way ends with its worker, in order
LONGEST_LOG_BYTES = 10_000_000
TAIL_BYTES = 1000
PORT_S = 10.0
LEFTOVER_S = 10.0  # a worker that cannot tell its server that it ends would try for minutes
MARK = "BELT_STACK_FOLDER"
"""In the environment of all that began with a stack."""
PR_SET_PDEATHSIG = 1  # of prctl(2)


@contextmanager
def supervised(stack: Stack) -> Iterator[Any]:
    """The running supervisord's own commands, such as `getProcessInfo(name)`; None where none runs."""
    transport = SupervisorTransport(None, None, f"unix://{_socket(stack)}")
    with xmlrpc.client.ServerProxy(f"http://{HOST}", transport=transport) as proxy:
        try:
            proxy.supervisor.getState()
        except OSError:
            yield None
            return
        yield proxy.supervisor


def runs(stack: Stack) -> bool:
    """Whether supervisord does."""
    with supervised(stack) as supervisor:
        return supervisor is not None


def check_ports(stack: Stack) -> None:
    """See that nobody listens where the services will; those of before may take a moment to end.

    Raises:
        ConfigError: somebody does.
    """
    ports = [(name, port) for name, service in SERVICES.items() for port in service(stack).ports]
    with suppress(BeltError):
        wait_until("not free", lambda: all(listener(port) is None for _, port in ports), patience_s=PORT_S)
    for name, port in ports:
        if (process_id := listener(port)) is not None:
            raise ConfigError(f"{name}: {_taken(name, port, process_id)}")


def end_leftovers(stack: Stack) -> bool:
    """End what is left of the services and of their runs where supervisord ended before them; whether there was any."""
    left = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == str(stack.folder):
                left.append(process)
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in left:
            with suppress(psutil.Error):
                end(process)
        psutil.wait_procs(left, timeout=LEFTOVER_S)
    return bool(left)


def start(stack: Stack) -> None:
    """Start supervisord, which goes to the background and starts the services."""
    logs = stack.folder / "logs"
    logs.mkdir(exist_ok=True)
    config = configparser.RawConfigParser()
    config["supervisord"] = {
        "logfile": str(logs / "supervisord.log"),
        "pidfile": str(stack.folder / "supervisord.pid"),
        "childlogdir": str(logs),
        "identifier": "belt",
    }
    config["unix_http_server"] = {"file": str(_socket(stack)), "chmod": "0600"}
    config["rpcinterface:supervisor"] = {
        "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
    }
    for priority, (name, service) in enumerate(SERVICES.items(), start=1):
        config[f"program:{name}"] = {
            "command": shlex.join(
                [sys.executable, "-m", "deployments.stack", "run", name, "--folder", str(stack.folder)]
            ),
            "directory": str(ROOT),
            "priority": str(priority),
            "startsecs": "1",
            "startretries": "1000000",  # it goes on trying; `status` tells
            "autorestart": "true",
            "stopsignal": service(stack).stop_signal,
            "stopwaitsecs": f"{STOP_S:.0f}",
            "stopasgroup": "false",
            "killasgroup": "true",
            "redirect_stderr": "true",
            "stdout_logfile": str(logs / f"{name}.log"),
            "stdout_logfile_maxbytes": str(LONGEST_LOG_BYTES),
            "stdout_logfile_backups": "3",
        }
    path = stack.folder / "supervisord.conf"
    with path.open("w", encoding="utf-8") as file:
        config.write(file)
    done = subprocess.run(
        [sys.executable, "-m", "supervisor.supervisord", "-c", str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")},
    )
    if done.returncode:
        raise BeltError(f"supervisord did not start: {' '.join((done.stdout + done.stderr).split())[-TAIL_BYTES:]}")
    wait_until("supervisord did not answer", lambda: runs(stack))


def end_with_parent(number: signal.Signals) -> None:
    """Have Linux send this process a signal when supervisord ends, however it ends: nobody else would stop it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() == 1:  # it has ended already
            sys.exit(1)


def stop(stack: Stack) -> bool:
    """Stop supervisord, and with it the services, in order; returns whether there was anything to stop.

    Raises:
        BeltError: it does not end.
    """
    with supervised(stack) as supervisor:
        if supervisor is None:
            return end_leftovers(stack)
        process_id = supervisor.getPID()
        supervisor.shutdown()
    wait_until("supervisord did not end", lambda: not _lives(process_id), patience_s=STOP_S * (len(SERVICES) + 1))
    shutil.rmtree(_socket(stack).parent)
    return True


def wait_for(stack: Stack, name: str) -> None:
    """Return when a service does its work.

    Raises:
        ConfigError: another program has a port of its.
        BeltError: it does not, in time.
    """
    problem: str | None = None

    def serves() -> bool:
        nonlocal problem
        with supervised(stack) as supervisor:
            problem = "supervisord ended" if supervisor is None else problem_of(stack, name, supervisor)
        return problem is None

    try:
        wait_until("it did not answer", serves)
    except BeltError as error:
        if problem is not None and "taken" in problem:
            raise ConfigError(f"{name}: {problem}") from None
        log = (stack.folder / "logs" / f"{name}.log").read_text(encoding="utf-8", errors="replace")[-TAIL_BYTES:]
        raise BeltError(f"{name}: {error}; its log ends with: {log}") from error


def problem_of(stack: Stack, name: str, supervisor: Any) -> str | None:  # noqa: ANN401 - as `supervised` gives it
    """What keeps a service from its work; None where it does it."""
    service, info = SERVICES[name](stack), supervisor.getProcessInfo(name)
    for port in service.ports:
        process_id = listener(port)
        if process_id is not None and not _is_of(process_id, info["pid"]):
            return _taken(name, port, process_id)
    return None if info["statename"] == "RUNNING" and service.answers() else "does not answer"


def _is_of(process_id: int, service_id: int) -> bool:
    """Whether a process is that of a service, or began with it."""
    with suppress(psutil.Error):
        return service_id in {process_id, *(parent.pid for parent in psutil.Process(process_id).parents())}
    return False


def _taken(name: str, port: int, process_id: int) -> str:
    who = "another user's"
    with suppress(psutil.Error):
        who = f"{psutil.Process(process_id).name()}, process {process_id}" if process_id else who
    return (
        f"port {port} is taken by another program ({who}); stop that, or choose another port with --{name}-port of "
        "`python -m deployments.stack up`"
    )


def _socket(stack: Stack) -> Path:
    """In a folder of its own under the temporary one, since paths of sockets must be short."""
    name = hashlib.sha256(str(stack.folder).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"belt-{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"{folder}: must be this user's alone, for the socket of supervisord")
    return folder / "supervisor.sock"


def _lives(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True
