"""Datasets as a latent or resized model sees them, against the VAE of diffusers itself."""

import numpy as np
import pytest
import torch
from diffusers_folders import SIZE, diffusers, save_dit, save_unet

from checkpoint import load_denoiser
from datasets import Dataset
from evaluation.encoded import encoded
from support.errors import UserError


def dataset(channels: int = 3, size: int = SIZE, n: int = 20) -> Dataset:
    images = np.random.default_rng(0).integers(0, 256, (n, channels, size, size), dtype=np.uint8)
    return Dataset("random", "test", images, np.arange(n) % 2, ["a", "b"])


@pytest.fixture(scope="module")
def dit_folder(tmp_path_factory):
    return save_dit(tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="module")
def dit(dit_folder):
    return load_denoiser(dit_folder).denoiser


def test_latents_are_the_posterior_mean_times_the_scaling_factor(dit, dit_folder, tmp_path):
    images = dataset()
    found = encoded(images, dit, tmp_path)
    vae = diffusers.AutoencoderKL.from_pretrained(dit_folder / "vae")
    x = torch.from_numpy(images.images).float() / 127.5 - 1
    with torch.no_grad():
        expected = vae.encode(x).latent_dist.mean * vae.config.scaling_factor
        back = vae.decode(torch.from_numpy(np.array(found.images)).float() / 0.7).sample
        close(dit.decode(torch.from_numpy(np.array(found.images))), back)
    assert found.images.dtype == np.float16
    close(torch.from_numpy(np.array(found.images)).float(), expected, 1e-3)
    assert np.array_equal(found.labels, images.labels)


def close(ours, theirs, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_they_are_made_once_for_the_same_images_and_vae(dit, tmp_path, monkeypatch):
    first = encoded(dataset(), dit, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(type(dit.codec), "encode", None)  # would raise
        again = encoded(dataset(), dit, tmp_path)
        assert np.array_equal(first.images, again.images)
        with pytest.raises(TypeError):
            encoded(dataset(n=19), dit, tmp_path)
    scale = dit.codec.scale.clone()
    dit.codec.scale.mul_(2)
    try:
        other = encoded(dataset(), dit, tmp_path)
    finally:
        dit.codec.scale.copy_(scale)
    close(torch.from_numpy(other.images / 2), torch.from_numpy(np.array(first.images)), 1e-3)
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_images_of_another_size_are_resized_and_grey_ones_shown_in_three_channels(tmp_path):
    unet = load_denoiser(save_unet(tmp_path / "unet")).denoiser
    small = dataset(channels=1, size=4)
    found = torch.from_numpy(np.array(encoded(small, unet, tmp_path).images))
    assert found.shape == (20, 3, SIZE, SIZE)
    assert torch.equal(found[:, 0], found[:, 2])
    x = torch.from_numpy(small.images).float() / 127.5 - 1
    close(found.float().mean((1, 2, 3)), x.mean((1, 2, 3)), 0.05)
    flat = Dataset("flat", "test", np.full((2, 3, 5, 9), 51, np.uint8), np.zeros(2), ["a"])
    close(torch.from_numpy(np.array(encoded(flat, unet, tmp_path).images)).float(),
          torch.full((2, 3, SIZE, SIZE), 51 / 127.5 - 1), 1e-3)  # fmt: skip


def test_images_that_fit_stay_what_they_are(tmp_path):
    unet = load_denoiser(save_unet(tmp_path / "unet")).denoiser
    images = dataset()
    assert encoded(images, unet, tmp_path) is images


def test_colour_is_refused_where_grey_is_wanted(tmp_path):
    unet = load_denoiser(save_unet(tmp_path / "unet", in_channels=1, out_channels=1)).denoiser
    with pytest.raises(UserError, match="random is in colour, and this model wants grey images"):
        encoded(dataset(), unet, tmp_path)
