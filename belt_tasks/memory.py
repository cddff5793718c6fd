"""Memory: what a process has freed goes back to the system."""

import ctypes
import platform

_IS_GLIBC = platform.libc_ver()[0] == "glibc"


def give_back() -> None:
    """Return freed memory to the system; takes milliseconds, so call it once per block of work.

    glibc gives threads heaps of their own, and what one thread allocates and another frees stays in the first one's:
    a pipeline does that all day. It also keeps what was freed between blocks in use, and mini-batches of many sizes
    leave gaps that are too small for the next. Other C libraries are left as they are.
    """
    if _IS_GLIBC:
        ctypes.CDLL(None).malloc_trim(0)
