"""uint8 arrays -> shuffled, augmented batches in [-1, 1] on the device."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from utils import generator, permutation

GPU_FRACTION = 0.25  # an array stays on the GPU if it takes at most this part of its free memory


def to_model_range(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]. The only place where images are normalised."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """The inverse of `to_model_range`; what lies outside [-1, 1] is clipped."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class Batches:
    """Random access to batch number `step`, counted from 0 across epochs.

    Which images it holds depends on (seed, epoch), how they are flipped and cropped on
    (seed, step), so a run can go on at any step without a stored state.

    images: (N, C, H, W) uint8, labels: (N,) int64; `crop_padding` is in pixels, filled with black.
    `part` is what is taken of every batch; what is drawn is drawn for the whole of it, so that the
    parts of several processes make up the batch of one.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        device: torch.device,
        seed: int = 0,
        *,
        shuffle: bool = False,
        flip: bool = False,
        crop_padding: int = 0,
        drop_last: bool = False,
        part: slice = slice(None),
    ):
        self.n_images, self.batch_size, self.device, self.seed = (
            len(images),
            batch_size,
            device,
            seed,
        )
        self.shuffle, self.flip, self.crop_padding, self.part = shuffle, flip, crop_padding, part
        full, rest = divmod(self.n_images, batch_size)
        self.steps_per_epoch = full if drop_last else full + bool(rest)
        self.images = _place(images, device)
        self.labels = torch.from_numpy(np.asarray(labels)).to(device)
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """x: (B, C, H, W) float32 in [-1, 1] and y: (B,) int64, on the device."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        whole = self._epoch_order(epoch)[start : start + self.batch_size]
        images, labels = self._fetch(whole[self.part])
        return to_model_range(self._augment(images, step, len(whole))), labels

    def _fetch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        images = self.images[index.to(self.images.device)]
        if images.device.type != self.device.type:
            if self.device.type == "cuda":
                images = images.pin_memory()
            images = images.to(self.device, non_blocking=True)
        return images, self.labels[index.to(self.device)]

    def _epoch_order(self, epoch: int) -> Tensor:
        if not self.shuffle:
            epoch = 0
        if self._order[0] != epoch:
            order = np.arange(self.n_images)
            if self.shuffle:
                order = permutation(self.n_images, self.seed, "order", epoch)
            self._order = (epoch, torch.from_numpy(order).to(self.images.device))
        return self._order[1]

    def _augment(self, images: Tensor, step: int, n: int) -> Tensor:
        """`images` are `self.part` of a batch of n."""
        draw, device = generator(self.device, self.seed, "augment", step), self.device
        if self.crop_padding:
            high = 2 * self.crop_padding + 1
            corners = torch.randint(high, (2, n), generator=draw, device=device)
            images = _crop(images, self.crop_padding, corners[:, self.part])
        if self.flip:
            flipped = (torch.rand(n, generator=draw, device=device) < 0.5)[self.part]
            images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)
        return images


def _place(images: np.ndarray, device: torch.device) -> Tensor:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if images.nbytes > GPU_FRACTION * free:
            device = torch.device("cpu")
    return torch.from_numpy(np.array(images)).to(device)  # a copy: torch wants it writable


def _crop(images: Tensor, padding: int, corners: Tensor) -> Tensor:
    """corners: (2, N), top and left in the padded images."""
    n, _, height, width = images.shape
    device = images.device
    padded = F.pad(images, (padding,) * 4)
    top, left = corners
    rows = top[:, None] + torch.arange(height, device=device)
    columns = left[:, None] + torch.arange(width, device=device)
    picked = padded[
        torch.arange(n, device=device)[:, None, None], :, rows[:, :, None], columns[:, None, :]
    ]  # (N, H, W, C)
    return picked.permute(0, 3, 1, 2).contiguous()
