"""The rows of benchmarks/scaling.py: a network, a memory map, the start of a job."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.memory import peak_bytes
from benchmarks.record import free, seconds_of, synthetic
from benchmarks.startup import IMPORT_TORCH, TINY, seconds_of_command
from config import Config
from datasets import SPLITS, Batches, Batching, Dataset
from support.errors import UserError
from training.cost import gflops_of
from training.trainer import Trainer
from utils import autocast

READ_IMAGES = 20_000  # of a memory map, in shuffled batches
CLASSES = 10
TEST_SHARE = 10  # one file in so many is of test
START = """
import sys, train
from pathlib import Path
from config import load_config
from datasets import read_dataset
config = load_config(Path(sys.argv[1]))
for split in ("train", "test"):
    read_dataset(config, sys.argv[2], split)
"""  # what every job does before its work


def network_row(config: Config, device: torch.device, use_amp: bool, rounds: int) -> dict:
    """Seconds, GFLOPs and bytes of a training step and of the features of a batch.

    `train_bytes` are the weights five times (raw, average, gradient, both moments of Adam) and
    what the forward pass keeps for backward.
    """
    train, made = synthetic(config, config.images_per_step), []

    def first_step() -> None:
        made.append(Trainer(config, train, device, use_amp))
        made[0].denoiser.train()
        made[0].train_step()

    free(device)
    row = {"train_peak": peak_bytes(first_step, device)}
    trainer: Trainer = made[0]
    denoiser = trainer.ema_denoiser
    x0 = trainer.batches[0][0][: config.batch_size]  # those of one forward
    noise = torch.randn_like(x0)

    @torch.no_grad()
    def features(n: int = len(x0)) -> None:
        with autocast(device, use_amp):
            denoiser.features(x0[:n], 1, noise[:n], denoiser.block_names)

    features()
    weights = sum(p.numel() * p.element_size() for p in trainer.denoiser.net.parameters())
    flops = gflops_of(lambda: features(1)) * len(x0)
    return row | {
        "parameters": sum(p.numel() for p in trainer.denoiser.net.parameters()),
        "step_s": _median(trainer.train_step, device, rounds),
        "train_gflops": 3 * flops,
        "train_bytes": 5 * weights
        + kept_bytes(trainer.denoiser, lambda: _loss(trainer, x0, noise)),
        "features_s": _median(features, device, rounds),
        "features_gflops": flops,
        "features_peak": peak_bytes(features, device),
    }


def _median(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    return median(seconds_of(call, device) for _ in range(rounds))


def _loss(trainer: Trainer, x0: Tensor, noise: Tensor) -> Tensor:
    sigma = trainer.denoiser.training_sigma(torch.rand(len(x0), device=x0.device))
    with autocast(trainer.device, trainer.use_amp):
        return trainer.denoiser.loss(x0, sigma, noise).mean()


def kept_bytes(net: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps from a forward pass of `net` for backward, each storage once and
    without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()  # held: what is kept must not be freed and its place given again
    del loss
    return sum(kept.values())


# --- a memory map


def data_row(n: int, config: Config, device: torch.device, folder: Path) -> dict:
    """What n images on the disk cost: opening, the order of an epoch, a hash, shuffled batches.

    Raises UserError if they do not fit.
    """
    path = folder / "images.npy"
    write_images(path, n, config.network.image_shape)
    found: list = []

    def opened() -> None:
        images = np.load(path, mmap_mode="r")
        labels = np.zeros(n, dtype=np.int64)
        found.append(Dataset(config.dataset, "train", images, labels, ["0"]))

    row = {"images": n, "bytes": path.stat().st_size, "open_s": seconds_of(opened, device)}
    dataset: Dataset = found[0]
    batches = Batches(
        dataset.images, dataset.labels, config.batch_size, device, Batching(shuffle=True)
    )
    row["order_s"] = seconds_of(lambda: batches._epoch_order(0), device)
    steps = max(min(n, READ_IMAGES) // config.batch_size, 1)

    def read() -> None:
        for step in range(steps):
            batches[step]

    seconds: list[float] = []
    row["peak"] = peak_bytes(lambda: seconds.append(seconds_of(read, device)), device)
    row["images_per_s"] = min(steps * config.batch_size, n) / seconds[0]
    row["fingerprint_s"] = seconds_of(dataset.fingerprint, device)
    return row


def write_images(path: Path, n: int, shape: tuple[int, int, int]) -> None:
    """n random images as .npy, the same few thousand again and again."""
    needed, there = n * int(np.prod(shape)), shutil.disk_usage(path.parent).free
    if needed > there:
        raise UserError(
            f"{n:,} images take {needed / 1e9:.1f} GB, and {path.parent} has {there / 1e9:.1f}: "
            "lower --max_images, or set TMPDIR to another folder"
        )
    chunk = np.random.default_rng(0).integers(0, 256, (min(n, 4096), *shape), dtype=np.uint8)
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(n, *shape))
    for start in range(0, n, len(chunk)):
        part = images[start : start + len(chunk)]
        part[:] = chunk[: len(part)]
    images.flush()


# --- the start of a job


def start_row(n: int, folder: Path, rounds: int) -> dict:
    """Seconds until a job has its dataset of n files, decoded before, beside `import torch`."""
    config = folder / "config.yaml"
    settings = {"dataset": "folder", "classes": CLASSES, "network": TINY["network"]}
    config.write_text(json.dumps(settings))  # JSON is YAML
    write_files(folder / "folder", n)
    words = ["-c", START, str(config), str(folder)]
    row = {"files": n, "decode_s": seconds_of_command(words)}
    pairs = [
        (seconds_of_command(words), seconds_of_command([*IMPORT_TORCH])) for _ in range(rounds)
    ]
    row["start_s"], row["import_torch_s"] = (list(times) for times in zip(*pairs, strict=True))
    return row | {"seconds_beyond": median(whole - alone for whole, alone in pairs)}


def write_files(root: Path, n: int) -> None:
    """n PNGs of 8 x 8 in class folders of train and test, of the same pixels."""
    file = io.BytesIO()
    Image.new("L", (8, 8), 128).save(file, "PNG")
    for split in SPLITS:
        for label in range(CLASSES):
            (root / split / str(label)).mkdir(parents=True)
    for i in range(n):
        split = SPLITS[i // CLASSES % TEST_SHARE == 0]
        (root / split / str(i % CLASSES) / f"{i}.png").write_bytes(file.getvalue())
