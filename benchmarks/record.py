"""What every benchmark writes beside its figures, and the clock that waits for the device."""

import argparse
import gc
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from statistics import median

import torch

from checkpoint import versions
from config import Config
from datasets import Dataset, read_dataset
from support.files import write_json

ROOT = Path(__file__).resolve().parent.parent  # the repository


def add_output_dir(parser: argparse.ArgumentParser, stem: str) -> None:
    """Where `write_record` writes."""
    parser.add_argument(
        "--output_dir", default="results/benchmarks", help=f"where {stem}_<device>.json goes"
    )


def record_of(module: str, argv: list[str] | None, device: torch.device) -> dict:
    """The command, the machine and the versions of a measurement; the commit is among these."""
    words = sys.argv[1:] if argv is None else argv
    return {
        "command": shlex.join(["python", "-m", module, *words]),
        "machine": machine_of(device),
        "versions": versions(),
    }


def machine_of(device: torch.device) -> dict:
    """What the figures depend on: the device, its driver, the precision of float32 on it."""
    cuda = device.type == "cuda"
    found = {
        "name": device_name(device),
        "device": device.type,
        "system": platform.platform(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    if cuda:
        found |= {
            "cards": torch.cuda.device_count(),
            "memory_mb": torch.cuda.get_device_properties(device).total_memory / 1e6,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "tf32_in_convolutions": torch.backends.cudnn.allow_tf32,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        }
    return found


def device_name(device: torch.device) -> str:
    """The card's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine()


def _driver() -> str | None:
    """The version of NVIDIA's driver; None where nvidia-smi does not say it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split()[0] if done.stdout.split() else None


def write_record(
    folder: str | Path,
    stem: str,
    record: dict,
    *parts: tuple[Collection[str], Collection[str]],
) -> Path:
    """Writes <folder>/<stem>_<device's name>.json and returns its path.

    parts: pairs (what was asked for, all that there is). Where these differ, the names of the
    first follow the stem: a part replaces no whole.
    """
    part = [name for asked, whole in parts if set(asked) != set(whole) for name in asked]
    words = re.findall(r"[a-z0-9]+", record["machine"]["name"].lower())
    path = Path(folder) / f"{'_'.join([stem, *part, *words])}.json"
    write_json(path, record)
    return path


# --- the clock


def wait_for(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(call: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Seconds that `times` calls take, the device waited for before and after."""
    wait_for(device)
    started = time.perf_counter()
    for _ in range(times):
        call()
    wait_for(device)
    return time.perf_counter() - started


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Of what was measured in turn: the ratio of each round, and of these the median."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def free(device: torch.device) -> None:
    """Gives back the memory that nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- images


def images_for(config: Config, data_dir: str | Path, n: int) -> tuple[Dataset, str]:
    """(training images, what they are): the config's dataset where it lies in `data_dir`, whole;
    else n images of coloured squares, with which the speed is the same. Nothing is downloaded."""
    if config.dataset == "digits" or _lies_in(Path(data_dir), config.dataset):
        return read_dataset(config, data_dir, "train"), config.dataset
    return synthetic(config, n), f"synthetic images in the shape of {config.dataset}"


def _lies_in(folder: Path, name: str) -> bool:
    """Whether an entry is called like the dataset: cifar10, cifar-10-batches-py, ..."""
    entries = [re.sub(r"[^a-z0-9]", "", path.name.lower()) for path in folder.glob("*")]
    wanted = re.compile(name.replace("_", "") + r"(?!\d)")
    return any(wanted.match(entry) for entry in entries)


def synthetic(config: Config, n: int) -> Dataset:
    """n images of 4 x 4 pixel squares in random colours, of the shape that the config names."""
    channels, height, width = config.network.image_shape
    draw = torch.Generator().manual_seed(config.seed)
    coarse = (n, channels, -(-height // 4), -(-width // 4))
    squares = torch.randint(0, 256, coarse, generator=draw, dtype=torch.uint8)
    images = squares.repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :, :height, :width]
    labels = torch.randint(0, config.classes, (n,), generator=draw)
    names = [str(i) for i in range(config.classes)]
    return Dataset(config.dataset, "train", images.contiguous().numpy(), labels.numpy(), names)
