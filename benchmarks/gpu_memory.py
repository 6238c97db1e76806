"""The stage of benchmarks/gpu.py that measures memory."""

import torch

from benchmarks.gpu_jobs import Found
from benchmarks.memory import peak_bytes
from benchmarks.record import ROOT, synthetic
from config import Config, load_config
from config.schema import FOREIGN_NETWORKS
from training.trainer import Trainer

TRAIN_IMAGES = {  # of the datasets that a GPU would hold beside the network
    "cifar10": 50_000, "cifar100": 50_000, "mnist": 60_000, "fashion_mnist": 60_000,
    "tiny_imagenet": 100_000, "digits": 1437,
}  # fmt: skip


def memory(device: torch.device, tiny: bool) -> Found:
    """Peak memory of training with every config, at its own batch size; of one if `tiny`."""
    paths = sorted((ROOT / "config").glob("digits.yaml" if tiny else "*.yaml"))
    found = Found(
        ["MB allocated / reserved, in float32; with AMP; images that the GPU holds if they fit"]
    )
    for path in paths:
        config = load_config(path)
        if config.net_type in FOREIGN_NETWORKS:  # not trained here
            continue
        row = {name: peak(config, device, name == "amp") for name in ("float32", "amp")}
        n = TRAIN_IMAGES.get(config.dataset)
        row["images_mb"] = n and n * torch.Size(config.network.image_shape).numel() / 1e6
        found.figures[path.stem] = row
        found.lines.append(f"{path.stem}: " + "; ".join(words_of(row)))
        if any("error" in row[name] for name in ("float32", "amp")):
            found.status = "failed"
    return found


def peak(config: Config, device: torch.device, use_amp: bool) -> dict[str, float | str | None]:
    """MB of a few steps, None where `peak_bytes` is, or the error that they end with."""
    train = synthetic(config, config.images_per_step)

    def steps() -> None:
        trainer = Trainer(config, train, device, use_amp)
        trainer.denoiser.train()
        for _ in range(3):
            trainer.train_step()

    try:
        allocated = peak_bytes(steps, device)
    except torch.OutOfMemoryError as error:
        return {"error": str(error).splitlines()[0]}
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else allocated
    peaks = {"allocated_mb": allocated, "reserved_mb": reserved}
    return {name: n_bytes and n_bytes / 1e6 for name, n_bytes in peaks.items()}


def words_of(row: dict) -> list[str]:
    """A config's line."""
    words = [
        row[name].get("error")
        or " / ".join("-" if mb is None else f"{mb:,.0f}" for mb in row[name].values())
        for name in ("float32", "amp")
    ]
    return [*words, f"images {row['images_mb']:,.0f}" if row["images_mb"] else "images ?"]
