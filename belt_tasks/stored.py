"""Stored values: what belt wrote as JSON beside its tables, read back and checked."""

from typing import TypeVar

import pydantic

from belt_tasks import storage
from belt_tasks.errors import ConfigError
from belt_tasks.specs import Spec

SpecT = TypeVar("SpecT", bound=Spec)


def read_json(uri: str, kind: type[SpecT], what: str) -> SpecT:
    """A value that is stored as one JSON object.

    Args:
        uri: of the object.
        kind: of the value.
        what: it is, with its article, for a message.

    Raises:
        ConfigError: the object is not there, or holds no such value: it is damaged, or another version wrote it.
    """
    try:
        return kind.model_validate_json(storage.read_bytes(uri))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        words = f"{where}: {first['msg']}" if where else first["msg"]
        raise ConfigError(
            f"{uri}: not {what} that this belt reads ({words}); it is damaged, or another version of belt wrote it"
        ) from error
