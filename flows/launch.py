"""Processes of a launcher: the first runs the flow, the others help it."""

from belt_tasks.specs import TrainSpec


def follow(spec: TrainSpec) -> None:
    """Do what the first process says, and end with it."""
    from belt_tasks import fine_tuning_rank  # noqa: PLC0415 - imports torch

    fine_tuning_rank.follow(spec.device, spec.precision)
