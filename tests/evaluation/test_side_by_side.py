"""Features side by side: their cells, and how each protocol reads them."""

import dataclasses

import numpy as np
import pytest
import torch
from probe_helpers import CPU, RECIPE, noisy_pixels, single, toy_dataset, toy_source
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from datasets import Dataset
from evaluation.probe.cells import Cell, cells_of, side_by_side
from evaluation.probe.features import Extractor, FeatureSource
from evaluation.probe.knn import TEMPERATURE, knn_accuracies
from evaluation.probe.probe import Protocol, holdout, probe_cached, probe_paper
from support.errors import UserError


@pytest.fixture
def toy() -> Dataset:
    return toy_dataset()


def test_cells_are_all_timesteps_with_all_blocks_and_named_by_their_parts():
    cells = cells_of(toy_source(), [[5, 1], [1]], [["c"], ["b", "a"], ["all"], ["a", "b", "c"]])
    assert [cell.name for cell in cells] == [
        "c at t=1", "a+b at t=1", "all at t=1", "c at t=1+5", "a+b at t=1+5", "all at t=1+5",
    ]  # fmt: skip
    assert [cell.is_combined for cell in cells] == [False, *5 * [True]]
    assert cells[4].parts == ((1, "a"), (1, "b"), (5, "a"), (5, "b"))
    assert [part[1] for part in cells[2].parts] == ["a", "b", "c"]
    with pytest.raises(UserError, match="no block 'd': there are a, b, c"):
        cells_of(toy_source(), [[1]], [["a", "d"]])


@pytest.fixture
def noisy_toy(toy):
    """So hard to read that cells differ."""
    draw = np.random.default_rng(1)
    images = draw.integers(0, 245, (450, 1, 8, 8)) + 5 * (np.arange(450) % 3)[:, None, None, None]
    labels = np.arange(450) % 3
    train = dataclasses.replace(toy, images=images.astype(np.uint8), labels=labels)
    return train.take(np.arange(300)), dataclasses.replace(
        train.take(np.arange(300, 450)), split="test"
    )


def test_features_side_by_side_are_read_as_scikit_learn_reads_their_concatenation(noisy_toy):
    train, test = noisy_toy
    extractor = Extractor(toy_source(), CPU, seed=2)
    cells = cells_of(toy_source(), [[1, 5]], [["a", "c"]])
    (result,) = probe_cached(extractor, train, test, cells)
    assert result.width == 192
    x, x_test = (
        np.hstack([extractor(data, [t], [block])[t, block] for t in (1, 5) for block in "ac"])
        for data in (train, test)
    )
    scaler = StandardScaler().fit(x)
    oracle = LogisticRegression(tol=1e-10, max_iter=10_000).fit(scaler.transform(x), train.labels)
    accuracy = oracle.score(scaler.transform(x_test), test.labels)
    assert result.test_accuracy == pytest.approx(
        accuracy, abs=1.01 / len(test)
    )  # one near a border
    held = holdout(train.labels)
    scaler = StandardScaler().fit(x[~held])
    oracle.fit(scaler.transform(x[~held]), train.labels[~held])
    accuracy = oracle.score(scaler.transform(x[held]), train.labels[held])
    assert result.validation_accuracy == pytest.approx(accuracy, abs=1.01 / held.sum())


def test_nearest_neighbours_of_features_side_by_side(noisy_toy):
    train, test = noisy_toy
    extractor = Extractor(toy_source(), CPU, seed=2)
    cells = cells_of(toy_source(), [[5]], [["a", "b"]])
    results = probe_cached(extractor, train, test, cells, knn_accuracies)
    x, x_test = (
        np.hstack([extractor(data, [5], [block])[5, block] for block in "ab"])
        for data in (train, test)
    )
    for result in results:
        oracle = KNeighborsClassifier(
            result.cell.k, metric="cosine", weights=lambda d: np.exp((1 - d) / TEMPERATURE)
        )
        accuracy = oracle.fit(x, train.labels).score(x_test, test.labels)
        assert result.test_accuracy == pytest.approx(accuracy, abs=1e-9)
    assert [result.cell.name for result in results] == ["a+b at t=5, k=20", "a+b at t=5, k=200"]


def test_the_papers_heads_read_features_side_by_side(toy, tmp_path):
    """A source whose one block is the concatenation gives the same heads."""

    def joined(x0, t, noise, blocks):
        parts = noisy_pixels(x0, t, noise, "ac")
        return {"a+c": torch.cat([parts["a"], parts["c"]], dim=1)}

    test = dataclasses.replace(toy, split="test")
    one = FeatureSource(joined, ["a+c"], range(1, 11), (1, 5), "joined")
    (ours,), (theirs,) = (
        probe_paper(
            Extractor(source, CPU), toy, test, cells, Protocol("paper", RECIPE, True), tmp_path
        )
        for source, cells in (
            (toy_source(), cells_of(toy_source(), [[5]], [["a", "c"]])),
            (one, (single(5, "a+c"),)),
        )
    )
    assert (ours.width, ours.test_accuracy) == (96, theirs.test_accuracy)
    assert ours.validation_accuracy == theirs.validation_accuracy


def test_parts_are_put_side_by_side_in_their_order():
    features = {(1, "a"): np.zeros((2, 1)), (5, "a"): np.ones((2, 2)), (5, "b"): np.eye(2)}
    cell = Cell("1+5", "a", ((1, "a"), (5, "a")))
    np.testing.assert_array_equal(side_by_side(features, cell), [[0, 1, 1], [0, 1, 1]])
