"""The linear probe: heads on frozen features, compared on images that they have not seen.

Every cell gets two heads. One is fitted on 90 % of train and scored on the other 10 %: that
comparison picks the best cell. The other is fitted on all of train and scored on test; the best
cell's is the headline. Both are fitted in the same pass, so picking honestly costs nothing, and
the headline's refit is the second head of the cell that was picked.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Collection
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config.schema import Linear
from datasets import Dataset
from evaluation.probe.features import Cell, Extractor, FeatureSource, save_features
from evaluation.probe.heads import fit_logistic
from evaluation.probe.knn import knn_accuracies
from evaluation.probe.paper_protocol import fit_paper
from support import distributed
from support.errors import UserError
from support.files import read_json, short_hash, write_json
from utils import log, permutation, progress

# (x, y, x_new, y_new, n_classes) -> {k: accuracy on x_new of what x teaches}, k None but for k-NN
Score = Callable[[Tensor, Tensor, Tensor, Tensor, int], dict[int | None, float]]


@dataclass(frozen=True)
class ProbedCell:
    """Which features, read how. `level` and `row` are its names in tables and figures."""

    t: float
    block: str
    _: KW_ONLY
    k: int | None = None  # neighbours of k-NN; None: a linear head
    sigma: float | None = None  # the noise level of t; None: no noise
    by_sigma: bool = False  # whether sigma, not t, was asked for

    @property
    def level(self) -> str:
        return f"sigma={self.sigma:g}" if self.by_sigma else f"t={self.t:g}"

    @property
    def row(self) -> str:
        return self.block if self.k is None else f"{self.block}, k={self.k}"

    @property
    def name(self) -> str:
        return f"{self.block} at {self.level}" + ("" if self.k is None else f", k={self.k}")


@dataclass(frozen=True)
class CellResult(ProbedCell):
    """Accuracies are in 0..1; `validation_accuracy` is on the held-out 10 % of train."""

    width: int
    validation_accuracy: float
    test_accuracy: float
    test_interval: tuple[float, float]  # 95 %


@dataclass(frozen=True)
class Outcome:
    """What one probe found, and what it cost."""

    results: list[CellResult]
    seconds: float
    images_per_s: float | None  # of the forward passes; None: all features were there


@dataclass(frozen=True)
class Probe:
    """A probe with all its settings but the features' source and the seed: call it with these.

    The seed decides the noise on the images and, in the paper's protocol, how heads start and how
    the data is ordered and augmented. `folder` keeps features and unfinished fits.
    """

    protocol: str  # "paper", or one of SCORES
    train: Dataset
    test: Dataset
    timesteps: list[float]
    blocks: list[str]
    by_sigma: bool
    recipe: Linear
    flip: bool
    device: torch.device
    batch_size: int
    folder: Path

    @property
    def kind(self) -> str:
        return "k-NN" if self.protocol == "knn" else "linear"

    @property
    def features_folder(self) -> Path:
        return self.folder / "features"

    def first_cell(self, source: FeatureSource) -> ProbedCell:
        t = self.timesteps[0]
        return ProbedCell(t, self.blocks[0], sigma=source.sigma(t), by_sigma=self.by_sigma)

    def facts(self) -> dict:
        """What the files of results say of the probe."""
        return {
            "protocol": self.protocol,
            "n_train": len(self.train),
            "n_validation": int(holdout(self.train.labels).sum()),
            "n_test": len(self.test),
            "device": self.device.type,
        }

    def extractor(self, source: FeatureSource, seed: int) -> Extractor:
        """Keeps the features of a network, not those that take no time."""
        folder = None if source.denoiser is None else self.features_folder
        return Extractor(source, self.device, seed, self.batch_size, folder)

    def save_features(self, source: FeatureSource, seed: int, path: Path) -> None:
        """Writes the features of all cells of train and test, see `features.save_features`."""
        extractor, datasets = self.extractor(source, seed), [self.train, self.test]
        features = [extractor(dataset, self.timesteps, self.blocks) for dataset in datasets]
        if distributed.is_main():
            save_features(path, datasets, features)

    def __call__(self, source: FeatureSource, seed: int) -> Outcome:
        extractor = self.extractor(source, seed)
        arguments = (extractor, self.train, self.test, self.timesteps, self.blocks)
        start = time.perf_counter()
        if self.protocol == "paper":
            results = probe_paper(*arguments, self.recipe, self.flip, self.folder)
        else:
            results = probe_cached(*arguments, SCORES[self.protocol])
        results = [dataclasses.replace(result, by_sigma=self.by_sigma) for result in results]
        return Outcome(results, time.perf_counter() - start, extractor.images_per_s)

    def kept(self, source: FeatureSource, seed: int) -> Outcome:
        """Like calling it, but what was found is kept in <folder>/probes and not probed again."""
        r = self.recipe
        fit = [r.n_epoch, r.batch_size, r.lrate, self.flip, self.device.type]
        settings = {
            "protocol": self.protocol,
            "source": source.fingerprint,
            "data": [self.train.fingerprint(), self.test.fingerprint()],
            "cells": [self.timesteps, self.blocks, self.by_sigma],
            "seed": seed,
            "fit": fit if self.protocol == "paper" else None,
        }
        path = self.folder / "probes" / f"{short_hash(settings)}.json"
        is_there = path.is_file()
        distributed.barrier()  # every rank has looked before one can write
        if is_there:
            log.info(f"probed before: {path}")
            kept = read_json(path)
            results = [
                CellResult(**cell | {"test_interval": tuple(cell["test_interval"])})
                for cell in kept["results"]
            ]
            return Outcome(results, kept["seconds"], kept["images_per_s"])
        outcome = self(source, seed)
        if distributed.is_main():
            write_json(path, {"settings": settings, **asdict(outcome)})
        return outcome


def probe_paper(
    extractor: Extractor,
    train: Dataset,
    test: Dataset,
    timesteps: Collection[float],
    blocks: Collection[str],
    recipe: Linear,
    flip: bool,
    folder: Path,
) -> list[CellResult]:
    """Heads fitted as in the reference, see `fit_paper`; an unfinished fit is kept in `folder`."""
    held = holdout(train.labels)
    heads = fit_paper(extractor, train, held, timesteps, blocks, recipe, flip, folder)
    held_out = dataclasses.replace(train.take(held), split="held-out")
    held_features = extractor(held_out, timesteps, blocks)
    test_features = extractor(test, timesteps, blocks)
    on = extractor.device
    y_held, y_test = _tensor(held_out.labels, on), _tensor(test.labels, on)
    results = []
    for cell, features in test_features.items():
        part, whole = heads[cell]
        validation = part.accuracy(_tensor(held_features[cell], on), y_held)
        accuracy = whole.accuracy(_tensor(features, on), y_test)
        results.append(_result(extractor, cell, features, validation, accuracy))
    return results


def logistic_accuracy(
    x: Tensor, y: Tensor, x_new: Tensor, y_new: Tensor, n_classes: int
) -> dict[int | None, float]:
    """{None: accuracy on x_new: (M, D) of the head that is at its optimum on x: (N, D)}."""
    return {None: fit_logistic(x, y, n_classes).accuracy(x_new, y_new)}


SCORES: dict[str, Score] = {"cached": logistic_accuracy, "knn": knn_accuracies}
PROTOCOLS = ("paper", *SCORES)


def probe_cached(
    extractor: Extractor,
    train: Dataset,
    test: Dataset,
    timesteps: Collection[float],
    blocks: Collection[str],
    score: Score = logistic_accuracy,
) -> list[CellResult]:
    """Each image's features once, without augmentation; what `score` then reads from them."""
    train_features = extractor(train, timesteps, blocks)
    test_features = extractor(test, timesteps, blocks)
    # the fit is partly in float64, which MPS lacks
    on = extractor.device if extractor.device.type == "cuda" else torch.device("cpu")
    held = _tensor(holdout(train.labels), on)
    y, y_test = _tensor(train.labels, on), _tensor(test.labels, on)
    n_classes = len(train.class_names)
    results = []
    for cell, features in progress(test_features.items(), "cells", unit="cell", disable=None):
        x = _tensor(train_features[cell], on)
        validation = score(x[~held], y[~held], x[held], y[held], n_classes)
        accuracy = score(x, y, _tensor(features, on), y_test, n_classes)
        results += [
            _result(extractor, cell, features, validation[k], accuracy[k], k) for k in validation
        ]
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
        order = permutation(len(index), "holdout", int(label))
        n_held = min(max(1, round(0.1 * len(index))), len(index) - 1)
        held[index[order[:n_held]]] = True
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
    extractor: Extractor,
    cell: Cell,
    test_features: np.ndarray,
    validation: float,
    accuracy: float,
    k: int | None = None,
) -> CellResult:
    n, width = test_features.shape
    interval = wilson_interval(accuracy, n)
    sigma = extractor.source.sigma(cell[0])
    return CellResult(*cell, width, validation, accuracy, interval, k=k, sigma=sigma)


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(array)).to(device)  # a copy: torch wants it writable
