"""The stages of benchmarks/gpu.py, each a process of its own: what it leaves, no other one sees.

python -m benchmarks.gpu_stages precision --device cuda --out found.json
"""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from torch import Tensor

import datasets
from benchmarks import training
from benchmarks.gpu_jobs import Found, resume, two_processes
from benchmarks.gpu_memory import memory
from benchmarks.record import ROOT, free, images_for, median_ratio, seconds_of, synthetic
from benchmarks.training_loops import Ours
from config import Config, load_config
from datasets import Batches, Batching
from support.files import write_json
from training.trainer import Trainer
from utils import amp_dtype

TINY = [
    "network.image_shape=[3,8,8]", "network.n_channels=32", "network.ch_mults=[1,2]",
    "network.is_attn=[false,false]", "batch_size=8",
]  # fmt: skip
SAME = 0.01  # the part by which two losses in mixed precision may differ and be the same


@dataclass(frozen=True)
class Given:
    """What a stage is given."""

    device: torch.device
    data_dir: str
    config: str
    tiny: bool  # a rehearsal
    folder: Path  # to write to
    overrides: tuple[str, ...] = ()  # of the config, as after --set

    def load(self, *overrides: str) -> Config:
        """The config, of a small network in a rehearsal."""
        small = TINY if self.tiny else []
        return load_config(self.config, [*small, *self.overrides, *overrides])

    def steps(self, n: int) -> int:
        """n, few in a rehearsal."""
        return max(n // 5, 5) if self.tiny else n

    def images(self, config: Config) -> datasets.Dataset:
        """Training images of the config's shape."""
        if self.tiny:
            return synthetic(config, 200)
        return images_for(config, self.data_dir, training.SYNTHETIC)[0]


# --- training in every precision


@contextmanager
def precision_of(name: str) -> Iterator[None]:
    """Within it --use_amp takes this dtype on a GPU."""
    native = name == "bfloat16"
    with patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: native):
        yield


def precisions(device: torch.device) -> list[str]:
    """Those that --use_amp can take on the device, and float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ["float32", *(["bfloat16"] if native else []), "float16"]
    dtype = amp_dtype(device)
    return ["float32", *([str(dtype).removeprefix("torch.")] if dtype else [])]


def precision(given: Given) -> Found:
    """A short training in each: losses are finite and fall, hardly a step is skipped."""
    config = given.load("warm_epoch=1", *(["lrate=1e-3"] if given.tiny else []))
    train, part, middle = given.images(config), given.steps(50), given.steps(100)
    found = Found([])
    for name in precisions(given.device):
        with precision_of(name):
            trainer = Trainer(config, train, given.device, name != "float32")
            trainer.denoiser.train()
            first = losses_of(trainer, part)
            between = losses_of(trainer, middle)
            last = losses_of(trainer, part)
        skipped = sum(losses["skipped"] for losses in (first, between, last))
        row = {
            "first_loss": first["mean"], "last_loss": last["mean"], "skipped": skipped,
            "scaler": trainer.scaler.is_enabled(), "scale": trainer.scaler.get_scale(),
        }  # fmt: skip
        if not (last["mean"] < first["mean"] and skipped <= part // 10):
            found.status = "failed"
        found.figures[name] = row
        found.lines.append(
            f"{name}: loss {first['mean']:.4f} -> {last['mean']:.4f}, {skipped:.0f} steps skipped"
        )
        free(given.device)
    return found


def losses_of(trainer: Trainer, steps: int) -> dict:
    """The mean loss of the next steps, and how many were skipped."""
    for _ in range(steps):
        trainer.train_step()
    sums = trainer.window.read_and_reset()
    mean = sums["loss"] / sums["steps"] if sums["steps"] else float("nan")
    return {"mean": mean, "skipped": sums["skipped"]}


# --- torch.compile


def compiled(given: Given) -> Found:
    """The losses of the first steps with --compile are those without; its speed beside theirs.

    Without dropout, whose random numbers are others in a compiled network.
    """
    config = given.load("network.dropout=0.0")
    train, steps = given.images(config), given.steps(100)
    use_amp = amp_dtype(given.device) is not None
    plain = Ours(config, train, given.device, use_amp)
    fast = Ours(config, train, given.device, use_amp, compiles=True)
    first = seconds_of(lambda: fast.steps(1), given.device)
    plain.steps(1)
    losses = [first_losses(loop.trainer, 8) for loop in (plain, fast)]
    worst = max(abs(a - b) / a for a, b in zip(*losses, strict=True))
    names = [list(loop.trainer.state()["net"]) for loop in (plain, fast)]
    speeds: dict[str, list[float]] = {"plain": [], "compiled": []}
    for loop in (plain, fast):
        loop.steps(given.steps(40))
    for _ in range(3):
        for name, loop in (("plain", plain), ("compiled", fast)):
            seconds = seconds_of(lambda loop=loop: loop.steps(steps), given.device)
            speeds[name].append(steps * loop.images_per_step / seconds)
    ratio = median_ratio(speeds["compiled"], speeds["plain"])
    same = worst < SAME and names[0] == names[1]
    return Found(
        [
            f"losses of the first steps within {worst:.1e}; the first step took {first:.0f} s; "
            f"{median(speeds['compiled']):,.0f} images/s, {ratio:.2f} times those without"
        ],
        {
            "losses": losses, "largest_relative_difference": worst, "first_step_s": first,
            "images_per_s": speeds, "ratio": ratio, "use_amp": use_amp,
        },
        "passed" if same else "failed",
    )  # fmt: skip


def first_losses(trainer: Trainer, n: int) -> list[float]:
    """Of all steps so far on the average, then of each of the next n - 1."""
    found = []
    for i in range(n):
        if i:
            trainer.train_step()
        sums = trainer.window.read_and_reset()
        found.append(sums["loss"] / max(sums["steps"], 1))
    return found


# --- where the images lie


def data(given: Given) -> Found:
    """Batches from images on the GPU, and from pinned memory of the host: the same, how fast."""
    config, device = given.load(), given.device
    train, n = given.images(config), given.steps(100)
    how = Batching(0, shuffle=True, flip=True, drop_last=True)
    use_amp = amp_dtype(device) is not None
    kinds, loops, speeds, batch_ms = {}, {}, {}, {}
    for name, fraction in (("device", datasets.GPU_FRACTION), ("pinned", 0.0)):
        with patch.object(datasets, "GPU_FRACTION", fraction):
            kinds[name] = Batches(train.images, train.labels, config.batch_size, device, how)
            loops[name] = Ours(config, train, device, use_amp)
        speeds[name], batch_ms[name] = [], []
        loops[name].steps(given.steps(40))
    equal = all(
        torch.equal(a, b)
        for step in range(given.steps(40))
        for a, b in zip(kinds["device"][step], kinds["pinned"][step], strict=True)
    )
    for _ in range(3):
        for name, batches in kinds.items():
            seconds = seconds_of(lambda b=batches: [b[i] for i in range(n)], device)
            batch_ms[name].append(1000 * seconds / n)
            seconds = seconds_of(lambda loop=loops[name]: loop.steps(n // 2), device)
            speeds[name].append(n // 2 * loops[name].images_per_step / seconds)
    moved = isinstance(kinds["device"].images, Tensor)
    lines = [f"batches are {'the same' if equal else 'NOT the same'}"]
    lines += [
        f"{name}: {median(batch_ms[name]):.2f} ms a batch, {median(speeds[name]):,.0f} images/s"
        for name in kinds
    ]
    figures = {"equal": equal, "on_device": moved, "batch_ms": batch_ms, "images_per_s": speeds}
    right = equal and moved == (device.type == "cuda")
    return Found(lines, figures, "passed" if right else "failed")


# --- speed, and the tests


def speed(given: Given) -> Found:
    """A whole training step beside the usual loop's, on the same network."""
    config, device = given.load(), given.device
    train, found = given.images(config), Found([])
    for use_amp in (False, True):
        if use_amp and amp_dtype(device) is None:
            continue
        steps, names = given.steps(30), ["ours", "usual"]
        row = training.measure(config, train, device, use_amp, names, 3, steps)
        found.figures["amp" if use_amp else "float32"] = row
        found.lines += training.report(row).splitlines()
        if row["failed"]:
            found.status = "failed"
    return found


