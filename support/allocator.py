"""What the C library does with memory that a tensor no longer needs.

A CPU trains on tensors of tens of MB that live for one step. glibc gives such blocks back to the
system as soon as they are freed, and the system clears every page of the next ones.
"""

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # the names that mallopt(3) knows
KEPT = 1 << 28  # bytes: larger blocks, such as whole datasets, are given back all the same
GIVEN_BACK = 1 << 25  # the most that it chooses by itself
OTHERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> None:
    """From here on freed memory is kept for the next tensor, up to the most that was in use.

    docs/training.md has what it gave. Nothing happens without glibc, or where the
    environment has settings of its own.
    """
    if not _set(MMAP_THRESHOLD, KEPT):
        _set(MMAP_THRESHOLD, GIVEN_BACK)  # an older glibc takes no more
    _set(TRIM_THRESHOLD, -1)  # never


def give_back_freed_memory() -> None:
    """As glibc does by itself, once blocks of any size were freed; see `keep_freed_memory`."""
    _set(MMAP_THRESHOLD, GIVEN_BACK)
    _set(TRIM_THRESHOLD, 2 * GIVEN_BACK)


def _set(name: int, value: int) -> bool:
    """Whether glibc took it."""
    if not sys.platform.startswith("linux") or any(name in os.environ for name in OTHERS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(name, value))
