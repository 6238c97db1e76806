"""Alignment and uniformity of features on the unit sphere (Wang & Isola 2020, arXiv 2005.10242).

Contrastive learning asks two things of unit vectors: that two views of an image lie together, and
that the images spread over the sphere. Here a view is an image with its own noise of timestep t,
and the network was never asked for either. Alignment is taken over each image's two views,
uniformity over all pairs of different images in a view: neither knows of batches or processes.
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from datasets import Dataset
from evaluation.plots import curve_panels
from evaluation.probe.features import Extractor, FeatureSource
from evaluation.tables import aligned
from support.files import read_json
from utils import derive_seed, float64_device

POTENTIAL_T = 2.0  # t of the Gaussian potential, the paper's choice
LABELS = {
    "alignment": "alignment: mean |x - y|² of two noisy views",
    "uniformity": f"uniformity: log mean exp(-{POTENTIAL_T:g} |x - y|²) of all pairs",
}
METRICS = tuple(LABELS)
MEASURED = {  # the form of contrastive.json, as far as it is read
    "measurements": [{"epoch": int, **{metric: {str: int | float} for metric in METRICS}}],
}
ROWS = 1000  # of the matrix of all pairs, held in memory at a time


def on_sphere(features: np.ndarray, device: torch.device) -> Tensor:
    """(N, C) -> (N, C) float64, each row divided by its length; not centred, as in the paper."""
    return F.normalize(torch.from_numpy(np.array(features)).to(device, torch.float64))


def alignment(x: Tensor, y: Tensor) -> float:
    """E |x - y|^2 of two views x, y: (N, C) on the sphere, in 0..4: with the exponent alpha = 2.

    0: the noise changes nothing; 2: the views have nothing in common.
    """
    return (x - y).square().sum(dim=1).mean().item()


def uniformity(x: Tensor) -> float:
    """log E exp(-t |x_i - x_j|^2) over all pairs i < j of x: (N, C) on the sphere, N >= 2.

    In -4 t..0; 0: all features are one point; about -2 t: they spread over many dimensions.
    """
    n = len(x)
    total = 0.0
    for start in range(0, n, ROWS):
        cosine = x[start : start + ROWS] @ x[start:].T
        potential = cosine.sub_(1).mul_(2 * POTENTIAL_T).exp_()  # |x_i - x_j|^2 = 2 - 2 cosine
        total += potential.triu_(diagonal=1).sum().item()
    return float(np.log(total / (n * (n - 1) / 2)))


def measure(
    source: FeatureSource,
    dataset: Dataset,
    t: int,
    blocks: Collection[str],
    device: torch.device,
    seed: int,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """{metric: {block: value}} for both METRICS, of all images of `dataset` at timestep t.

    The noise of a view depends on (seed, view, split, t) and the image's place in `dataset`.
    Uniformity is the mean of that of the two views.
    """
    views = [
        Extractor(source, device, derive_seed(seed, "view", view), batch_size)(dataset, [t], blocks)
        for view in (0, 1)
    ]
    on = float64_device(device)
    values: dict[str, dict[str, float]] = {metric: {} for metric in METRICS}
    for block in blocks:
        x, y = (on_sphere(view[t, block], on) for view in views)
        values["alignment"][block] = alignment(x, y)
        values["uniformity"][block] = (uniformity(x) + uniformity(y)) / 2
    return values


def kept_rows(path: Path) -> list[dict]:
    """The measurements of earlier calls. Raises UserError if the file is damaged, or another's."""
    if not path.exists():
        return []
    found = read_json(path, MEASURED)
    once = {"config": found["config"]} if "config" in found else {}  # older files have one for all
    return [once | row for row in found["measurements"]]


def table(rows: list[dict], metric: str, blocks: list[str]) -> str:
    """Epoch x block."""
    body = [[str(row["epoch"]), *(f"{row[metric][block]:.5f}" for block in blocks)] for row in rows]
    return aligned([["epoch", *blocks], *body])


def figure(path: Path, rows: list[dict], blocks: list[str], title: str) -> None:
    """Both metrics over the epochs, one line per block.

    Raises UserError if `path` cannot be written.
    """
    panels = {
        LABELS[metric]: {block: [row[metric][block] for row in rows] for block in blocks}
        for metric in METRICS
    }
    curve_panels(path, [row["epoch"] for row in rows], panels, title, "epoch")