def tests(given: Given) -> Found:
    """The tests that only a GPU runs; those of --compile, minutes more, are left to
    make test-cuda."""
    command = [
        sys.executable, "-m", "pytest", "tests/test_cuda.py", "-m", "cuda",
        "-p", "no:cacheprovider", "-k", "not compiled",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    last = lines[-1] if lines else done.stderr.strip()[-300:]
    figures = {"command": " ".join(command[1:]), "exit_code": done.returncode}
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if done.returncode:
        figures["output"] = done.stdout[-20_000:]
        return Found([last.strip("= "), *failures], figures, "failed")
    passed = re.search(r"\d+ passed", last)
    return Found([last.strip("= ")], figures, "passed" if passed else "skipped")


@dataclass(frozen=True)
class Stage:
    """What a stage does, and how benchmarks/gpu.py runs it."""

    run: Callable[[Given], Found]
    limit_s: int
    timed: bool = False  # so nothing runs beside it


STAGES = {
    "tests": Stage(tests, 300),
    "precision": Stage(precision, 120),
    "resume": Stage(lambda given: resume(given.device, given.folder), 200),
    "two": Stage(lambda given: two_processes(given.device, given.folder), 150),
    "memory": Stage(lambda given: memory(given.device, given.tiny), 150),
    "compile": Stage(compiled, 200, timed=True),
    "data": Stage(data, 60, timed=True),
    "speed": Stage(speed, 120, timed=True),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one stage, and writes what it found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--config", default="config/DDPM_ddpm.yaml")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: small and short")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--out", required=True, metavar="JSON", help="where it goes")
    args = parser.parse_args(argv)
    started = time.monotonic()
    with TemporaryDirectory() as folder:
        given = Given(
            torch.device(args.device),
            args.data_dir,
            args.config,
            args.tiny,
            Path(folder),
            tuple(args.overrides),
        )
        found = asdict(STAGES[args.stage].run(given))
    write_json(args.out, found | {"seconds": round(time.monotonic() - started, 1)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
