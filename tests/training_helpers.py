"""What the tests of training share: little data, and runs of it."""

import json
from pathlib import Path

import numpy as np
import torch

import train
from datasets import Dataset
from training.run import Run
from training.trainer import Trainer

CPU = torch.device("cpu")


def dataset(n: int, seed: int = 0) -> Dataset:
    draw = np.random.default_rng(seed)
    images = draw.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8)
    return Dataset("digits", "train", images, np.zeros(n, np.int64), ["0"])


def trainer(config, use_amp=False, n=40) -> Trainer:
    return Trainer(config, dataset(n), CPU, use_amp)


def new_run(config, use_amp=False, n=40) -> Run:
    return Run(trainer(config, use_amp, n), dataset(8, seed=1))


def position(run: Run, restart=False) -> None:
    """Puts the run where train.py does."""
    train.position(run, train.beginning(run.config, run.kept.path, restart), restart)


def state_of(t: Trainer) -> dict:
    return {
        **{f"net.{k}": v for k, v in t.denoiser.net.state_dict().items()},
        **{f"ema.{k}": v for k, v in t.ema.ema_model.state_dict().items()},
        **{f"window.{k}": v for k, v in t.window.sums.items()},
    }


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def metric_lines(run: Path) -> list[dict]:
    """Without what is measured in seconds and bytes."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("images_per_s", "peak_memory_mb")}
        for line in lines
    ]


def break_loss(t: Trainer):
    real = t.denoiser.loss
    t.denoiser.loss = lambda *args: real(*args) * float("nan")
    return lambda: setattr(t.denoiser, "loss", real)
