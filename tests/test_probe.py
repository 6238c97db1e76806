"""Heads against scikit-learn and against torch's own modules; features against their definition."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from evaluation.heads import fit_logistic


@pytest.fixture
def blobs():
    """Correlated features of very different scales; three overlapping classes."""
    draw = np.random.default_rng(0)
    y = draw.integers(0, 3, 600)
    x = draw.normal(size=(600, 8)) + draw.normal(size=(3, 8))[y]
    x = x @ draw.normal(size=(8, 8)) * np.geomspace(0.01, 100, 8) + 5
    return x.astype(np.float32), y


@pytest.mark.parametrize("l2", [1e-2, 1e-4])
def test_logistic_matches_scikit_learn(blobs, l2):
    x, y = blobs
    head = fit_logistic(torch.from_numpy(x), torch.from_numpy(y), 3, l2)
    scaler = StandardScaler().fit(x)
    oracle = LogisticRegression(C=1 / (len(x) * l2), tol=1e-10, max_iter=10_000)
    oracle.fit(scaler.transform(x.astype(np.float64)), y)
    ours = head.weight.double().numpy() * scaler.scale_
    np.testing.assert_allclose(ours, oracle.coef_, atol=1e-3)
    assert (
        head(torch.from_numpy(x)).argmax(1).numpy() == oracle.predict(scaler.transform(x))
    ).all()
