"""The exact head against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from evaluation.probe.heads import fit_logistic


@pytest.fixture
def blobs():
    """Correlated features of very different scales; three overlapping classes."""
    draw = np.random.default_rng(0)
    y = draw.integers(0, 3, 600)
    x = draw.normal(size=(600, 8)) + draw.normal(size=(3, 8))[y]
    x = x @ draw.normal(size=(8, 8)) * np.geomspace(0.01, 100, 8) + 5
    return x.astype(np.float32), y


@pytest.mark.parametrize("C", [0.1, 1, 100])
def test_logistic_matches_scikit_learn(blobs, C):
    x, y = blobs
    head = fit_logistic(torch.from_numpy(x), torch.from_numpy(y), 3, C)
    scaler = StandardScaler().fit(x)
    oracle = LogisticRegression(C=C, tol=1e-10, max_iter=10_000)
    oracle.fit(scaler.transform(x.astype(np.float64)), y)
    ours = head.weight.double().numpy() * scaler.scale_
    np.testing.assert_allclose(ours, oracle.coef_, atol=1e-3, rtol=1e-3)
    predicted = head(torch.from_numpy(x)).argmax(1).numpy()
    assert (predicted == oracle.predict(scaler.transform(x))).all()


def test_logistic_ignores_a_constant_feature(blobs):
    x, y = blobs
    constant = np.full((len(x), 1), 0.1, np.float32)
    y = torch.from_numpy(y)
    with_it = fit_logistic(torch.from_numpy(np.hstack([x, constant])), y, 3)
    without = fit_logistic(torch.from_numpy(x), y, 3)
    torch.testing.assert_close(with_it.weight[:, :-1], without.weight, atol=1e-3, rtol=1e-3)
