"""A whole stack on this machine: runs are triggered as people trigger them, watched, and their processes killed."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.settings import PREFECT_API_URL, temporary_settings

from deployments import supervision
from deployments.services import Stack

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PATIENCE_S = 600  # beside other tests on two cores a run takes a minute to start
POLL_S = 0.1


@dataclass(kw_only=True)
class Rehearsal:
    """The stack, and everything that was triggered on it."""

    stack: Stack
    site: dict[str, str]
    """Settings of the deployments."""
    run_ids: list[UUID] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """Of commands."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "BELT_"))}
        return clean | self.stack.environment

    def command(self, *arguments: str | Path, **more: str) -> str:
        """Run a command to its good end; returns what it printed."""
        done = subprocess.run(
            arguments, env=self.environment | more, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def make(self, verb: str, *arguments: str, **more: str) -> str:
        """A command of the stack's."""
        return self.command(*self._of_stack(verb), *arguments, **more)

    @contextmanager
    def started(self, verb: str, **more: str) -> Iterator[subprocess.Popen[bytes]]:
        """A command of the stack's that goes on."""
        with subprocess.Popen(
            self._of_stack(verb), env=self.environment | more, cwd=ROOT, stdout=subprocess.DEVNULL
        ) as process:
            yield process

    def _of_stack(self, verb: str) -> list[str]:
        return [sys.executable, "-m", "deployments.stack", verb, "--folder", str(self.stack.folder)]

    def trigger(self, deployment: str, **parameters: Any) -> UUID:
        """A run, by the command line."""
        options = [word for name, value in parameters.items() for word in ("--param", f"{name}={json.dumps(value)}")]
        told = self.command(BIN / "prefect", "--no-prompt", "deployment", "run", deployment, *options)
        run_id = UUID(re.search(r"UUID: ([0-9a-f-]{36})", told).group(1))
        self.run_ids.append(run_id)
        return run_id

    def ask(self, question: Callable[[Any], Any]) -> Any:
        """Something of the Prefect server; asked again while it is away."""
        give_up_at = time.monotonic() + PATIENCE_S
        while True:
            try:
                with temporary_settings({PREFECT_API_URL: self.stack.api_url}), get_client(sync_client=True) as client:
                    return question(client)
            except Exception:
                if time.monotonic() > give_up_at:
                    raise
                time.sleep(POLL_S)

    def run(self, run_id: UUID) -> FlowRun:
        """As it is now."""
        return self.ask(lambda client: client.read_flow_run(run_id))

    def states(self, run_id: UUID) -> list[State]:
        """All that it was in, in order."""
        states = self.ask(lambda client: client.read_flow_run_states(run_id))
        return sorted(states, key=lambda state: state.timestamp)

    def wait(self, run_id: UUID, *names: str) -> FlowRun:
        """Until the run is in one of these states."""
        found: list[FlowRun] = []

        def is_there() -> bool:
            found[:] = [self.run(run_id)]
            return found[0].state is not None and found[0].state.name in names

        wait_until(is_there, lambda: f"{found[0].name} is {found[0].state}, not one of {names}\n{self.logs()}")
        return found[0]

    def logs(self) -> str:
        """Ends of the services' logs, for whoever reads a failure."""
        logs = sorted((self.stack.folder / "logs").glob("*.log"))
        return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)

    def service(self, name: str) -> psutil.Process:
        """A service's process."""
        with supervision.supervised(self.stack) as supervisor:
            return psutil.Process(supervisor.getProcessInfo(name)["pid"])

    def supervisor(self) -> psutil.Process:
        """The process that keeps the services running."""
        with supervision.supervised(self.stack) as supervisor:
            return psutil.Process(supervisor.getPID())

    def process_of(self, run_id: UUID) -> psutil.Process:
        """The process that a run is at work in."""
        for process in psutil.process_iter():
            try:
                if process.environ().get("PREFECT__FLOW_RUN_ID") == str(run_id):
                    return process
            except psutil.Error:
                continue
        raise LookupError(run_id)

    def victim(self, name: str, run_id: UUID) -> psutil.Process:
        """A service's process, or the run's own."""
        return self.process_of(run_id) if name == "flow" else self.service(name)


def wait_until(is_so: Callable[[], bool], told: Callable[[], str] = lambda: "", patience_s: float = PATIENCE_S) -> None:
    """Until something is so."""
    give_up_at = time.monotonic() + patience_s
    while not is_so():
        assert time.monotonic() < give_up_at, told()
        time.sleep(POLL_S)
