"""Processes of a launcher: the first runs the flow, the others help it."""

from belt_tasks.specs import TrainSpec
from flows.local_server import local_server


def follow(spec: TrainSpec, storage_block: str | None) -> None:
    """Do what the first process says, and end with it.

    Args:
        spec: says on what device.
        storage_block: a Prefect Secret block with the options of object stores, which each process asks for itself.

    Raises:
        ConfigError: there is no such block, or what the first process names cannot be read from here.
    """
    from belt_tasks import fine_tuning_rank  # noqa: PLC0415 - imports torch

    if storage_block is not None:
        with local_server():
            from flows.storage_block import use_storage_block  # noqa: PLC0415 - after the environment is set

            use_storage_block(storage_block)
    fine_tuning_rank.follow(spec.device, spec.precision)
