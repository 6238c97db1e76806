"""Sets of images as FID reads and writes them: a folder, or an .npz archive."""

import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from evaluation.samples.grids import save_png
from readers.image_files import UnreadableImage, decode_at_own_size, list_folder
from support.errors import UserError
from support.files import DAMAGED, writing
from utils import log, progress


def read_images(path: str | Path) -> np.ndarray:
    """The images of a folder or of an .npz, all of one size: (N, C, H, W) uint8, C 1 or 3.

    Raises UserError that names what is missing, damaged or of another size.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise UserError(f"{path}: no such folder or .npz file of images")
    if path.suffix.lower() != ".npz":
        raise UserError(f"{path}: expected a folder of images or an .npz file")
    return _read_npz(path)


def _read_folder(folder: Path) -> np.ndarray:
    Image.init()
    readable = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    listing = list_folder(folder)
    files = [file.path for file in listing.files if Path(file.path).suffix.lower() in readable]
    if not files:
        hint = f"; did you mean {folder / listing.folders[0]}?" if listing.folders else ""
        raise UserError(f"{folder}: no images here{hint}")
    images, others_differ = None, 0
    for i, file in enumerate(progress(files, desc="reading", unit="image")):
        try:
            image, as_others = decode_at_own_size(file)
        except UnreadableImage as error:
            raise UserError(f"{file}: cannot be read as an image ({error}); remove it") from None
        if images is None:
            images = np.empty((len(files), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            raise UserError(
                f"{file}: {_size(image)}, but {Path(files[0]).name} is {_size(images[0])}: "
                "FID needs images of one size"
            )
        images[i] = image
        others_differ += not as_others
    if others_differ:
        log.warning(
            f"{folder}: pytorch-fid would see other pixels in {others_differ:,} of {len(files):,} "
            "images: here transparency becomes white, 16 bits become 8, and a photo is turned "
            "upright, as in the datasets"
        )
    return images


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[2]}"


def _read_npz(path: Path) -> np.ndarray:
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not an .npz archive, or a truncated one")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = arrays.files
            name = "arr_0" if "arr_0" in names or len(names) != 1 else names[0]
            images = arrays[name]
    except KeyError:
        raise UserError(f"{path}: expected images in arr_0; it holds {', '.join(names)}") from None
    except DAMAGED as error:
        raise UserError(f"{path}: cannot be read as an .npz file ({error})") from None
    if images.dtype != np.uint8:
        raise UserError(f"{path}: {name} is {images.dtype}; expected uint8 images in 0..255")
    if images.ndim == 4 and len(images):
        if images.shape[3] in (1, 3):
            return images.transpose(0, 3, 1, 2)
        if images.shape[1] in (1, 3):
            return images
    raise UserError(
        f"{path}: {name} has shape {images.shape}; "
        "expected (N, H, W, C) or (N, C, H, W), with C 1 or 3"
    )


def refuse_contents(folder: str | Path) -> None:
    """Raises UserError for a folder that holds anything."""
    folder = Path(folder)
    with writing(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: not an empty folder; name another, or delete it first")


def export_images(images: np.ndarray, folder: str | Path) -> None:
    """Writes images, (N, C, H, W) uint8, C 1 or 3, as <folder>/<index>.png.

    Raises UserError if the folder holds anything, so that no two sets mix.
    """
    refuse_contents(folder)
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    digits = len(str(len(images) - 1))
    for i, image in enumerate(progress(images, desc="writing", unit="image")):
        save_png(folder / f"{i:0{digits}d}.png", torch.tensor(image), flush=False)


def score_file(samples: str | Path, output_dir: str | Path | None = None) -> Path:
    """Where the score of a set of images goes: fid_<name of the set>.json beside the set, or in
    `output_dir`.

    A set of sample.py, whose images are in pngs/, has the name of its folder after EMAgenerated_:
    fid_ep59_ddim_steps100_eta0.0.json.
    """
    samples = Path(samples).resolve()
    name = samples.stem if samples.is_file() else samples.name
    if name == "pngs":
        name = samples.parent.name.removeprefix("EMAgenerated_")
    return Path(output_dir or samples.parent) / f"fid_{name}.json"
