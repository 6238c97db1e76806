"""Images laid out in a grid, as PNG."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from support.errors import UserError
from support.files import DAMAGED, replacing

BETWEEN = 2  # pixels between the images of a grid
WHITE = 255


def save_png(path: str | Path, image: Tensor, flush: bool = True) -> None:
    """Writes image, (1 or 3, H, W) uint8 on the CPU, atomically. Without `flush`, for one of many:
    see `replacing`."""
    pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
    with replacing(path, flush) as temporary:
        Image.fromarray(pixels.numpy()).save(temporary, format="PNG")


def load_png(path: str | Path) -> Tensor:
    """The inverse of `save_png`. Raises UserError if the file is not there or damaged."""
    try:
        with Image.open(path) as image:
            pixels = torch.from_numpy(np.array(image))
    except DAMAGED as error:
        raise UserError(
            f"{path}: cannot be read ({error}); the call of sample.py that drew it draws it anew"
        ) from None
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def rows_by_class(images: Tensor, y: Tensor | None) -> tuple[Tensor, int | None]:
    """`images`, (N, C, H, W), in an order and a number of columns that give each class a row.

    y: (N,), different classes in turn; None, or fewer than two images of each: as they are, and
    no number.
    """
    kinds = 1 if y is None else len(y.unique())
    columns = len(images) // kinds
    if kinds == 1 or columns < 2:
        return images, None
    rows = images[: columns * kinds].unflatten(0, (columns, kinds)).transpose(0, 1)
    return rows.flatten(0, 1), columns


def image_grid(images: Tensor, columns: int) -> Tensor:
    """images: (N, C, H, W) uint8 -> (3, H', W') in rows of `columns`, with white between them.

    One image alone gets no frame.
    """
    images = images.expand(-1, 3, -1, -1)
    n, c, h, w = images.shape
    if n == 1:
        return images[0]
    columns = min(columns, n)
    rows = -(-n // columns)
    cells = images.new_full((rows * columns, c, h + BETWEEN, w + BETWEEN), WHITE)
    cells[:n, :, BETWEEN:, BETWEEN:] = images
    cells = cells.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
    grid = cells.reshape(c, rows * (h + BETWEEN), columns * (w + BETWEEN))
    return F.pad(grid, (0, BETWEEN, 0, BETWEEN), value=WHITE)


def save_image_grid(
    path: str | Path, images: Tensor, columns: int, real: Tensor | None = None
) -> np.ndarray:
    """Writes images (N, C, H, W) uint8 in rows of `columns`, the last row from `real` if given.

    Returns the grid, (3, H', W') uint8. Small images are enlarged to at least 64 pixels.
    """
    rows = [images]
    if real is not None:
        missing = -len(images) % columns
        rows += [torch.full((missing, *images.shape[1:]), WHITE, dtype=torch.uint8), real[:columns]]
    grid = image_grid(torch.cat(rows), columns)
    zoom = max(1, 64 // images.shape[-1])
    grid = grid.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2)
    save_png(path, grid)
    return grid.numpy()
