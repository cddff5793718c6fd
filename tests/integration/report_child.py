"""Makes a run's report, and dies as by `kill -9` at one of its writes: `python -m ... OUTPUT RUN_ID WRITE WHEN`.

WRITE is the number of the write, from 0; WHEN is before or after. Prints how many writes there were.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import TypeVar

from belt_tasks import publishing, storage
from belt_tasks.publishing import RunRef
from belt_tasks.report import score_report

Result = TypeVar("Result")


def main(output: str, run_id: str, write: int, when: str) -> None:
    """Make the report."""
    num_writes = 0

    def counted(really: Callable[[str, bytes], Result]) -> Callable[[str, bytes], Result]:
        def put(uri: str, data: bytes) -> Result:
            nonlocal num_writes
            if (num_writes, when) == (write, "before"):
                os.kill(os.getpid(), signal.SIGKILL)
            result = really(uri, data)
            if (num_writes, when) == (write, "after"):
                os.kill(os.getpid(), signal.SIGKILL)
            num_writes += 1
            return result

        return put

    storage.write_bytes = counted(storage.write_bytes)
    storage.create_bytes = counted(storage.create_bytes)
    run = RunRef(output_uri=output, run_id=run_id)
    score_report(run, publishing.read_run_manifest(run))
    print(num_writes)  # noqa: T201 - for the test


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
