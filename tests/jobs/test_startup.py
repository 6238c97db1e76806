"""A job answers a misspelt key, and so --help too, before it imports what is slow to import."""

import subprocess
import sys

import pytest
from conftest import JOBS, ROOT

SLOW = {  # and what they pull in
    "torchvision", "torch._dynamo", "tensorboard", "matplotlib", "sklearn", "scipy", "ema_pytorch",
    "diffusers", "pytorch_fid", "pandas", "sympy", "triton", "torch.utils.flop_counter",
}  # fmt: skip
RUN_AND_LIST = """
import importlib, sys
code = 0
try:
    importlib.import_module(sys.argv[1]).main(sys.argv[2:])
except SystemExit as stop:
    code = stop.code
print(code, *sys.modules)
"""
NEEDED = {"noisy_classifier": ["--backbone", "wrn"], "fid": ["--n", "4"]}


def run_and_list(program: str, *argv: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1].split()


@pytest.fixture(scope="module")
def slow() -> set[str]:
    """What is slow, but for what PyTorch imports itself."""
    return SLOW - set(run_and_list("import sys, torch; print(*sys.modules)"))


@pytest.mark.parametrize("job", JOBS)
def test_a_misspelt_key_is_answered_before_slow_imports(job, slow, tmp_path):
    path = tmp_path / "misspelt.yaml"
    path.write_text("batchsize: 3\n")
    argv = ["--config", str(path), *NEEDED.get(job, [])]
    code, *modules = run_and_list(RUN_AND_LIST, job, *argv)
    assert code == "2"
    assert not slow & set(modules)
