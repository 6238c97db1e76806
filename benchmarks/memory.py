"""The memory that a call takes."""

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.record import free, wait_for

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what makes Linux forget a process's highest resident set so far


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most that is held while `call` runs, beyond what was held before.

    On a CUDA device what PyTorch allocates; on Linux the resident set of this process, which is
    rounded to pages and counts what the allocator keeps. None elsewhere.
    """
    free(device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        wait_for(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not CLEAR.exists():
        call()
        wait_for(device)
        return None
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # else free memory that it keeps would be used unseen
    CLEAR.write_text(RESET_PEAK)
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def megabytes(n_bytes: int | None) -> str:
    """For a table; - where it is not known."""
    return "-" if n_bytes is None else f"{n_bytes / 1e6:,.0f}"


def _resident(name: str) -> int:
    """Bytes of a line of the process's status."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {name}")
