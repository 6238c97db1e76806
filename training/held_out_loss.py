"""How well a denoiser denoises: the loss on images it was not trained on, at fixed noise."""

import torch

from datasets import Batches, Dataset
from model.denoiser import Denoiser
from support import distributed
from utils import autocast, generator

CHUNK = 250  # images per forward; the noise is drawn per chunk, so it is part of the definition


@torch.no_grad()
def held_out_loss(
    denoiser: Denoiser, data: Dataset, device: torch.device, use_amp: bool = False
) -> float:
    """Mean training loss over `data`, at noise levels and noise that never change.

    A class-conditional network is told the labels. The chunks are divided among the ranks; every
    rank gets the mean of all.
    """
    chunks = Batches(data.images, data.labels, CHUNK, device)
    total = torch.zeros((), dtype=torch.float64)
    for i in distributed.share(chunks.steps_per_epoch):
        x0, y = chunks[i]
        draw = generator("cpu", "held-out loss", i)
        u = torch.rand(len(x0), generator=draw).to(device)
        noise = torch.randn(x0.shape, generator=draw).to(device)
        with autocast(device, use_amp):
            loss = denoiser.loss(
                x0, denoiser.training_sigma(u), noise, y if denoiser.classes else None
            )
        total += loss.sum().cpu()
    return float(distributed.sum_over_ranks(total)) / chunks.n_images
