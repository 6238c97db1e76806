"""A folder of samples: pngs/<i>.png, grid.png, and samples.json, which says what made them."""

import math
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import torch

from checkpoint import TrainedModel
from evaluation.samples.grids import load_png, rows_by_class, save_image_grid
from sampling import SamplerSettings, classes_of, labels_of
from support.errors import UserError
from support.files import read_json, remove_leftovers, write_json
from utils import log

GRID_IMAGES = 100  # at most so many in grid.png


def finish(folder: Path, description: dict, settings: SamplerSettings, model: TrainedModel) -> None:
    """Writes samples.json, and the grid of the set's first images: a row for each class.

    The set is of the images without a gap, however many the last call asked for.
    """
    there = images_there(folder)
    n = next(i for i in count() if i not in there)
    images = torch.stack([load_png(png(folder, i)) for i in range(min(n, GRID_IMAGES))])
    # between the images, over pixels: near 0 when all look the same
    variance = images.float().div(127.5).var(dim=0, correction=0).mean().item()
    facts = {"n": n, "pixel_variance": round(variance, 5)}
    if model.denoiser.classes and "data" in model.about:
        facts["class_names"] = model.about["data"]["classes"]
    write_json(folder / "samples.json", description | facts)
    y = labels_of(model.denoiser, settings, list(range(len(images))))
    ordered, columns = rows_by_class(images, y)
    save_image_grid(folder / "grid.png", ordered, columns or math.ceil(math.sqrt(len(images))))


def describe(model: TrainedModel, settings: SamplerSettings, use_amp: bool) -> dict:
    """Everything that decides what the images look like."""
    return {
        "checkpoint": str(model.path),
        "epoch": model.epoch,
        "weights": model.fingerprint(),
        "input_scale": model.input_scale,
        "dataset": model.config.dataset,
        "seed": model.config.seed,
        "sampler": settings.sampler,
        "steps": settings.steps,
        "eta": settings.eta,
        "spacing": settings.spacing,
        "sigma_max": settings.sigma_max,
        "clip": settings.clip,
        "guidance": settings.guidance,
        "classes": classes_of(model.denoiser, settings),
        "use_amp": use_amp,
    }


def earlier_set(folder: Path, description: dict) -> dict:
    """The samples.json of an earlier call, {} if none. Raises UserError if it drew other images."""
    path = folder / "samples.json"
    if not path.exists():
        if any((folder / "pngs").glob("*.png")):
            raise UserError(
                f"{folder}/pngs holds images but no samples.json says what made them: "
                "move them away, or choose another --output_dir"
            )
        return {}
    advice = "move the folder away, or choose another --output_dir"
    earlier = read_json(path, {"n": int}, advice)
    refuse_others(f"{folder} holds images", earlier, description)
    return earlier


def refuse_others(what: str, earlier: dict, description: dict) -> None:
    """Raises UserError, beginning with `what`, if a record of `earlier` images differs from the
    `description` of others (see `describe`) in more than the checkpoint's path."""
    differences = [
        f"  {key}: {value}, not {earlier.get(key)}"
        for key, value in description.items()
        if key != "checkpoint" and earlier.get(key) != value
    ]
    if differences:
        raise UserError(
            f"{what} made in another way:\n"
            + "\n".join(differences)
            + "\nmove them away, or choose another --output_dir"
        )


def remove_damaged(folder: Path) -> None:
    """Removes, with a note, the images of a set that cannot be read, as a power cut leaves them:
    they are drawn anew. Also what killed calls left half-written."""
    pngs = folder / "pngs"
    if not pngs.is_dir():
        return
    remove_leftovers(pngs)
    numbered = (path for path in pngs.glob("*.png") if path.stem.isdecimal())
    damaged = [path for path in numbered if not _is_whole(path)]
    for path in damaged:
        path.unlink()
    if damaged:
        log.warning("%s: %d images are damaged and are drawn anew", pngs, len(damaged))


def _is_whole(path: Path) -> bool:
    try:
        load_png(path)
    except UserError:
        return False
    return True


def png(folder: Path, index: int) -> Path:
    """The path of the image with this index in a set's folder."""
    return folder / "pngs" / f"{index}.png"


def images_there(folder: Path) -> set[int]:
    """The indices of a set's PNGs."""
    return {int(path.stem) for path in (folder / "pngs").glob("*.png") if path.stem.isdecimal()}


def missing_images(folder: Path, n: int) -> Sequence[int]:
    """The indices below n that have no PNG yet, ascending.

    It is a range where all of them are at the end: n may be more than a list can hold.
    """
    there = images_there(folder)
    end = min(max(there, default=-1) + 1, n)
    holes = [i for i in range(end) if i not in there]
    return [*holes, *range(end, n)] if holes else range(end, n)
