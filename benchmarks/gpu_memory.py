"""The stage of benchmarks/gpu.py that measures memory."""

import torch

from benchmarks.gpu_jobs import ROOT, Outcome
from benchmarks.record import free, synthetic, wait_for
from config import Config, load_config
from config.schema import FOREIGN_NETWORKS
from training.trainer import Trainer
from utils import peak_memory_bytes

TRAIN_IMAGES = {  # of the datasets that a GPU would hold beside the network
    "cifar10": 50_000, "cifar100": 50_000, "mnist": 60_000, "fashion_mnist": 60_000,
    "tiny_imagenet": 100_000, "digits": 1437,
}  # fmt: skip


def memory(device: torch.device, tiny: bool) -> Outcome:
    """Peak memory of training with every config, at its own batch size; of one if `tiny`."""
    paths = sorted((ROOT / "config").glob("digits.yaml" if tiny else "*.yaml"))
    lines = ["MB allocated / reserved, in float32; with AMP; images that the GPU holds if they fit"]
    figures, status = {}, "passed"
    for path in paths:
        config = load_config(path)
        if config.net_type in FOREIGN_NETWORKS:  # not trained here
            continue
        row = {name: peak(config, device, name == "amp") for name in ("float32", "amp")}
        n = TRAIN_IMAGES.get(config.dataset)
        row["images_mb"] = n and n * torch.Size(config.network.image_shape).numel() / 1e6
        figures[path.stem] = row
        lines.append(f"{path.stem}: " + "; ".join(words_of(row)))
        if any("error" in row[name] for name in ("float32", "amp")):
            status = "failed"
    return lines, figures, status


def peak(config: Config, device: torch.device, use_amp: bool) -> dict[str, float | str]:
    """MB of a few steps, or the error that they end with."""
    free(device)
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    train = synthetic(config, config.batch_size * config.accumulate)
    try:
        trainer = Trainer(config, train, device, use_amp)
        trainer.denoiser.train()
        for _ in range(3):
            trainer.train_step()
        wait_for(device)
    except torch.OutOfMemoryError as error:
        return {"error": str(error).splitlines()[0]}
    reserved = torch.cuda.max_memory_reserved(device) if cuda else peak_memory_bytes(device)
    return {
        "allocated_mb": (peak_memory_bytes(device) - before) / 1e6,
        "reserved_mb": reserved / 1e6,
    }


def words_of(row: dict) -> list[str]:
    """A config's line."""
    peaks = [row[name] for name in ("float32", "amp")]
    words = [p.get("error") or f"{p['allocated_mb']:,.0f} / {p['reserved_mb']:,.0f}" for p in peaks]
    return [*words, f"images {row['images_mb']:,.0f}" if row["images_mb"] else "images ?"]
