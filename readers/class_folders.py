"""Class folders of images, <root>/{train,test}/<class>/<file> -> uint8 arrays."""

import os
from pathlib import Path

import numpy as np

from readers.image_files import Shape, first_of, list_folder, read_images
from support.errors import UserError
from utils import note_once

SPLITS = ("train", "test")
NEAR_MISSES = {  # what the folder of a split is called elsewhere, in any case of letters
    "train": ("train", "training"),
    "test": ("test", "testing", "val", "valid", "validation", "eval"),
}


def read_class_folders(
    root: Path, split: str, shape: Shape, skip_bad_images: bool
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Reads `root/<split>/<class>/*`.

    Returns images (N, *shape) uint8, labels (N,) int64 and the names of the classes in alphabetical
    order, which train and test share. Raises UserError if a folder or its images are not there, or,
    unless `skip_bad_images`, an image cannot be read.
    """
    class_names = _class_names(root)
    beside = list_folder(root / split)
    left_out = [*(os.path.basename(file.path) for file in beside.files), *beside.special]
    files, labels = [], []
    for label, class_name in enumerate(class_names):
        found = list_folder(root / split / class_name)
        if not found.files:
            raise UserError(f"{root / split / class_name}: no images: fill or remove this class")
        files += found.files
        labels += [label] * len(found.files)
        left_out += [f"{class_name}/{name}" for name in [*found.folders, *found.special]]
    if left_out:
        note_once(
            f"{root / split}: left out, because images are read as <class>/<file> only: "
            f"{first_of(left_out)}"
        )
    images, kept = read_images(root, split, files, shape, skip_bad_images)
    return images, np.array(labels, dtype=np.int64)[kept], class_names


def _class_names(root: Path) -> list[str]:
    """The class folders, which train and test must share."""
    names = {}
    for split in SPLITS:
        folder = root / split
        names[split] = list_folder(folder).folders if folder.is_dir() else []
        if not names[split]:
            expected = near_miss(root, split) or f"expected {folder}/<class>/<image files>"
            raise UserError(f"{folder}: no class folders: {expected}")
    for split, other in (SPLITS, SPLITS[::-1]):
        extra = sorted(set(names[split]) - set(names[other]))
        if extra:
            raise UserError(
                f"{root / split}: {', '.join(extra[:5])}: not among the class folders of {other}: "
                "train and test must have the same classes"
            )
    return names["train"]


def near_miss(root: Path, split: str) -> str | None:
    """Advice to rename a folder, if the split stands under another name; None without."""
    if (root / split).is_dir() or not root.is_dir():
        return None
    for name in list_folder(root).folders:
        if name.lower() in NEAR_MISSES[split]:
            return f"there is {root / name}: rename it to {split}"
    return None
