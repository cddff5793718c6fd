"""Storage options in a Prefect block: the flow's parameter is the block's name, the secrets stay on the server."""

import json
from collections.abc import Mapping
from typing import Any, cast

from prefect.blocks.system import Secret

from belt_tasks import object_stores
from belt_tasks.errors import ConfigError

Options = Mapping[str, Mapping[str, str]]


def use_storage_block(name: str | None) -> None:
    """Configure this process's object stores from a Secret block; None leaves them as the environment has them.

    Args:
        name: of a Secret block whose value is a JSON object: options by protocol, such as
            `{"s3": {"key": ..., "secret": ..., "endpoint_url": ...}}`, with the names of fsspec.

    Raises:
        ConfigError: there is no such block, or its value is not a JSON object of options.
    """
    if name is not None:
        object_stores.configure(read_storage_block(name))


def read_storage_block(name: str) -> Options:
    """The options in a Secret block.

    Raises:
        ConfigError: there is no such block, or its value is not a JSON object of options.
    """
    try:
        value = cast("Secret[Any]", Secret.load(name)).get()
    except ValueError as error:
        raise ConfigError(f"storage_block: no Secret block {name!r} on this Prefect server") from error
    options = options_of(value)
    if options is None:
        raise ConfigError(
            f"storage_block: the value of Secret block {name!r} must be a JSON object of options by protocol, "
            'such as {"s3": {"key": ..., "secret": ...}}'  # what it is instead may be a secret
        )
    return options


def options_of(value: object) -> Options | None:
    """Options by protocol, as JSON or as what it stands for; None where it is something else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return None
    if isinstance(value, Mapping) and all(isinstance(each, Mapping) for each in value.values()):
        return value
    return None
