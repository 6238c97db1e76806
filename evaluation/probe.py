"""The linear probe: heads on frozen features, compared on images that they have not seen.

Every cell gets two heads. One is fitted on 90 % of train and scored on the other 10 %: that
comparison picks the best cell. The other is fitted on all of train and scored on test; the best
cell's is the headline. Both are fitted in the same pass, so picking honestly costs nothing, and
the headline's refit is the second head of the cell that was picked.
"""

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config.schema import Linear
from datasets import Dataset
from errors import UserError
from evaluation.features import Cell, Extractor
from evaluation.heads import Head, fit_logistic
from evaluation.paper_protocol import fit_paper
from utils import generator


@dataclass(frozen=True)
class CellResult:
    """Accuracies are in 0..1; `validation_accuracy` is on the held-out 10 % of train."""

    t: int
    block: str
    width: int
    validation_accuracy: float
    test_accuracy: float
    test_interval: tuple[float, float]  # 95 %


def probe_paper(
    extractor: Extractor,
    train: Dataset,
    test: Dataset,
    timesteps: Collection[int],
    blocks: Collection[str],
    recipe: Linear,
    flip: bool,
    folder: Path,
) -> list[CellResult]:
    """Heads fitted as in the reference, see `fit_paper`; an unfinished fit is kept in `folder`."""
    held = holdout(train.labels)
    heads = fit_paper(extractor, train, held, timesteps, blocks, recipe, flip, folder)
    held_out = dataclasses.replace(
        train, split="held-out", images=train.images[held], labels=train.labels[held]
    )
    held_features = extractor(held_out, timesteps, blocks)
    test_features = extractor(test, timesteps, blocks)
    on = extractor.device
    y_held, y_test = _tensor(held_out.labels, on), _tensor(test.labels, on)
    results = []
    for cell in test_features:
        part, whole = heads[cell]
        validation = part.accuracy(_tensor(held_features[cell], on), y_held)
        results.append(_result(cell, validation, whole, _tensor(test_features[cell], on), y_test))
    return results


def probe_cached(
    extractor: Extractor,
    train: Dataset,
    test: Dataset,
    timesteps: Collection[int],
    blocks: Collection[str],
) -> list[CellResult]:
    """Each image's features once, without augmentation; heads at their optimum by L-BFGS."""
    train_features = extractor(train, timesteps, blocks)
    test_features = extractor(test, timesteps, blocks)
    # the fit is partly in float64, which MPS lacks
    on = extractor.device if extractor.device.type == "cuda" else torch.device("cpu")
    held = _tensor(holdout(train.labels), on)
    y, y_test = _tensor(train.labels, on), _tensor(test.labels, on)
    n_classes = len(train.class_names)
    results = []
    for cell in tqdm(train_features, "heads", unit="cell", disable=None):
        x = _tensor(train_features[cell], on)
        part = fit_logistic(x[~held], y[~held], n_classes)
        whole = fit_logistic(x, y, n_classes)
        validation = part.accuracy(x[held], y[held])
        results.append(_result(cell, validation, whole, _tensor(test_features[cell], on), y_test))
    return results


def best(results: list[CellResult]) -> CellResult:
    """The cell with the highest validation accuracy; of equal ones the first."""
    return max(results, key=lambda result: result.validation_accuracy)


def best_on_test(results: list[CellResult]) -> CellResult:
    """The cell with the highest test accuracy: an optimistic choice, as in published tables."""
    return max(results, key=lambda result: result.test_accuracy)


def holdout(labels: np.ndarray) -> np.ndarray:
    """(N,) bool: the 10 % of each class on which cells are compared.

    It depends on the labels alone, so it is the same for every seed and every model. Raises
    UserError if no class has two images.
    """
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        index = np.flatnonzero(labels == label)
        order = torch.randperm(len(index), generator=generator("cpu", "holdout", int(label)))
        n_held = min(max(1, round(0.1 * len(index))), len(index) - 1)
        held[index[order[:n_held].numpy()]] = True
    if not held.any():
        raise UserError("train: no class has two images, so none can be held out to pick a cell")
    return held


def wilson_interval(accuracy: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a binomial proportion measured on n images (Wilson 1927)."""
    z = 1.959964
    centre = (accuracy + z**2 / (2 * n)) / (1 + z**2 / n)
    spread = z * math.sqrt(accuracy * (1 - accuracy) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return max(0.0, centre - spread), min(1.0, centre + spread)


def _result(
    cell: Cell, validation: float, head: Head, x_test: Tensor, y_test: Tensor
) -> CellResult:
    accuracy = head.accuracy(x_test, y_test)
    interval = wilson_interval(accuracy, len(y_test))
    return CellResult(*cell, x_test.shape[1], validation, accuracy, interval)


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(array)).to(device)  # a copy: torch wants it writable
