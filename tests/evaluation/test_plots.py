"""Figures are files that open, at a size that can be read."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import make_grid

from evaluation.plots import heat_map, scatter
from evaluation.samples.grids import image_grid
from support.errors import UserError


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (8, 3), (18, 10)])
def test_heat_map_grows_with_the_table(tmp_path, rows, columns):
    tables = {name: np.random.default_rng(0).random((rows, columns)) for name in ("a", "b")}
    path = tmp_path / "map.png"
    names = [f"out_{i}" for i in range(rows)], [f"t={i}" for i in range(columns)]
    heat_map(path, tables, *names, "title", "accuracy in %", (0, 0))
    width, height = Image.open(path).size
    assert width >= 2 * columns * 90  # room for "12.34" in every cell
    assert height >= rows * 45
    assert [file.name for file in tmp_path.iterdir()] == ["map.png"]


@pytest.mark.parametrize("n_classes", [2, 15, 100])
def test_scatter_gives_every_class_its_colour(tmp_path, n_classes):
    labels = np.arange(200) % n_classes
    points = np.stack([labels, np.arange(200)], axis=1).astype(np.float32)
    path = tmp_path / "points.png"
    scatter(path, points, labels, [f"class {i}" for i in range(n_classes)], "title")
    colours = Image.open(path).convert("RGB").getcolors(maxcolors=1_000_000)
    vivid = {c for n, c in colours if n > 3 and max(c) - min(c) > 40}
    assert len(vivid) >= min(n_classes, 2 * n_classes // 3 + 1)


def test_a_folder_that_cannot_be_written_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        scatter(tmp_path / "file" / "a.png", np.zeros((2, 2)), np.zeros(2), ["x"], "title")


@pytest.mark.parametrize(("n", "channels", "columns"), [(1, 3, 4), (3, 1, 8), (7, 3, 3), (8, 1, 4)])
def test_a_grid_is_that_of_torchvision(n, channels, columns):
    images = torch.randint(256, (n, channels, 5, 6), dtype=torch.uint8)
    theirs = make_grid(images, nrow=columns, padding=2, pad_value=255)
    assert torch.equal(image_grid(images, columns), theirs)
