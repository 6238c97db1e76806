"""k-NN accuracy against scikit-learn and a case worked out by hand."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from evaluation.probe import knn
from evaluation.probe.knn import TEMPERATURE, check_neighbours, knn_accuracies
from support.errors import UserError


def overlapping(n: int, seed: int):
    draw = np.random.default_rng(seed)
    y = draw.integers(0, 4, n)
    centres = np.random.default_rng(0).normal(size=(4, 16))
    x = centres[y] + 1.5 * draw.normal(size=(n, 16))
    return (x * draw.uniform(0.1, 10, (n, 1))).astype(np.float32), y  # lengths say nothing


@pytest.mark.parametrize("similarities", [2**24, 1500])  # all at once, and 3 rows at a time
def test_matches_scikit_learn(similarities, monkeypatch):
    monkeypatch.setattr(knn, "SIMILARITIES", similarities)
    (bank, y_bank), (x, y) = overlapping(500, 1), overlapping(400, 2)
    ours = knn_accuracies(*map(torch.from_numpy, (bank, y_bank, x, y)), 4, (1, 20, 200))
    for k, accuracy in ours.items():
        oracle = KNeighborsClassifier(
            k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE)
        )
        assert accuracy == oracle.fit(bank, y_bank).score(x, y)
    assert 0.5 < ours[1] < ours[20]


def test_a_near_neighbour_outvotes_two_that_are_less_near():
    def at(*cosines):
        c = torch.tensor(cosines)
        return torch.stack([c, (1 - c**2).sqrt()], dim=1)

    x, y = torch.tensor([[7.0, 0.0]]), torch.tensor([0])
    labels = torch.tensor([0, 1, 1])
    # exp((1 - c) / 0.07) is 2 at c = 0.9515: there the two are as heavy as the one
    assert knn_accuracies(at(1, 0.95, 0.95), labels, x, y, 2, (3,)) == {3: 1.0}
    assert knn_accuracies(at(1, 0.953, 0.953), labels, x, y, 2, (3,)) == {3: 0.0}


def test_a_bank_smaller_than_k_is_refused():
    some = list(map(torch.from_numpy, overlapping(150, 1)))
    with pytest.raises(UserError, match=r"20 neighbours: there are only 15 .*--n_train"):
        check_neighbours(15)
    assert knn_accuracies(*some, *some, 4).keys() == {20}  # not 200
