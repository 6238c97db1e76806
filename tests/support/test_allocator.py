"""Whether freed memory is kept: counted in pages that the system hands out, not in seconds."""

import subprocess
import sys

import pytest
from conftest import ROOT

COUNT = """
import resource, sys, torch
from support import allocator
getattr(allocator, sys.argv[1])()
for i in range(20):
    if i == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 10 * 40_000_000 // 4096  # of the last ten tensors


def pages_of(name: str, **environment: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", COUNT, name], cwd=ROOT, capture_output=True, text=True, check=True,
        env={"PATH": "/usr/bin", "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_the_pages_of_a_tensor_serve_the_next():
    assert pages_of("keep_freed_memory") < PAGES / 50


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_settings_of_the_environment_stay():
    kept = pages_of("keep_freed_memory", MALLOC_MMAP_THRESHOLD_="1000000")
    assert kept > PAGES / 2
    assert pages_of("give_back_freed_memory") > PAGES / 2
