"""Launchers: `torchrun` starts one command as several processes, of which the first runs the flow."""

import os

from belt_tasks.specs import TrainSpec


def is_follower() -> bool:
    """Whether a launcher started this process to help another."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and int(os.environ.get("RANK", "0")) > 0


def follow(spec: TrainSpec) -> None:
    """Do what the first process says, and end with it."""
    from belt_tasks import fine_tuning_rank  # noqa: PLC0415 - imports torch

    fine_tuning_rank.follow(spec.device, spec.precision)
