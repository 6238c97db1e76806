"""The three ways to fit a grid of linear heads that benchmarks/probe_grid.py compares."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.record import median_ratio, seconds_of
from config.schema import Linear
from datasets import Batches, Batching, Dataset
from evaluation.probe.cells import Cell, side_by_side, timesteps_and_blocks
from evaluation.probe.features import Extractor, FeatureSource
from evaluation.probe.probe import Probe, Protocol
from utils import seed_everything

WAYS = ("reference", "one pass", "cached")
CIFAR10 = (50_000, 10_000)  # images of train and test

Accuracies = Mapping[Cell, float]  # on test, in 0..1, of the heads fitted on all of train


class Apart:
    """A head with an Adam of its own, whose rate falls to 0 by a cosine, epoch by epoch."""

    def __init__(self, width: int, n_classes: int, recipe: Linear, device: torch.device):
        self.head = nn.Linear(width, n_classes).to(device)
        self.adam = torch.optim.Adam(self.head.parameters(), lr=recipe.lrate)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.adam, recipe.n_epoch)

    def step(self, x: Tensor, y: Tensor, epoch_ends: bool) -> None:
        """One batch: x: (N, C), y: (N,)."""
        loss = F.cross_entropy(self.head(x), y)
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        if epoch_ends:
            self.schedule.step()

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """In 0..1."""
        return (self.head(x).argmax(1) == y).float().mean().item()


@dataclass(frozen=True, kw_only=True)
class Race:
    """The three ways on the same images and the same network; cells are of one part each."""

    source: FeatureSource
    train: Dataset
    test: Dataset
    cells: tuple[Cell, ...]
    recipe: Linear
    flip: bool
    device: torch.device
    batch_size: int  # where features are extracted
    seed: int

    def run(self, rounds: int) -> dict:
        """{"ways": {way: see `summary`}, "optimum": accuracies, "forwards_...": see `forwards`}."""
        seconds, found = {way: [] for way in WAYS}, {}
        for _ in range(rounds):
            for way in WAYS:
                took, found[way] = self.timed(way)
                seconds[way].append(took)
        optimum = self.optimum()
        timesteps, _ = timesteps_and_blocks(self.cells)
        sizes = (len(self.cells), len(timesteps), self.recipe.n_epoch)
        return {
            "ways": {way: self.summary(seconds, found[way], optimum, way) for way in WAYS},
            "optimum": [optimum[cell] for cell in self.cells],
            "forwards_here": forwards(*sizes, len(self.train), len(self.test)),
            "forwards_of_cifar10": forwards(*sizes, *CIFAR10),
        }

    def timed(self, way: str) -> tuple[float, Accuracies]:
        """(seconds, what it found) of one of WAYS."""
        calls = {
            "reference": self.apart,
            "one pass": lambda: self.ours("paper"),
            "cached": lambda: self.ours("cached"),
        }
        found: dict[Cell, float] = {}
        seconds = seconds_of(lambda: found.update(calls[way]()), self.device)
        return seconds, found

    def apart(self) -> Accuracies:
        """The reference's way (FutureXiang/ddae): a head and an Adam for each cell, stepped one
        after the other; the features of every batch and timestep computed anew in each epoch."""
        seed_everything(self.seed, "heads apart")
        timesteps, blocks = timesteps_and_blocks(self.cells)
        batches = Batches(
            self.train.images, self.train.labels, self.recipe.batch_size, self.device,
            Batching(self.seed, shuffle=True, flip=self.flip, crop=True),
        )  # fmt: skip
        heads: dict[Cell, Apart] = {}
        for step in range(self.recipe.n_epoch * batches.steps_per_epoch):
            x0, y = batches[step]
            epoch_ends = (step + 1) % batches.steps_per_epoch == 0
            for t in timesteps:
                with torch.no_grad():
                    features = self.source.features(x0, t, torch.randn_like(x0), blocks)
                for cell in (cell for cell in self.cells if cell.t == t):
                    x = features[cell.block].float()
                    if cell not in heads:
                        classes = len(self.train.class_names)
                        heads[cell] = Apart(x.shape[1], classes, self.recipe, self.device)
                    heads[cell].step(x, y, epoch_ends)
        features, y = self._features(self.test)
        return {cell: heads[cell].accuracy(x, y) for cell, x in features.items()}

    def ours(self, protocol: str) -> Accuracies:
        """As linear.py does it, where nothing is kept from before; its first head of each cell,
        which picks the cell, is fitted too."""
        with TemporaryDirectory() as folder:
            probe = Probe(
                train=self.train, test=self.test, cells=self.cells,
                protocol=Protocol(protocol, self.recipe, self.flip), device=self.device,
                batch_size=self.batch_size, folder=Path(folder),
            )  # fmt: skip
            return {r.cell: r.test_accuracy for r in probe(self.source, self.seed).results}

    def optimum(self) -> Accuracies:
        """scikit-learn's logistic regression in float64, on the features of `cached`."""
        from sklearn.linear_model import LogisticRegression  # slow to import
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        (train, y), (test, y_test) = (self._features(data) for data in (self.train, self.test))
        found = {}
        for cell in self.cells:
            solver = LogisticRegression(solver="newton-cg", tol=1e-6, max_iter=1000)
            fit = make_pipeline(StandardScaler(), solver)
            fit.fit(train[cell].double().cpu().numpy(), y.cpu().numpy())
            found[cell] = fit.score(test[cell].double().cpu().numpy(), y_test.cpu().numpy())
        return found

    def _features(self, dataset: Dataset) -> tuple[dict[Cell, Tensor], Tensor]:
        """({cell: (N, C)}, labels (N,)), not augmented."""
        extract = Extractor(self.source, self.device, self.seed, self.batch_size)
        parts = extract(dataset, *timesteps_and_blocks(self.cells))
        features = {
            cell: torch.from_numpy(side_by_side(parts, cell)).to(self.device) for cell in self.cells
        }
        return features, torch.from_numpy(np.array(dataset.labels)).to(self.device)

    def summary(self, seconds: dict, found: Accuracies, optimum: Accuracies, way: str) -> dict:
        """Accuracies are of the last round, what is beside them in points."""
        off = [100 * (found[cell] - optimum[cell]) for cell in self.cells]
        return {
            "seconds": seconds[way],
            "times_reference": median_ratio(seconds["reference"], seconds[way]),
            "accuracies": [found[cell] for cell in self.cells],
            "points_to_optimum": fmean(off), "farthest_from_optimum": max(off, key=abs),
        }  # fmt: skip


def forwards(cells: int, timesteps: int, epochs: int, n_train: int, n_test: int) -> dict[str, int]:
    """Images through the network by each way, and by a probe of one cell after the other.

    One pass and cached also compare the cells on the held-out tenth, which cached has seen anyway.
    """
    fitted = epochs * n_train + n_test
    return {
        "cell by cell": cells * fitted,
        "reference": timesteps * fitted,
        "one pass": timesteps * (fitted + round(0.1 * n_train)),
        "cached": timesteps * (n_train + n_test),
    }
