"""Images laid out in a grid, as PNG."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.io import write_png
from torchvision.utils import make_grid


def save_image_grid(path: Path, images: Tensor, columns: int, real: Tensor | None = None):
    """Writes images (N, C, H, W) uint8 in rows of `columns`, the last row from `real` if given.

    Returns the grid, (3, H', W') uint8. Small images are enlarged to at least 64 pixels.
    """
    rows = [images]
    if real is not None:
        missing = -len(images) % columns
        rows += [torch.full((missing, *images.shape[1:]), 255, dtype=torch.uint8), real[:columns]]
    grid = make_grid(torch.cat(rows), nrow=columns, padding=2, pad_value=255)
    zoom = max(1, 64 // images.shape[-1])
    grid = grid.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(grid, str(path))
    return np.asarray(grid)
