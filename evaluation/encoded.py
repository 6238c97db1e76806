"""Datasets as a denoiser sees them: resized, and of a latent model through its VAE."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from checkpoint import fingerprint
from datasets import Dataset, to_model_range
from model.denoiser import Denoiser
from model.diffusers_networks import VAE_BATCH, Codec
from support import distributed
from support.errors import UserError
from support.files import load_array, replacing, short_hash
from utils import log, progress


def encoded(dataset: Dataset, denoiser: Denoiser, folder: Path) -> Dataset:
    """The dataset, its images such as the denoiser sees them: (N, *image_shape).

    Images that fit stay as they are. Others are encoded once, kept in `folder` as float16, and
    read from there the next time, by a fingerprint of the images and the codec; rank 0 encodes.
    Raises UserError for images in colour where the model wants grey ones.
    """
    codec, shape = denoiser.codec, dataset.images.shape[1:]
    if codec is None or codec.fits(shape):
        return dataset
    if shape[0] not in (1, codec.shape[0]):
        raise UserError(f"{dataset.name} is in colour, and this model wants grey images")
    key = short_hash([codec.shape, fingerprint(codec.state_dict()), dataset.fingerprint()])
    path = folder / f"{dataset.name}_{dataset.split}_{key}.npy"
    how = f"{dataset.name} {dataset.split}"
    if shape != codec.shape:
        how += ": {} becomes {}".format(*("x".join(map(str, s)) for s in (shape, codec.shape)))
    how += ", encoded to latents" if denoiser.is_latent else ""

    def fits(kept: np.ndarray) -> bool:
        return kept.dtype == np.float16 and len(kept) == len(dataset)

    with distributed.main_first():
        images = load_array(path, fits)
        if images is None:
            _encode(dataset, codec, denoiser.device, path, how)
            images = load_array(path, fits)
    log.info(f"{how}, kept in {path}")
    return replace(dataset, images=images)


@torch.no_grad()
def _encode(dataset: Dataset, codec: Codec, device: torch.device, path: Path, title: str) -> None:
    images, out = dataset.images, None
    with replacing(path) as temporary:
        for start in progress(range(0, len(images), VAE_BATCH), title):
            pixels = torch.from_numpy(np.array(images[start : start + VAE_BATCH]))
            x0 = codec.encode(to_model_range(pixels.to(device))).half().cpu().numpy()
            if out is None:
                shape = (len(images), *x0.shape[1:])
                out = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
            out[start : start + len(x0)] = x0
        out.flush()
