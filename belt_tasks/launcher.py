"""Launchers: `torchrun` starts one command as several processes, and says so in their environment.

Nothing here imports PyTorch, so that a command can ask before it does.
"""

import os


def is_launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ


def is_follower() -> bool:
    """Whether it did, to help the first of them."""
    return is_launched() and int(os.environ.get("RANK", "0")) > 0
