"""A dataset by its name -> uint8 arrays -> shuffled, augmented batches in [-1, 1] on the device."""

import difflib
import hashlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from config import Config
from config.schema import DiffusersNetwork, Network
from readers import official
from readers.class_folders import SPLITS, near_miss, read_class_folders
from support.errors import UserError
from utils import generator, note_once, permutation

AT_ONCE = 4096  # images of a memory map that are read together
GPU_FRACTION = 0.25  # an array stays on the GPU if it takes at most this part of its free memory


@dataclass(frozen=True, eq=False)
class Dataset:
    """All images of one split."""

    name: str
    split: str  # "train", "test", or what is made of them; an image's noise depends on it
    images: np.ndarray  # (N, C, H, W) uint8, or float16 if encoded; may be a read-only memory map
    labels: np.ndarray  # (N,) int64, in 0 .. len(class_names) - 1
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray | slice) -> "Dataset":
        """The images and labels at `index`: (n,) places, (N,) bool or a slice."""
        return replace(self, images=self.images[index], labels=self.labels[index])

    def fingerprint(self) -> str:
        """A short hash of every pixel and label: the key of statistics kept on disk."""
        digest = hashlib.sha256(repr(self.images.shape).encode())
        for start in range(0, len(self), AT_ONCE):
            digest.update(np.ascontiguousarray(self.images[start : start + AT_ONCE]))
        digest.update(np.ascontiguousarray(self.labels))
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Source:
    """A row of the table of datasets."""

    shape: tuple[int, int, int] | None  # C, H, W; None: files of any size, which are resized
    read_official: Callable[[Path, str, bool], official.Split] | None = None
    aliases: tuple[str, ...] = ()


SOURCES = {
    "cifar10": Source((3, 32, 32), official.read_cifar10, ("cifar",)),
    "cifar100": Source((3, 32, 32), official.read_cifar100),
    "mnist": Source((1, 28, 28), official.read_mnist),
    "fashion_mnist": Source((1, 28, 28), official.read_fashion_mnist),
    "tiny_imagenet": Source(official.TINY_IMAGENET_SHAPE, official.read_tiny_imagenet, ("tiny",)),
    "digits": Source((1, 8, 8), official.read_digits),
    "folder": Source(None),
}


