"""The test loss and the grids of images."""

import numpy as np
import pytest
import torch
from PIL import Image

from config import parse_config
from datasets import Dataset
from evaluation.samples.grids import load_png, save_image_grid, save_png
from model.models import build_denoiser
from training.held_out_loss import held_out_loss

CPU = torch.device("cpu")


def test_the_held_out_loss_never_changes_and_is_1_for_a_network_of_zeros(tiny_config):
    """Predicting eps = 0 leaves E eps^2 = 1."""
    images = np.random.default_rng(0).integers(0, 256, (300, 1, 8, 8), dtype=np.uint8)
    data = Dataset("digits", "test", images, np.zeros(300, np.int64), ["0"])
    denoiser = build_denoiser(tiny_config).eval()
    torch.nn.init.zeros_(denoiser.net.final.weight)
    torch.nn.init.zeros_(denoiser.net.final.bias)
    torch.manual_seed(1)
    first = held_out_loss(denoiser, data, 250)
    torch.manual_seed(2)
    assert held_out_loss(denoiser, data, 250) == first
    assert held_out_loss(denoiser, data, 7) == pytest.approx(first, rel=1e-6)
    assert first == pytest.approx(1, abs=0.03)  # 19,200 squared normals: standard error 0.01


def test_the_held_out_loss_of_a_class_conditional_network_depends_on_the_labels(tiny_config):
    config = parse_config({**tiny_config.model_dump(), "cond_drop_prob": 0.1})
    torch.manual_seed(0)
    denoiser = build_denoiser(config).eval()
    images = np.random.default_rng(0).integers(0, 256, (10, 1, 8, 8), dtype=np.uint8)
    losses = {
        held_out_loss(denoiser, Dataset("digits", "test", images, np.full(10, y), ["0"]), 250)
        for y in (0, 1, 2)
    }
    assert len(losses) == 3


def test_a_grid_shows_every_image_and_the_real_ones_last(tmp_path):
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 64, 64) * 10
    real = torch.full((7, 1, 64, 64), 200, dtype=torch.uint8)
    path = tmp_path / "new" / "grid.png"
    grid = save_image_grid(path, images, 3, real)
    shown = np.array(Image.open(path))
    assert np.array_equal(shown, grid.transpose(1, 2, 0))
    rows = [[int(shown[34 + 66 * r, 34 + 66 * c, 0]) for c in range(3)] for r in range(3)]
    assert rows == [[0, 10, 20], [30, 40, 255], [200, 200, 200]]


def test_small_images_are_enlarged(tmp_path):
    grid = save_image_grid(tmp_path / "grid.png", torch.zeros(4, 3, 8, 8, dtype=torch.uint8), 2)
    assert grid.shape == (3, 8 * (2 * 8 + 3 * 2), 8 * (2 * 8 + 3 * 2))


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip(tmp_path, channels):
    image = torch.randint(256, (channels, 5, 7), dtype=torch.uint8)
    save_png(tmp_path / "a.png", image)
    assert torch.equal(load_png(tmp_path / "a.png"), image)
