"""What only a GPU runs: whole jobs on it, mixed precision, where data lies, two GPUs.

make test-cuda, or python -m pytest -m cuda
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import checkpoint
import datasets
import linear
import sample
import train
import training.distill
import training.trainer
from config import load_config, parse_config
from datasets import Batches, Batching, fits_on
from training.trainer import Trainer
from utils import amp_dtype

DEVICE = "cuda"

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def precision(request, monkeypatch):
    """The arguments of a job that runs in this precision."""
    if request.param == "float32":
        return []
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    if request.param == "bfloat16" and not native:
        pytest.skip("this GPU has no bfloat16")
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda **options: request.param == "bfloat16"
    )
    assert amp_dtype(torch.device(DEVICE)) == getattr(torch, request.param)
    return ["--use_amp"]


@pytest.fixture
def common(tiny_yaml):
    """The arguments of every job; the sampler is short."""
    return ["--config", str(tiny_yaml), "--device", DEVICE]


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_train_then_go_on(common, precision, tmp_path):
    assert train.main([*common, *precision, "--set", "n_epoch=1"]) == 0
    assert train.main([*common, *precision, "--set", "n_epoch=2"]) == 0
    first, second = losses(tmp_path / "run")
    assert second < 0.9 * first
    state = checkpoint.load(tmp_path / "run" / "ckpts" / "latest.pth")
    assert state["step"] == 44
    assert state["metrics"]["skipped"] == 0


def test_compiled_training_goes_on_without(common, precision, tmp_path):
    assert train.main([*common, *precision, "--compile", "--set", "n_epoch=1"]) == 0
    assert train.main([*common, *precision, "--set", "n_epoch=2"]) == 0
    first, second = losses(tmp_path / "run")
    assert second < 0.9 * first


@pytest.mark.parametrize("more", [{}, {"distill": {"loss": "infonce", "queue": 100}}])
def test_a_recorded_step_is_the_step_itself(tiny_yaml, monkeypatch, more):
    """Dropout, noise, the optimizer and the teacher's keys too: twelve steps, and a rate that
    falls at each of them."""
    monkeypatch.setattr(training.trainer, "compiled", lambda forward, device: forward)
    monkeypatch.setattr(training.distill, "compiled", lambda forward, device: forward)
    values = load_config(tiny_yaml, ["network.dropout=0.2", "lr_decay=linear"]).model_dump()
    config = parse_config({**values, **more})
    data = datasets.read_dataset(config, "data", "train")
    trainers = [Trainer(config, data, torch.device(DEVICE), True, compiles) for compiles in (0, 1)]
    for t in trainers:
        for _ in range(12):
            t.train_step()
    plain, recorded = (t.full_state() for t in trainers)
    assert trainers[1].recorded.graph is not None
    for part in ("net", "ema"):
        for name, weight in plain[part].items():
            torch.testing.assert_close(recorded[part][name], weight, rtol=1e-3, atol=1e-4)
    windows = [state["resume"]["window"]["loss"].item() for state in (plain, recorded)]
    assert windows[1] == pytest.approx(windows[0], rel=1e-3)


def test_linear(common, precision, tiny_checkpoint, tmp_path):
    cell = ["--timestep", "21", "--blockname", "out_2"]
    linear.main([*common, *precision, *cell])
    linear.main([*common, *precision, "--grid", "--protocol", "cached", "--timesteps", "21"])
    records = [json.loads(path.read_text()) for path in (tmp_path / "run").glob("linear_*.json")]
    accuracies = {record["protocol"]: record["headline"]["test_accuracy"] for record in records}
    assert accuracies.keys() == {"cached", "paper"}
    assert accuracies["cached"] > 0.5  # random features; two epochs of the paper's heads are few


def test_sample(common, precision, tiny_checkpoint, tmp_path):
    sample.main([*common, *precision, "--n", "4", "--steps", "10"])
    (pngs,) = (tmp_path / "run").glob("EMAgenerated*/pngs")
    images = np.stack([np.array(Image.open(path)) for path in sorted(pngs.iterdir())])
    assert images.shape == (4, 8, 8)
    assert images.std() > 5


def test_features_are_those_of_the_cpu(tiny_checkpoint):
    x0, noise = torch.rand(2, 3, 1, 8, 8) * 2 - 1
    found = []
    for name in ("cpu", DEVICE):
        denoiser = checkpoint.load_denoiser(tiny_checkpoint, torch.device(name)).denoiser
        with torch.no_grad():
            features = denoiser.features(x0.to(name), 21, noise.to(name), denoiser.block_names)
        found.append({block: value.cpu() for block, value in features.items()})
    for block in found[0]:
        torch.testing.assert_close(found[1][block], found[0][block], rtol=0.01, atol=0.01)  # TF32


def test_batches_are_the_same_from_the_gpu_and_from_pinned_memory(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (100, 3, 8, 8), dtype=np.uint8)
    images.flags.writeable = False  # as a memory map is
    device = torch.device(DEVICE)
    how = Batching(3, shuffle=True, flip=True, crop=True)
    kept = Batches(images, np.arange(100), 32, device, how)
    assert fits_on(device, images.nbytes)
    assert kept.images.device.type == DEVICE
    monkeypatch.setattr(datasets, "GPU_FRACTION", 0.0)
    pinned = Batches(images, np.arange(100), 32, device, how)
    assert pinned.images is images
    for step in (0, 3, 5):
        for a, b in zip(kept[step], pinned[step], strict=True):
            assert a.device.type == DEVICE
            assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
def test_two_processes_on_two_gpus(tiny_yaml, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    job = ["train.py", "--config", str(tiny_yaml), "--device", DEVICE, "--use_amp"]
    done = subprocess.run(
        [*torchrun, "--nproc_per_node=2", *job], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = losses(tmp_path / "run")
    assert second < 0.9 * first
    assert checkpoint.saved_epochs(load_config(tiny_yaml).save_dir) == [0, 1]
