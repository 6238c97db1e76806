"""The linear probe: heads on frozen features, compared on images that they have not seen.

Every cell gets two heads. One is fitted on 90 % of train and scored on the other 10 %: that
comparison picks the best cell. The other is fitted on all of train and scored on test; the best
cell's is the headline. Both are fitted in the same pass, so picking honestly costs nothing, and
the headline's refit is the second head of the cell that was picked.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config.schema import Linear
from datasets import Dataset
from evaluation.probe.cells import (
    OUTCOME,
    Cell,
    CellResult,
    Outcome,
    side_by_side,
    timesteps_and_blocks,
)
from evaluation.probe.features import Extractor, FeatureSource, save_features
from evaluation.probe.heads import fit_logistic
from evaluation.probe.knn import check_neighbours, knn_accuracies
from evaluation.probe.paper_protocol import fit_paper
from evaluation.tables import wilson_interval
from support import distributed
from support.errors import UserError
from support.files import load_json, short_hash, write_json
from utils import float64_device, log, permutation, progress

# (x, y, x_new, y_new, n_classes) -> {k: accuracy on x_new of what x teaches}, k None but for k-NN
Score = Callable[[Tensor, Tensor, Tensor, Tensor, int], dict[int | None, float]]


@dataclass(frozen=True)
class Protocol:
    """How features are read: "paper", with its recipe and whether it flips, or one of SCORES."""

    name: str
    recipe: Linear
    flip: bool


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A probe with all its settings but the features' source and the seed: call it with these.

    The seed decides the noise on the images and, in the paper's protocol, how heads start and how
    the data is ordered and augmented. `folder` keeps features and unfinished fits.
    """

    train: Dataset
    test: Dataset
    cells: tuple[Cell, ...]
    protocol: Protocol
    device: torch.device
    batch_size: int
    folder: Path

    @property
    def kind(self) -> str:
        """The probe's name in titles."""
        return "k-NN" if self.protocol.name == "knn" else "linear"

    @property
    def features_folder(self) -> Path:
        """Where a network's features are kept."""
        return self.folder / "features"

    def facts(self) -> dict:
        """What the files of results say of the probe."""
        return {
            "protocol": self.protocol.name,
            "n_train": len(self.train),
            "n_validation": int(holdout(self.train.labels).sum()),
            "n_test": len(self.test),
            "data": [self.train.fingerprint(), self.test.fingerprint()],
            "device": self.device.type,
        }

    def extractor(self, source: FeatureSource, seed: int) -> Extractor:
        """Keeps the features of a network, not those that take no time."""
        folder = None if source.denoiser is None else self.features_folder
        return Extractor(source, self.device, seed, self.batch_size, folder)

    def save_features(self, source: FeatureSource, seed: int, path: Path) -> None:
        """Writes the features of all parts, of train and test, see `features.save_features`."""
        extractor, datasets = self.extractor(source, seed), [self.train, self.test]
        asked = timesteps_and_blocks(self.cells)
        features = [extractor(dataset, *asked) for dataset in datasets]
        if distributed.is_main():
            save_features(path, datasets, features)

    def __call__(self, source: FeatureSource, seed: int) -> Outcome:
        """Probes every cell of `source`."""
        extractor = self.extractor(source, seed)
        arguments = (extractor, self.train, self.test, self.cells)
        if self.protocol.name == "knn":
            check_neighbours(len(self.train) - int(holdout(self.train.labels).sum()))
        start = time.perf_counter()
        if self.protocol.name == "paper":
            results = probe_paper(*arguments, self.protocol, self.folder)
        else:
            results = probe_cached(*arguments, SCORES[self.protocol.name])
        return Outcome(results, time.perf_counter() - start, extractor.images_per_s)

    def kept(self, source: FeatureSource, seed: int) -> Outcome:
        """Like calling it, but what was found is kept in <folder>/probes and not probed again."""
        r = self.protocol.recipe
        fit = [r.n_epoch, r.batch_size, r.lrate, self.protocol.flip, self.device.type]
        names = ([cell.t for cell in self.cells], [cell.block for cell in self.cells])
        settings = {
            "protocol": self.protocol.name,
            "source": source.fingerprint,
            "data": self.facts()["data"],
            "cells": [*(list(dict.fromkeys(n)) for n in names), self.cells[0].by_sigma],
            "seed": seed,
            "fit": fit if self.protocol.name == "paper" else None,
        }
        path = self.folder / "probes" / f"{short_hash(settings)}.json"
        found = load_json(path, OUTCOME)
        distributed.barrier()  # every rank has looked before one can write
        if found is not None:
            log.info(f"probed before: {path}")
            return Outcome.from_record(found)
        outcome = self(source, seed)
        if distributed.is_main():
            write_json(path, {"settings": settings, **outcome.record()})
        return outcome


def probe_paper(
    extractor: Extractor,
    train: Dataset,
    test: Dataset,
    cells: Sequence[Cell],
    protocol: Protocol,
    folder: Path,
) -> list[CellResult]:
    """Heads fitted as in the reference, see `fit_paper`; an unfinished fit is kept in `folder`."""
    held = holdout(train.labels)
    heads = fit_paper(extractor, train, held, cells, protocol.recipe, protocol.flip, folder)
    held_out = dataclasses.replace(train.take(held), split="held-out")
    asked = timesteps_and_blocks(cells)
    held_features, test_features = (extractor(dataset, *asked) for dataset in (held_out, test))
    on = extractor.device
    y_held, y_test = _tensor(held_out.labels, on), _tensor(test.labels, on)
    results = []
    for cell in cells:
        part, whole = heads[cell]
        x = torch.from_numpy(side_by_side(test_features, cell)).to(on)
        x_held = torch.from_numpy(side_by_side(held_features, cell)).to(on)
        validation = part.accuracy(x_held, y_held)
        results.append(_result(cell, x, validation, whole.accuracy(x, y_test)))
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
    cells: Sequence[Cell],
    score: Score = logistic_accuracy,
) -> list[CellResult]:
    """Each image's features once, without augmentation; what `score` then reads from them."""
    asked = timesteps_and_blocks(cells)
    train_features, test_features = (extractor(dataset, *asked) for dataset in (train, test))
    on = float64_device(extractor.device)  # the fit is partly in float64
    held = _tensor(holdout(train.labels), on)
    y, y_test = _tensor(train.labels, on), _tensor(test.labels, on)
    n_classes = len(train.class_names)
    results = []
    for cell in progress(cells, "cells", unit="cell"):
        x = torch.from_numpy(side_by_side(train_features, cell)).to(on)
        x_test = torch.from_numpy(side_by_side(test_features, cell)).to(on)
        validation = score(x[~held], y[~held], x[held], y[held], n_classes)
        accuracy = score(x, y, x_test, y_test, n_classes)
        results += [
            _result(dataclasses.replace(cell, k=k), x_test, validation[k], accuracy[k])
            for k in validation
        ]
    return results


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


def _result(cell: Cell, x_test: Tensor, validation: float, accuracy: float) -> CellResult:
    n, width = x_test.shape
    return CellResult(cell, width, validation, accuracy, wilson_interval(accuracy, n))


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(array)).to(device)  # a copy: torch wants it writable