def read_dataset(
    config: Config, data_dir: str | Path, split: str, skip_bad_images: bool = False
) -> Dataset:
    """The `split` ("train" or "test") of `config.dataset`, from `data_dir`.

    Class folders `<data_dir>/<name>/{train,test}/<class>/*` win where they are; otherwise the
    official files, downloaded where they can be. Raises UserError for a name, shape or number of
    classes that does not fit, for files that are not there, and, unless `skip_bad_images`, for
    image files that cannot be read.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {SPLITS}")
    name = canonical_name(config.dataset)
    shape = _shape_to_read(name, config.network)
    root = _class_folders(name, Path(data_dir))
    if root:
        images, labels, class_names = read_class_folders(root, split, shape, skip_bad_images)
    else:
        read_official = SOURCES[name].read_official
        images, labels, class_names = read_official(Path(data_dir), split, skip_bad_images)
    _check_every_class_has_images(name, split, labels, class_names)
    _check_classes(name, class_names, config)
    return Dataset(name, split, images, labels, class_names)


def canonical_name(name: str) -> str:
    """The name in the table for a name or an alias. Raises UserError with the nearest name."""
    if not name:
        raise UserError(
            f"which dataset? The model does not say: add --dataset, one of {', '.join(SOURCES)}"
        )
    names = {alias: key for key, source in SOURCES.items() for alias in (key, *source.aliases)}
    if name in names:
        return names[name]
    near = difflib.get_close_matches(name.lower(), names, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(SOURCES)}"
    raise UserError(f"dataset: no dataset '{name}': {hint}")


def _shape_to_read(name: str, network: Network | DiffusersNetwork) -> tuple[int, int, int]:
    """That of the files; where they can have any, that of the images which the network wants."""
    fixed, shape = SOURCES[name].shape, network.pixel_shape
    if fixed and tuple(shape) != fixed and not network.resizes:
        raise UserError(
            f"network.image_shape is {list(shape)}, but the images of {name} are {list(fixed)}: "
            f"set network.image_shape to {list(fixed)}"
        )
    return fixed or tuple(shape)


def _check_classes(name: str, class_names: list[str], config: Config) -> None:
    found, expected = len(class_names), config.classes
    if found > expected:
        raise UserError(f"{name} has {found} classes, but classes is {expected}: set it to {found}")
    if found < expected and config.cond_drop_prob:
        raise UserError(
            f"{name} has {found} classes here, but classes is {expected}: a class-conditional "
            f"network (cond_drop_prob) would draw some that it never saw; set it to {found}"
        )
    if found < expected:
        note_once(f"{name}: {found} classes here, of the {expected} that the config names")


def _check_every_class_has_images(
    name: str, split: str, labels: np.ndarray, class_names: list[str]
) -> None:
    counts = np.bincount(labels, minlength=len(class_names))
    empty = [name for name, count in zip(class_names, counts, strict=True) if count == 0]
    if empty:
        raise UserError(f"{name}: {split} has no readable image of class {', '.join(empty[:5])}")


def _class_folders(name: str, data_dir: Path) -> Path | None:
    """The folder that holds {train,test}/<class>/* of the dataset, or None.

    For "folder", that may be the data folder itself. Raises UserError if it has none.
    """
    any_files = SOURCES[name].read_official is None
    candidates = [data_dir / name, data_dir] if any_files else [data_dir / name]
    for root in candidates:
        if any((root / split).is_dir() for split in SPLITS):
            return root
    for root in candidates:
        for split in SPLITS:
            if hint := near_miss(root, split):
                raise UserError(f"{root / split}: no such folder: {hint}")
    if any_files:
        raise UserError(
            f"{data_dir}: no class folders: put images at {data_dir / name}/train/<class>/ and "
            f"{data_dir / name}/test/<class>/, or name their folder with --data_dir"
        )
    return None


def stratified(dataset: Dataset, n: int | None, seed: int) -> Dataset:
    """n images of the dataset, see `stratified_subset`; all of it if n is None."""
    return dataset if n is None else dataset.take(stratified_subset(dataset.labels, n, seed))


def stratified_subset(
    labels: np.ndarray, n: int, seed: int, option: str = "--n_train"
) -> np.ndarray:
    """(n,) ascending indices: the classes in their proportions, of each at least one image.

    Of one seed, a smaller subset is part of a larger one. Raises UserError, which names the option,
    if n is less than the number of classes or more than that of the labels.
    """
    classes = np.unique(labels)
    if not len(classes) <= n <= len(labels):
        raise UserError(
            f"{option} {n}: give {len(classes)} (an image of each class) to {len(labels):,} (all)"
        )
    place = np.empty(len(labels))  # of an image among those of its class, in 0..1
    for label in classes:
        index = np.flatnonzero(labels == label)
        order = permutation(len(index), seed, "subset", int(label))
        place[index[order]] = np.arange(len(index)) / len(index)
    return np.sort(np.argsort(place, kind="stable")[:n])


# --- batches


def to_model_range(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]. The only place where images are normalised.

    Those that are encoded already (float16) stay what they are, in float32.
    """
    return images.float() if images.is_floating_point() else images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """The inverse of `to_model_range`; what lies outside [-1, 1] is clipped."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


@dataclass(frozen=True)
class Batching:
    """How batches are made of images."""

    seed: int = 0  # of the order, the flips and the crops
    shuffle: bool = False  # a new order every epoch
    flip: bool = False  # each image mirrored with probability 1/2
    crop: bool = False  # each image shifted at random, see `_crop`
    drop_last: bool = False  # no batch that is smaller than the others
    view: int = 0  # which draw of the flips and crops: other views of the same images


class Batches:
    """Random access to batch number `step`, counted from 0 across epochs.

    Which images it holds depends on (seed, epoch), how they are flipped and cropped on
    (seed, step), so a run can go on at any step without a stored state.

    images: (N, C, H, W) uint8, labels: (N,) or (N, K) int64. Images that stay on the host are read
    row by row, so that a memory map may be larger than the memory.
    `part` is what is taken of every batch; what is drawn is drawn for the whole of it, so that the
    parts of several processes make up the batch of one.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        device: torch.device,
        how: Batching = Batching(),
        part: slice = slice(None),
    ):
        self.n_images, self.batch_size, self.device = len(images), batch_size, device
        self.how, self.part = how, part
        full, rest = divmod(self.n_images, batch_size)
        self.steps_per_epoch = full if how.drop_last else full + bool(rest)
        self.images = _on_device(images, device) if fits_on(device, images.nbytes) else images
        self.labels = torch.from_numpy(np.asarray(labels)).to(device)
        self._order: tuple[int, np.ndarray, Tensor] = (-1, np.empty(0), torch.empty(0))

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """x: (B, C, H, W) float32 in [-1, 1] and y: (B,) or (B, K), on the device."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        order, places = self._epoch_order(epoch)
        whole = slice(start, min(start + self.batch_size, self.n_images))
        images, labels = self._fetch(order[whole][self.part], places[whole][self.part])
        return to_model_range(self._augment(images, step, whole.stop - start)), labels

    def _fetch(self, index: np.ndarray, places: Tensor) -> tuple[Tensor, Tensor]:
        """The images at `index`, which `places` holds on the device."""
        if isinstance(self.images, Tensor):
            return self.images[places], self.labels[places]
        images = torch.from_numpy(self.images[index])
        if self.device.type == "cuda":
            images = images.pin_memory()
        return images.to(self.device, non_blocking=True), self.labels[places]

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, Tensor]:
        """On the host and on the device: sent in parts, each step would wait for the device."""
        if not self.how.shuffle:
            epoch = 0
        if self._order[0] != epoch:
            order = np.arange(self.n_images)
            if self.how.shuffle:
                order = permutation(self.n_images, self.how.seed, "order", epoch)
            self._order = (epoch, order, torch.from_numpy(order).to(self.device))
        return self._order[1:]

    def _augment(self, images: Tensor, step: int, n: int) -> Tensor:
        """`images` are `self.part` of a batch of n."""
        how, device = self.how, self.device
        draw = generator(device, how.seed, "augment", step, *([how.view] if how.view else []))
        if how.crop:
            padding = min(4, images.shape[-1] // 8)  # 4 of 32 pixels, as usual for CIFAR-10
            corners = torch.randint(2 * padding + 1, (2, n), generator=draw, device=device)
            images = _crop(images, padding, corners[:, self.part])
        if how.flip:
            flipped = (torch.rand(n, generator=draw, device=device) < 0.5)[self.part]
            images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)
        return images


def fits_on(device: torch.device, n_bytes: int) -> bool:
    """Whether an array of so many bytes is copied to the device, or stays where it is.

    It stays on the host for every device that uses the host's memory.
    """
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return n_bytes <= GPU_FRACTION * free


_copies: dict[tuple[int, torch.device], Tensor] = {}  # by the array's id, while the array lives


def _on_device(images: np.ndarray, device: torch.device) -> Tensor:
    """The one copy of this array on the device, whoever asks for it."""
    key = (id(images), device)
    if key not in _copies:
        dtype = torch.from_numpy(np.empty(0, images.dtype)).dtype
        copy = _copies[key] = torch.empty(images.shape, dtype=dtype, device=device)
        for start in range(0, len(images), AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            copy[rows] = torch.from_numpy(np.array(images[rows]))  # torch wants it writable
        weakref.finalize(images, _copies.pop, key)
    return _copies[key]


def _crop(images: Tensor, padding: int, corners: Tensor) -> Tensor:
    """corners: (2, N), top and left in images padded with black (latents: with -1)."""
    n, _, height, width = images.shape
    device = images.device
    padded = F.pad(images, (padding,) * 4, value=-1 if images.is_floating_point() else 0)
    top, left = corners
    rows = top[:, None] + torch.arange(height, device=device)
    columns = left[:, None] + torch.arange(width, device=device)
    picked = padded[
        torch.arange(n, device=device)[:, None, None], :, rows[:, :, None], columns[:, None, :]
    ]  # (N, H, W, C)
    return picked.permute(0, 3, 1, 2).contiguous()
