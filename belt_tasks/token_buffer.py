"""The token buffer: the tokens of all documents in one memory-mapped file, so that a corpus may be larger than memory.

Parquet is how tokens are kept; it cannot be mapped, since it is encoded. A run decodes it once, into a temporary file
without a name: the file goes with the last process that maps it, however that process ends.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from belt_tasks import storage
from belt_tasks.errors import ConfigError

BATCH_ROWS = 256

Int32 = npt.NDArray[np.int32]


@contextmanager
def mapped_tokens(uris: Sequence[str]) -> Iterator[tuple[Int32, str | None]]:
    """The column `input_ids` of tokens tables, one after the other, mapped from a temporary file.

    Returns:
        int32 [T], not to be written to, and a path by which other processes of this machine may map it while the block
        lasts (`map_file`); None where the system has no such path.

    Raises:
        ConfigError: a table cannot be read, or there is no room.
    """
    action = f"write the tokens of the training set to a temporary file in {tempfile.gettempdir()}"
    with tempfile.TemporaryFile(prefix="belt-tokens-") as file:
        for uri in uris:
            with storage.open_parquet(uri) as table, storage.errors_of(f"read {uri}"):
                for batch in table.iter_batches(BATCH_ROWS, columns=["input_ids"]):
                    values = batch.column(0).flatten().to_numpy(zero_copy_only=False)
                    with storage.errors_of(action):
                        file.write(np.ascontiguousarray(values, dtype=np.int32).data)
        with storage.errors_of(action):
            file.flush()
        if file.tell() == 0:
            yield np.empty(0, dtype=np.int32), None
            return
        path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        yield np.memmap(file, dtype=np.int32, mode="r"), path if Path(path).exists() else None


def map_file(path: str) -> Int32:
    """Such a file of another process.

    Raises:
        ConfigError: it is gone, and with it the process that made it.
    """
    try:
        return np.memmap(path, dtype=np.int32, mode="r")
    except OSError as error:
        raise ConfigError(f"cannot map the tokens of the training set: {error.strerror}") from error
