"""Errors, named by what the runner must do next.

    BeltError
    ├── ConfigError      stop: a person has to change a parameter, a path or the environment
    ├── ShardError       set this shard aside and go on with the others
    │   └── ContractError    rows do not satisfy their data contract
    ├── RejectedError    stop: a person has to look at the corpus
    ├── ConflictError    another run was first: plan again
    ├── DeadlineError    stop: the time that the run may take is over; the next attempt goes on
    └── TransientError   try again: a time-out, a dropped connection

A message says what, got, allowed and where. `assert` is kept for belt's own bugs.
"""

import re


def without_credentials(text: str) -> str:
    """A message in one line, with neither user and password nor query in its URLs.

    A password that is not percent-encoded may hold what should end it (`@`, `/`, `?`): all up to the last `@` goes.
    """
    text = re.sub(r"(\w+://)[^:/@\s]*:\S*@", r"\1", " ".join(text.split()))
    text = re.sub(r"(\w+://)[^/@\s]+@", r"\1", text)  # a user alone, or a token
    return re.sub(r"(\w+://[^?\s]+)\?\S*", r"\1", text)


class BeltError(Exception):
    """Root of every error that belt raises on purpose."""


class ConfigError(BeltError):
    """A parameter, path or environment is wrong; only a person can cure it, so nothing is retried."""


class ShardError(BeltError):
    """One shard cannot be processed; the other shards of the run can."""


class ContractError(ShardError):
    """Rows do not satisfy their data contract."""


class RejectedError(BeltError):
    """More rows of the corpus were put aside than the run allows; nothing was published."""

    def __init__(self, message: str, quality_uri: str = "") -> None:
        """Say so.

        Args:
            message: how many, why, and what to do.
            quality_uri: the page that shows them.
        """
        super().__init__(message)
        self.quality_uri = quality_uri


class ConflictError(BeltError):
    """Another run changed what this one was planned on; nothing of this one was published."""


class DeadlineError(BeltError):
    """The time that a run may take is over; what is finished is kept for the next attempt."""


class TransientError(BeltError):
    """The same call may succeed later."""
