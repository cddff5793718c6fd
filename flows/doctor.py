"""Doctor, the part of Prefect: whether a server answers, fits, and has the pools, workers and block that belt needs.

A check returns a `belt_tasks.doctor.Finding`; what it raises becomes one.
"""

import functools
from collections.abc import Callable
from importlib.metadata import version

import httpx
from packaging.version import Version
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import WorkerStatus
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL

from belt_tasks import object_stores
from belt_tasks.doctor import Check, Finding
from belt_tasks.errors import ConfigError, without_credentials
from flows.deploy import WORK_POOLS
from flows.local_server import check_answers
from flows.storage_block import read_storage_block

REFUSED = {401, 403}


def prefect_checks(storage_block: str | None) -> list[Check]:
    """Of the server that PREFECT_API_URL or the active profile names; where none is named, that is what is found.

    Args:
        storage_block: the Secret block that flows are to use; None looks at none.
    """
    url = PREFECT_API_URL.value()
    if url is None:
        found: list[Check] = [("Prefect server", check_no_server)]
        if storage_block is not None:
            found.append((f"storage block {storage_block}", functools.partial(check_no_block, storage_block)))
        return found
    checks: list[Check] = [("Prefect server", functools.partial(check_server, url))]
    checks += [(f"work pool {name}", functools.partial(check_work_pool, name)) for name in WORK_POOLS]
    if storage_block is not None:
        checks.append((f"storage block {storage_block}", functools.partial(check_storage_block, storage_block)))
    return [(name, functools.partial(_or_why_not, check)) for name, check in checks]


def check_no_server() -> Finding:
    """No server is named."""
    found = "none is named (PREFECT_API_URL): each command has a private one while it runs"
    return Finding(check="Prefect server", status="ok", found=found)


def check_no_block(name: str) -> Finding:
    """A block is named, but no server that could have it."""
    found = "no server is named that has it: the places below were looked at with what the environment says"
    advice = "set PREFECT_API_URL to the server that has the block"
    return Finding(check=f"storage block {name}", status="problem", found=found, advice=advice)


def check_server(url: str) -> Finding:
    """The server answers, and is as new as the client."""
    check_answers(url)
    with get_client(sync_client=True) as client:
        server, here = Version(client.api_version()), Version(version("prefect"))
    found = f"version {server} at {without_credentials(url)}; belt runs {here}"
    if server.major != here.major:
        advice = "run a server and a client of the same major version"
        return Finding(check="Prefect server", status="problem", found=found, advice=advice)
    if server < here:
        advice = f"bring the server to {here} or newer: an older one may lack what the client asks for"
        return Finding(check="Prefect server", status="warning", found=found, advice=advice)
    return Finding(check="Prefect server", status="ok", found=found)


def check_work_pool(name: str) -> Finding:
    """A pool that deployments need is there, and somebody works for it."""
    check = f"work pool {name}"
    with get_client(sync_client=True) as client:
        try:
            pool = client.read_work_pool(name)
        except ObjectNotFound:
            return Finding(
                check=check,
                status="warning",
                found="not there: runs of deployments would wait for ever",
                advice=f"prefect work-pool create {name} --type process, where deployments are to run",
            )
        workers = client.read_workers_for_work_pool(name)
    online = sum(worker.status == WorkerStatus.ONLINE for worker in workers)
    found = f"type {pool.type}, {online} workers online"
    if pool.is_paused:
        advice = f"prefect work-pool resume {name}"
        return Finding(check=check, status="warning", found=f"{found}, but paused", advice=advice)
    if online == 0:
        advice = f"prefect worker start --pool {name}, on a machine that is to work"
        return Finding(check=check, status="warning", found=found, advice=advice)
    return Finding(check=check, status="ok", found=found)


def check_storage_block(name: str) -> Finding:
    """The block with the options of object stores is there and understood; later checks use it."""
    value = read_storage_block(name)
    object_stores.configure(value)
    found = f"options of {', '.join(sorted(value))}" if value else "no options: those of the environment count"
    return Finding(check=f"storage block {name}", status="ok", found=found)


def _or_why_not(check: Callable[[], Finding]) -> Finding:
    """What the server refuses is a mistake of configuration.

    Raises:
        ConfigError: it refused.
    """
    try:
        return check()
    except PrefectHTTPStatusError as error:
        status = error.response.status_code
        cure = "; set PREFECT_API_AUTH_STRING or PREFECT_API_KEY" if status in REFUSED else ""
        raise ConfigError(f"the Prefect server answered {status} {error.response.reason_phrase}{cure}") from error
    except httpx.HTTPError as error:
        raise ConfigError(f"the Prefect server does not answer ({type(error).__name__})") from error
