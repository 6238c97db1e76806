"""What the tests of probes share: a little dataset, and features of it that cost nothing."""

import numpy as np
import torch

from config.schema import Linear
from datasets import Dataset
from evaluation.probe.cells import Cell
from evaluation.probe.features import FeatureSource

CPU = torch.device("cpu")
RECIPE = Linear(n_epoch=3, batch_size=32, lrate=0.01)


def noisy_pixels(x0, t, noise, blocks):
    """Two "blocks" of width 64 and one of 32, at the noise level 0.1 t."""
    x = (x0 + 0.1 * t * noise).flatten(1)
    return {"a": x, "b": x.square(), "c": x[:, ::2]}


def toy_source(features=noisy_pixels):
    return FeatureSource(features, ["a", "b", "c"], range(1, 11), (1, 5), "toy")


def toy_dataset() -> Dataset:
    """150 images of three classes, of which each is a little brighter than the one before."""
    draw = np.random.default_rng(0)
    labels = np.arange(150) % 3
    images = draw.integers(0, 200, (150, 1, 8, 8)) + 20 * labels[:, None, None, None]
    return Dataset("toy", "train", images.astype(np.uint8), labels, ["x", "y", "z"])


def single(t, block) -> Cell:
    return Cell(t, block, ((t, block),))
