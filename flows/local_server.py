"""The private Prefect server of a command, for people who have none of their own.

Prefect can start one by itself, but in the command's process group: Ctrl-C in a terminal, or the SIGTERM of `timeout`
and systemd, would end the server before the command has finished. This one has a session of its own, and ends when the
pipe from the command closes, so it outlives no command, however that ended.
"""

import atexit
import http.client
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from belt_tasks.errors import BeltError, ConfigError, without_credentials

STARTUP_S = 120.0  # a new PREFECT_HOME makes the first start slow
CHECK_S = 30.0
STOP_S = 5.0
POLL_S = 0.05


@contextmanager
def local_server() -> Iterator[None]:
    """Have the flows inside run against a private server, unless a server or a Prefect profile with one is configured.

    The server starts while Prefect and the flows are imported, and ends with this process rather than with the block:
    Prefect's threads send their last events when the process ends.

    Raises:
        BeltError: the server did not start.
        ConfigError: PREFECT_API_URL leads nowhere.
    """
    if "PREFECT_API_URL" in os.environ:
        check_answers(os.environ["PREFECT_API_URL"])
        yield
        return
    with socket.create_server(("127.0.0.1", 0)) as listening:  # the server takes it over: no port is guessed
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
        process = subprocess.Popen(  # noqa: S603 - ourselves
            [sys.executable, "-m", "flows.local_server", str(listening.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[listening.fileno()],
            start_new_session=True,
        )
    atexit.register(_stop, process)
    from prefect.context import refresh_global_settings_context  # noqa: PLC0415 - takes seconds
    from prefect.settings import PREFECT_API_URL  # noqa: PLC0415 - takes seconds

    if PREFECT_API_URL.value() is not None:  # of the active profile
        _stop(process)
        yield
        return
    os.environ["PREFECT_API_URL"] = url
    refresh_global_settings_context()
    import flows.tasks  # noqa: F401, PLC0415 - takes seconds, which the server needs as well

    _wait(process, url)
    yield


def check_answers(url: str) -> None:
    """See that a configured server answers, whatever it says.

    Raises:
        ConfigError: it does not.
    """
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=CHECK_S):  # noqa: S310 - the user's own
            pass
    except urllib.error.HTTPError:  # it may ask who we are
        pass
    except (ValueError, OSError, http.client.HTTPException) as error:
        reason = without_credentials(str(getattr(error, "reason", error)))
        raise ConfigError(
            f"PREFECT_API_URL: no Prefect server answers at {without_credentials(url)} ({reason}); start it, or unset "
            "the variable and each command has a private one"
        ) from None


def _wait(process: "subprocess.Popen[bytes]", url: str) -> None:
    """Return when the server answers."""
    give_up_at = time.monotonic() + STARTUP_S
    while process.poll() is None and time.monotonic() < give_up_at:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=STARTUP_S):  # noqa: S310 - http
                return
        except (urllib.error.URLError, OSError):
            time.sleep(POLL_S)
    code = process.poll()
    what = f"did not answer within {STARTUP_S:g} s" if code is None else f"ended with exit code {code}"
    raise BeltError(
        f"the private local Prefect server {what}; run `belt --verbose ...` for its log, or set PREFECT_API_URL to a "
        "server of your own"
    )


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Close the pipe that the server waits for, and see it end."""
    with suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=STOP_S)
        return
    process.kill()
    process.wait()


def _serve(listening: socket.socket) -> None:
    """Serve Prefect's API on a socket until standard input closes."""
    import uvicorn  # noqa: PLC0415 - the command itself does not need it
    from prefect.server.api.server import create_app  # noqa: PLC0415 - the command itself does not need it

    server = uvicorn.Server(uvicorn.Config(create_app(ephemeral=True, final=True), log_level="error", lifespan="on"))

    def stop_at_end_of_input() -> None:
        os.read(sys.stdin.fileno(), 1)
        server.should_exit = True
        time.sleep(STOP_S)
        os._exit(1)  # whatever holds it: the command is gone

    threading.Thread(target=stop_at_end_of_input, daemon=True).start()
    server.run(sockets=[listening])


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
