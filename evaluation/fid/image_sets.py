"""Sets of images as FID reads and writes them: a folder, or an .npz archive."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from readers.image_files import UNREADABLE
from support.errors import UserError
from utils import progress


def read_images(path: str | Path) -> np.ndarray:
    """The images of a folder or of an .npz, all of one size: (N, C, H, W) uint8, C 1 or 3.

    Raises UserError that names what is missing, damaged or of another size.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise UserError(f"{path}: no such folder or .npz file of images")
    if path.suffix.lower() != ".npz":
        raise UserError(f"{path}: expected a folder of images or an .npz file")
    return _read_npz(path)


def _read_folder(folder: Path) -> np.ndarray:
    Image.init()
    readable = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in readable)
    if not files:
        folders = sorted(f"{folder / sub.name}" for sub in folder.iterdir() if sub.is_dir())
        hint = f"; did you mean {folders[0]}?" if folders else ""
        raise UserError(f"{folder}: no images here{hint}")
    images = None
    for i, file in enumerate(progress(files, desc="reading", unit="image")):
        image = _read_image(file)
        if images is None:
            images = np.empty((len(files), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            raise UserError(
                f"{file}: {_size(image)}, but {files[0].name} is {_size(images[0])}: "
                "FID needs images of one size"
            )
        images[i] = image
    return images.transpose(0, 3, 1, 2)


def _read_image(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except UNREADABLE as error:
        raise UserError(f"{file}: cannot be read as an image ({error}); remove it") from None


def _size(image: np.ndarray) -> str:
    return f"{image.shape[0]}x{image.shape[1]}"


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
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
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


def export_images(images: np.ndarray, folder: str | Path) -> None:
    """Writes images, (N, C, H, W) uint8, C 1 or 3, as <folder>/<index>.png.

    Raises UserError if the folder holds anything, so that no two sets mix.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: not an empty folder; name another, or delete it first")
    folder.mkdir(parents=True, exist_ok=True)
    digits = len(str(len(images) - 1))
    for i, image in enumerate(progress(images, desc="writing", unit="image")):
        pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        Image.fromarray(pixels).save(folder / f"{i:0{digits}d}.png")
