"""Files of local disks that appear whole or not at all: each is written under another name beside its own."""

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_TEMPORARY = re.compile(r"/\.[^/]+\.[0-9a-f]{32}\.tmp$")


def is_temporary(uri: str) -> bool:
    """Whether a file is one that this module makes and takes away again, if its process is not killed meanwhile."""
    return _TEMPORARY.search(uri) is not None


@contextmanager
def temporary_beside(target: Path) -> Iterator[Path]:
    """The path of a file that is gone after the block, unless it has another name by then."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacement(target: Path) -> Iterator[Path]:
    """A temporary file beside `target` that takes its place, durably, when the block ends well."""
    with temporary_beside(target) as temporary:
        yield temporary
        sync(temporary)
        temporary.replace(target)


def create(target: Path, data: bytes) -> bool:
    """Give a finished temporary file its name, unless there is a file of that name: the link decides.

    Returns:
        Whether there was none.
    """
    with temporary_beside(target) as temporary:
        temporary.write_bytes(data)
        sync(temporary)
        with suppress(FileExistsError):
            os.link(temporary, target)
            return True
    return False


def sync(path: Path) -> None:
    """Return when a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
