"""How well a denoiser denoises: the loss on images it was not trained on, at fixed noise."""

import torch

from datasets import Batches, Dataset
from model.denoiser import Denoiser
from support import distributed
from utils import autocast, generator

CHUNK = 250  # images whose noise is drawn together, so it is part of the definition


@torch.no_grad()
def held_out_loss(
    denoiser: Denoiser, data: Dataset, batch_size: int, use_amp: bool = False
) -> float:
    """Mean training loss over `data`, at noise levels and noise that never change, whatever the
    `batch_size`, the images per forward.

    A class-conditional network is told the labels. The chunks are divided among the ranks; every
    rank gets the mean of all.
    """
    device = denoiser.device
    chunks = Batches(data.images, data.labels, CHUNK, device)
    sums = [torch.zeros((), device=device)]  # read at the end: a read waits for the device
    for i in distributed.share(chunks.steps_per_epoch):
        x0, y = chunks[i]
        draw = generator("cpu", "held-out loss", i)
        u = torch.rand(len(x0), generator=draw).to(device)
        noise = torch.randn(x0.shape, generator=draw).to(device)
        given = (x0, denoiser.training_sigma(u), noise, *([y] if denoiser.classes else []))
        for batch in zip(*(part.split(batch_size) for part in given), strict=True):
            with autocast(device, use_amp):
                loss = denoiser.loss(*batch)
            sums.append(loss.sum())
    total = torch.stack(sums).cpu().double().sum()
    return float(distributed.sum_over_ranks(total)) / chunks.n_images
