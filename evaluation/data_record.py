"""What a model was trained on, as its checkpoint remembers it, beside what lies there now."""

import hashlib
from pathlib import Path

import numpy as np

from checkpoint import TrainedModel
from datasets import Dataset
from readers.image_files import first_of
from support.errors import UserError
from utils import log, note_once

SAMPLE = 1000  # images whose pixels are read: all of a large memory map would take minutes


def data_record(dataset: Dataset) -> dict:
    """The number and shape of the images, the names of the classes, and short hashes of all labels
    and of the pixels of SAMPLE images, spread evenly. Its form is `checkpoint.DATA`.

    So a count, a class or an order that changes is always noticed, but of more than SAMPLE images
    a single one may be replaced unseen.
    """
    spread = np.linspace(0, len(dataset) - 1, min(len(dataset), SAMPLE)).astype(np.int64)
    labels = hashlib.sha256(np.ascontiguousarray(dataset.labels))
    return {
        "dataset": dataset.name,
        "images": len(dataset),
        "shape": list(dataset.images.shape[1:]),
        "classes": list(dataset.class_names),
        "labels": labels.hexdigest()[:16],
        "pixels": dataset.take(spread).fingerprint(),
    }


def refuse_other_data(path: Path, before: dict | None, now: dict, allowed: bool) -> None:
    """Raises UserError with the differences between two `data_record`s, the one in the checkpoint
    `path` and that of the data there is; if `allowed`, they are noted.

    A checkpoint of before there were records, with None, is of any data.
    """
    found = _differences(before, now)
    if found and not allowed:
        lines = "\n  ".join(found)
        raise UserError(
            f"{path} was trained on other data than there is now:\n  {lines}\nput the data back, "
            "or go on with what there is (--allow_changed_data), or start anew (--restart)"
        )
    if found:
        log.warning("note: the data of %s has changed: %s", path, "; ".join(found))


def note_other_data(model: TrainedModel, dataset: Dataset) -> None:
    """Says where a model was trained on other images or classes than are read for it now, if it
    was trained on the dataset of this name."""
    before = model.about.get("data")
    if before is None or before["dataset"] != dataset.name:
        return
    found = _differences(before, data_record(dataset))
    if dataset.split != "train":  # of test, the record says only what it has in common with train
        found = _of_classes(before["classes"], dataset.class_names)
    if found:
        note_once(
            f"note: since {model.path} was trained, {dataset.name} has changed "
            f"({dataset.split}: {'; '.join(found)}); this is of what there is now"
        )


def _differences(before: dict | None, now: dict) -> list[str]:
    """In words, the coarsest first; what follows from others is left out."""
    if before is None:
        return []
    found = [
        f"{name}: {now[key]}, not {before[key]}"
        for key, name in (("dataset", "dataset"), ("images", "images"), ("shape", "their shape"))
        if now[key] != before[key]
    ]
    found += _of_classes(before["classes"], now["classes"])
    if not found and now["labels"] != before["labels"]:
        found.append("the images of the classes: other numbers of them, or in another order")
    if not found and now["pixels"] != before["pixels"]:
        found.append("pixels: other ones, in as many images")
    return found


def _of_classes(before: list[str], now: list[str]) -> list[str]:
    if before == now:
        return []
    if len(before) != len(now):
        return [f"classes: {len(now)}, not {len(before)}"]
    changed = [
        f"{i} is {a}, not {b}" for i, (a, b) in enumerate(zip(now, before, strict=True)) if a != b
    ]
    return [f"classes: {first_of(changed)}"]
