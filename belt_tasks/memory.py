"""Memory: what a process has freed goes back to the system."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_IS_GLIBC = platform.libc_ver()[0] == "glibc"
_MMAP_THRESHOLD = -3  # glibc's number of the setting
_LARGE_BYTES, _LARGEST_BYTES = 4 * 2**20, 32 * 2**20


def give_back() -> None:
    """Return freed memory to the system; takes milliseconds, so call it once per block of work.

    glibc gives threads heaps of their own, and what one thread allocates and another frees stays in the first one's:
    a pipeline does that all day. Other C libraries are left as they are.
    """
    if _IS_GLIBC:
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def large_blocks_go_back() -> Iterator[None]:
    """While the block runs, memory of 4 MiB and more comes from the system and goes back as soon as it is freed.

    glibc learns to keep blocks of up to 32 MiB in its heap, where those of many sizes leave gaps: a fine-tuning step
    over many mini-batches then took 1.4 times the memory of one. Afterwards blocks of up to 32 MiB are kept, as glibc
    does at the end of its learning. Other C libraries are left as they are.
    """
    if not _IS_GLIBC:
        yield
        return
    library = ctypes.CDLL(None)
    library.mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)
    try:
        yield
    finally:
        library.mallopt(_MMAP_THRESHOLD, _LARGEST_BYTES)
