"""Image files -> one uint8 array, decoded once and kept as a memory-mapped .npy beside them."""

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from support.errors import UserError, reason_of
from support.files import load_array, load_json, save_array, write_json
from utils import log, progress

Shape = tuple[int, int, int]  # C, H, W

CACHE_DIR = ".cache"
CACHE_VERSION = 1  # raise it when the same files would decode to other pixels
FILES_PER_TASK = 64  # one task per file would cost more than decoding a small image
MODES = {1: "L", 3: "RGB"}

# What systems and their tools leave in folders; what is hidden (.DS_Store) is skipped anyway.
LITTER = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "icon\r", "lost+found"}


class UnreadableImage(Exception):
    """A file is not an image, or a damaged one, or of unknown range; the message says why."""


class ImageFile(NamedTuple):
    """A file as it was listed; its size and time tell whether it has changed since."""

    path: str
    size: int  # bytes
    mtime_ns: int


class Listing(NamedTuple):
    """What a folder holds, sorted, without what is hidden and what systems leave there."""

    files: list[ImageFile]  # regular ones, and links that lead nowhere: decoding names them
    folders: list[str]
    special: list[str]  # pipes, sockets, devices: to open one may wait for ever


def list_folder(folder: Path) -> Listing:
    """Raises FileNotFoundError without it, UserError if it cannot be read."""
    found = Listing([], [], [])
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.name.lower() not in LITTER:
                    _sort_in(entry, found)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be read ({reason_of(error)}): mend or remove it"
        ) from None
    return Listing(*map(sorted, found))


def _sort_in(entry: os.DirEntry, found: Listing) -> None:
    try:
        status = entry.stat()
    except OSError:  # a link to nothing, or one to itself
        status = entry.stat(follow_symlinks=False)
    if stat.S_ISDIR(status.st_mode):
        found.folders.append(entry.name)
    elif stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
        found.files.append(ImageFile(entry.path, status.st_size, status.st_mtime_ns))
    else:
        found.special.append(entry.name)


