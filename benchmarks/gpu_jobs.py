"""Two stages of benchmarks/gpu.py that start train.py: a kill, and two processes.

Both train a small network on the digits, which need no download.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import checkpoint
from benchmarks.record import ROOT, seconds_of
from cli import set_options

EPOCHS = {"cuda": 15, "mps": 15, "cpu": 5}  # of 22 steps: the kill has to come before the last
SMALL = [
    "network.n_channels=32", "network.ch_mults=[1,2]", "network.is_attn=[false,false]",
    "network.dropout=0.1", "batch_size=64", "n_sample=1", "sample_every=1000", "save_every=1",
]  # fmt: skip
DETERMINISTIC = (  # train.py with PyTorch's deterministic kernels
    "import torch, train; torch.use_deterministic_algorithms(True, warn_only=True); "
    "torch.backends.cudnn.deterministic = True; raise SystemExit(train.main())"
)
SAME = 0.01  # the part by which the losses of one process and of two may differ


@dataclass
class Found:
    """What a stage found: in words, in figures, and whether it is as it has to be."""

    lines: list[str]
    figures: dict = field(default_factory=dict)
    status: str = "passed"  # or failed, or skipped


def train_command(folder: Path, device: torch.device, *settings: str) -> list[str]:
    """The arguments of train.py, without python and its name."""
    words = [*SMALL, *settings, f"save_dir={folder}"]
    sets = set_options(words)
    amp = [] if device.type == "cpu" else ["--use_amp"]
    return ["--config", "config/digits.yaml", "--device", str(device), *amp, *sets]


def start(words: list[str], deterministic: bool = False) -> subprocess.Popen:
    """train.py in a process of its own, in the repository."""
    script = ["-c", DETERMINISTIC] if deterministic else ["train.py"]
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return subprocess.Popen(
        [sys.executable, *script, *words], cwd=ROOT, text=True,
        env=environment if deterministic else None,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> None:
    """Raises RuntimeError, with what it said last, if the process fails."""
    _, words = process.communicate()
    if process.returncode:
        raise RuntimeError(f"train.py ended with {process.returncode}: {words[-1500:]}")


# --- a kill


def resume(device: torch.device, folder: Path) -> Found:
    """A run that is killed and goes on ends with the weights of one that is not, bit for bit.

    If not, a third run tells whether two that nobody kills are the same at all, and the same is
    tried with deterministic kernels, which then decides.
    """
    figures = {"plain": killed_and_not(device, folder / "plain")}
    plain = figures["plain"]
    if plain["killed_at_step"] >= plain["last_step"]:
        return Found(["the run ended before it was killed"], figures, "failed")
    words = f"killed at step {plain['killed_at_step']} of {plain['last_step']}: the weights are "
    if not plain["resumed"]:
        return Found([words + "those of a run without, bit for bit"], figures)
    figures["deterministic"] = killed_and_not(device, folder / "deterministic", deterministic=True)
    exact = figures["deterministic"]
    lines = [
        f"{words}off by {plain['resumed']:.1e}; two runs without a kill differ by "
        f"{plain['repeated']:.1e}",
        f"with deterministic kernels off by {exact['resumed']:.1e}",
    ]
    chance = plain["repeated"] > 0 and exact["resumed"] == 0
    return Found(lines, figures, "passed" if chance else "failed")


def killed_and_not(device: torch.device, folder: Path, deterministic: bool = False) -> dict:
    """The largest difference of a weight, 0 if the bits are equal, after a kill, and, where there
    is one, between two runs without."""
    epochs = EPOCHS[device.type]
    length = f"n_epoch={epochs}"
    whole, cut, again = (folder / name for name in ("whole", "cut", "again"))
    finish(start(train_command(whole, device, length), deterministic))
    process = start(train_command(cut, device, length), deterministic)
    latest = cut / "ckpts" / "latest.pth"
    while not latest.exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    step = checkpoint.load(latest)["step"]
    finish(start(train_command(cut, device, length), deterministic))
    last = checkpoint.load(latest)["step"]
    found = {
        "killed_at_step": step, "last_step": last, "resumed": difference(whole, cut, epochs),
    }  # fmt: skip
    if found["resumed"]:
        finish(start(train_command(again, device, length), deterministic))
        found["repeated"] = difference(whole, again, epochs)
    return found


def difference(a: Path, b: Path, epochs: int) -> float:
    """The largest between the weights, raw and averaged, that two runs end with."""
    states = [checkpoint.load(path / "ckpts" / f"model_{epochs - 1}.pth") for path in (a, b)]
    pairs = [
        (states[0][part][name], states[1][part][name])
        for part in ("net", "ema")
        for name in states[0][part]
    ]
    return max(0.0 if torch.equal(x, y) else float((x - y).abs().max()) for x, y in pairs)


# --- two processes


def two_processes(device: torch.device, folder: Path) -> Found:
    """Two processes find the losses of one; on CUDA, one card each."""
    cards = torch.cuda.device_count()
    if device.type == "mps" or (device.type == "cuda" and cards < 2):
        return Found([f"{cards} CUDA cards: there have to be two"], status="skipped")
    settings = ("n_epoch=2", "network.dropout=0.0")
    kind = torch.device(device.type)
    finish(start(train_command(folder / "one", kind, *settings)))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    command = [sys.executable, *torchrun, *train_command(folder / "two", kind, *settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    seconds = seconds_of(
        lambda: subprocess.run(
            command, cwd=ROOT, check=True, capture_output=True, env=environment
        ),
        torch.device("cpu"),
    )  # fmt: skip
    one, two = (train_losses(folder / name) for name in ("one", "two"))
    worst = max(abs(a - b) / a for a, b in zip(one, two, strict=True))
    figures = {"one": one, "two": two, "largest_relative_difference": worst, "seconds": seconds}
    line = f"losses of two processes and of one within {worst:.1e}"
    return Found([line], figures, "passed" if worst < SAME else "failed")


def train_losses(folder: Path) -> list[float]:
    """Those that a run has logged."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["loss"] for row in rows if row["kind"] == "train"]
