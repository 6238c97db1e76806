"""The training images that are nearest to samples: the usual look for memorisation."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from checkpoint import TrainedModel
from datasets import Dataset, to_model_range
from evaluation.encoded import encoded
from evaluation.plots import image_table, subject
from evaluation.probe.features import Extractor, model_source
from evaluation.probe.grid_files import find_grid
from support import distributed
from support.files import write_json

NEAREST = 4
CHUNK = 4096  # training images compared at once


def nearest(views: Tensor, train: Iterable[Tensor], k: int = NEAREST) -> tuple[Tensor, Tensor]:
    """views: (V, M, D), train: parts (n, D) of all rows -> the k smallest Euclidean distances of
    the nearer view and the rows that have them, (M, k) each; fewer if there are fewer rows."""
    distances, rows, start = [], [], 0
    for part in train:
        apart = torch.cdist(views, part, compute_mode="donot_use_mm_for_euclid_dist")  # exact
        apart = apart.amin(dim=0)
        d, i = apart.topk(min(k, len(part)), largest=False)
        distances.append(d)
        rows.append(i + start)
        start += len(part)
    d, order = torch.cat(distances, dim=1).topk(min(k, start), largest=False)
    return d, torch.cat(rows, dim=1).gather(1, order)


def save_neighbours(
    path: Path, samples: Tensor, train: Dataset, model: TrainedModel, use_amp: bool
) -> None:
    """Shows each of samples, (M, C, H, W) uint8, beside its nearest images of `train`, in pixels
    and in the features of the best block; the same as JSON, with the distances.

    The block is the best of this model's grid in the run's folder, else the config's, else, where
    the network has none of that name, the middle one. Where training flips images, a mirrored
    sample counts as the sample. Raises UserError if a grid is damaged.
    """
    config = model.config
    device = model.denoiser.device
    source = model_source(model, use_amp)
    names, block = source.block_names, config.linear.blockname
    t, block = config.linear.timestep, block if block in names else names[len(names) // 2]
    if found := find_grid(Path(config.save_dir), model):
        t, block = found[1].cell.parts[0]
    source.check([t], [block])
    folder = Path(config.save_dir) / "features"
    kept = Extractor(source, device, config.seed, folder=folder)

    def seen(dataset: Dataset) -> Dataset:
        return encoded(dataset, model.denoiser, folder)

    views = _views(samples, config.flip)
    n_views, n = views.shape[:2]
    drawn = Dataset(
        train.name, "samples", views.flatten(0, 1).numpy(), np.zeros(n_views * n, np.int64),
        train.class_names,
    )  # fmt: skip
    features = {
        "train": kept(seen(train), [t], [block])[t, block],
        "samples": Extractor(source, device, config.seed)(seen(drawn), [t], [block])[t, block],
    }
    if not distributed.is_main():
        return
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in features.items()}
    unit = {name: F.normalize(value, dim=1) for name, value in tensors.items()}
    images = torch.from_numpy(np.array(train.images)).expand(-1, samples.shape[1], -1, -1)
    size = images.shape[2:]  # a model may draw another
    samples = F.interpolate(samples, size, mode="bilinear", antialias=True)
    pixels = (to_model_range(part).flatten(1) for part in images.split(CHUNK))
    found = {
        "pixels": nearest(to_model_range(_views(samples, config.flip)).flatten(2), pixels),
        "features": nearest(unit["samples"].unflatten(0, (n_views, n)), unit["train"].split(CHUNK)),
    }
    columns = [samples[:, None], *(images[rows] for _, rows in found.values())]
    shown = range(min(NEAREST, len(train)))
    titles = ["sample", *(f"{name} {i + 1}" for name in found for i in shown)]
    what = f"{subject(train.name, config.model_type)}, {model.stage}: nearest training images"
    what += f", features of {block}, t={t}"
    image_table(path, torch.cat(columns, dim=1), titles, what)
    record = {
        name: {"distances": d.tolist(), "indices": rows.tolist()}
        for name, (d, rows) in found.items()
    }
    write_json(path.with_suffix(".json"), {"t": t, "block": block, **record})


def _views(samples: Tensor, flip: bool) -> Tensor:
    """(M, C, H, W) -> (V, M, C, H, W)."""
    return torch.stack([samples, samples.flip(-1)] if flip else [samples])