def read_images(
    root: Path, name: str, files: list[ImageFile], shape: Shape, skip_bad_images: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes `files`, all of them under `root`, to `shape`, or maps the array kept from before.

    Returns images (N, C, H, W), uint8, usually a read-only memory map of
    `root/.cache/<name>-...npy`, and indices (N,) int64 into `files`. The array is renewed when
    a file's name, size or time of change differs. Raises UserError that names unreadable files,
    unless `skip_bad_images`: then they are left out with a warning.
    """
    if shape[0] not in MODES:
        raise UserError(
            f"network.image_shape {list(shape)}: image files are read in grey or in colour: "
            "let it start with 1 or 3 channels"
        )
    key = f"{name}-{'x'.join(map(str, shape))}-{_fingerprint(root, files)}"
    cache = root / CACHE_DIR
    images, bad = _load(cache, key, files, shape) or (None, None)
    stored = images is not None
    if not stored:
        images, bad = _decode_all(files, shape, f"decoding {root.name}/{name}")
    if bad:
        text = _describe(root, name, bad, files)
        if not skip_bad_images:
            raise UserError(f"{text}\nReplace or remove them, or leave them out: --skip_bad_images")
        log.warning("%s: left out", text)
    kept = np.array([i for i in range(len(files)) if i not in bad], dtype=np.int64)
    if not stored:
        images = _store(cache, key, images[kept] if bad else images, bad)
    return images, kept


def decode(path: str, shape: Shape) -> np.ndarray:
    """Reads one image: (C, H, W), uint8, resized to cover H x W and cropped around its centre.

    Upright by its EXIF orientation; transparent parts become white; the first frame of an
    animation; 16-bit grey is scaled to 8 bits. An image of the right size keeps its pixels.
    Raises UnreadableImage.
    """
    channels, height, width = shape
    with _opened(path) as file:
        image = _in_8_bits(file, MODES[channels])
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def decode_at_own_size(path: str) -> tuple[np.ndarray, bool]:
    """Reads one image in colour as `decode` does, but does not resize it: (3, H, W), uint8.

    Also whether Pillow's plain conversion to RGB, which most tools use, gives the same pixels.
    Raises UnreadableImage.
    """
    with _opened(path) as file:
        pixels = np.asarray(_in_8_bits(file, "RGB"))
        as_others = np.array_equal(pixels, np.asarray(file.convert("RGB")))
    return pixels.transpose(2, 0, 1), as_others


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """Whatever a decoder raises about one file (damaged EXIF data: AttributeError, TypeError) is
    this file's fault."""
    try:
        with Image.open(path) as file:
            yield file
    except Exception as error:
        raise UnreadableImage(_reason(error)) from error


def _in_8_bits(file: Image.Image, mode: str) -> Image.Image:
    """Upright, without transparency, in `mode`, "L" or "RGB"."""
    image = ImageOps.exif_transpose(file)
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown: save it with 8 bits")
    if image.mode.startswith("I"):  # 16-bit grey; "I" in older versions of Pillow
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("32-bit pixels, whose range is unknown: save it with 8 bits")
        image = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(mode)


def _fingerprint(root: Path, files: list[ImageFile]) -> str:
    start = len(str(root))  # relative paths: a moved dataset keeps its array
    lines = [f"{path[start:]}|{size}|{mtime_ns}" for path, size, mtime_ns in files]
    text = "\n".join([str(CACHE_VERSION), *lines])
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def _decode_all(
    files: list[ImageFile], shape: Shape, title: str
) -> tuple[np.ndarray, dict[int, str]]:
    """-> images (N, C, H, W), and why a file could not be read: {index: reason}."""
    images = np.zeros((len(files), *shape), dtype=np.uint8)
    bad: dict[int, str] = {}

    def work(indices: range) -> int:
        for i in indices:
            try:
                images[i] = decode(files[i].path, shape)
            except UnreadableImage as error:
                bad[i] = str(error)
        return len(indices)

    tasks = [
        range(start, min(start + FILES_PER_TASK, len(files)))
        for start in range(0, len(files), FILES_PER_TASK)
    ]
    # Threads, not processes: Pillow decodes and resizes outside the interpreter's lock, and a
    # process that has started CUDA cannot be forked.
    with (
        progress(total=len(files), desc=title, unit="img") as bar,
        ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool,
    ):
        for done in pool.map(work, tasks):
            bar.update(done)
    return images, dict(sorted(bad.items()))


def _reason(error: BaseException) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    return reason_of(error)


def _describe(root: Path, name: str, bad: dict[int, str], files: list[ImageFile]) -> str:
    named = [f"{os.path.relpath(files[i].path, root)} ({reason})" for i, reason in bad.items()]
    count = f"{len(bad)} of {len(files)} files of {root.name}/{name} cannot be read"
    return f"{root}: {count}: {first_of(named)}"


def first_of(names: list[str]) -> str:
    """The first three of `names`, and how many there are more."""
    more = [f"and {len(names) - 3:,} more"] if len(names) > 3 else []
    return ", ".join(names[:3] + more)


def _can_be_read(path: str, shape: Shape) -> bool:
    try:
        decode(path, shape)
    except UnreadableImage:
        return False
    return True


def _load(
    cache: Path, key: str, files: list[ImageFile], shape: Shape
) -> tuple[np.ndarray, dict[int, str]] | None:
    """The stored array and {index: reason} of what was left out of it, or None; None also if one
    of those can be read now, as when a drive that had failed is back."""
    record = load_json(cache / f"{key}.json", {"bad": {str: str}})
    if record is None:
        return None
    bad = {int(i): reason for i, reason in record["bad"].items() if i.isdecimal()}
    if any(_can_be_read(files[i].path, shape) for i in bad if i < len(files)):
        return None
    stored_shape = (len(files) - len(bad), *shape)
    images = load_array(
        cache / f"{key}.npy", lambda a: a.shape == stored_shape and a.dtype == np.uint8
    )
    return None if images is None else (images, bad)


def _store(cache: Path, key: str, images: np.ndarray, bad: dict[int, str]) -> np.ndarray:
    """Writes the array, then the note that makes it count; drops those it replaces.

    Returns the memory-mapped array, or `images` itself where nothing can be written.
    """
    try:
        save_array(cache / f"{key}.npy", images)
        write_json(cache / f"{key}.json", {"bad": bad})
    except UserError as error:
        log.warning("the decoded images are used from memory, not kept: %s", error)
        return images
    family = key.rpartition("-")[0]
    for old in cache.glob(f"{family}-*"):
        if not old.name.startswith(key):
            with contextlib.suppress(OSError):  # another process is as welcome to remove it
                old.unlink()
    kept = load_array(cache / f"{key}.npy", lambda array: array.shape == images.shape)
    return images if kept is None else kept
