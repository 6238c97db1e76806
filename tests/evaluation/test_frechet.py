"""FID and KID: against closed forms, scipy and a direct double sum; the reference's statistics."""

import errno

import numpy as np
import pytest
import scipy.linalg

from evaluation.fid.frechet import (
    Gaussian,
    fit_gaussian,
    frechet_distance,
    kernel_distance,
    reference_statistics,
    score_name,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def random_spd(d, seed):
    a = rng(seed).normal(size=(d, 2 * d))
    return a @ a.T / (2 * d)


def test_frechet_of_commuting_gaussians_is_the_closed_form():
    basis = np.linalg.qr(rng().normal(size=(40, 40)))[0]
    a, b = rng(1).uniform(0.1, 3, 40), rng(2).uniform(0.1, 3, 40)
    mu_a, mu_b = rng(3).normal(size=(2, 40))
    expected = ((mu_a - mu_b) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    ours = frechet_distance(
        Gaussian(mu_a, basis * a @ basis.T, 1), Gaussian(mu_b, basis * b @ basis.T, 1)
    )
    assert ours == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_frechet_matches_scipy_sqrtm(seed):
    s, t = random_spd(30, seed), random_spd(30, seed + 10)
    mu = rng(seed).normal(size=30)
    root = np.asarray(scipy.linalg.sqrtm(s @ t)).real
    expected = mu @ mu + np.trace(s + t - 2 * root)
    ours = frechet_distance(Gaussian(mu, s, 1), Gaussian(np.zeros(30), t, 1))
    assert ours == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [20, 400])
def test_a_set_is_at_distance_0_from_itself_also_when_rank_deficient(n):
    gaussian = fit_gaussian(rng().normal(size=(n, 100)).astype(np.float32))
    assert frechet_distance(gaussian, gaussian) == pytest.approx(0, abs=1e-5)


def test_statistics_equal_numpy_over_several_chunks(monkeypatch):
    monkeypatch.setattr("evaluation.fid.frechet.CHUNK", 7)
    features = (rng().normal(size=(50, 5)) + 1000).astype(np.float32)
    gaussian = fit_gaussian(features)
    assert gaussian.n == 50
    np.testing.assert_allclose(gaussian.mean, features.astype(np.float64).mean(0), rtol=1e-13)
    np.testing.assert_allclose(gaussian.covariance, np.cov(features.T.astype(float)), rtol=1e-9)
    with pytest.raises(ValueError, match="at least 2"):
        fit_gaussian(features[:1])


def test_kid_of_whole_sets_is_the_double_sum():
    x, y = rng(1).normal(size=(2, 6, 4))
    y = y + 0.5

    def k(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / 4 + 1) ** 3

    n = 6
    expected = sum(
        (k(x[i], x[j]) + k(y[i], y[j])) / (n * (n - 1))
        for i in range(n) for j in range(n) if i != j
    ) - 2 * sum(k(x[i], y[j]) for i in range(n) for j in range(n)) / n**2  # fmt: skip
    kid = kernel_distance(x, y, subsets=3)
    assert kid.subset_size == 6
    assert kid.mean == pytest.approx(expected, rel=1e-10)
    assert kid.std == pytest.approx(0, abs=1e-10)


def test_kid_is_near_0_for_one_distribution_and_not_for_two():
    x, y = rng(1).normal(size=(2, 2000, 16))
    same = kernel_distance(x, y, subsets=40, subset_size=200)
    other = kernel_distance(x, y + 0.3, subsets=40, subset_size=200)
    assert abs(same.mean) < 0.005 < 0.05 < other.mean
    assert kernel_distance(x, y, subsets=40, subset_size=200) == same
    assert kernel_distance(x, y, seed=1, subsets=40, subset_size=200) != same


@pytest.mark.parametrize(
    ("n", "name"),
    [(5000, "FID-5k"), (10_000, "FID-10k"), (50_000, "FID"), (256, "FID (256 images)"),
     (5001, "FID (5,001 images)")],
)  # fmt: skip
def test_score_name(n, name):
    assert score_name(n) == name


# --- the reference's statistics


def test_the_reference_is_computed_once_and_again_when_damaged(tmp_path):
    features = rng().normal(size=(5, 2048)).astype(np.float32)
    calls = []

    def compute():
        calls.append(1)
        return features

    def get(kid=False):
        return reference_statistics(tmp_path / ".fid" / "set-1.5", compute, kid)

    first, none = get()
    again, _ = get()
    assert len(calls) == 1
    assert none is None
    np.testing.assert_array_equal(first.covariance, again.covariance)
    with np.load(tmp_path / ".fid" / "set-1.5.npz") as kept:
        assert {"mu", "sigma"} <= set(kept)  # what pytorch-fid reads
    for _ in range(2):
        _, kept = get(kid=True)
        np.testing.assert_array_equal(kept, features)
    assert len(calls) == 2
    statistics = tmp_path / ".fid" / "set-1.5.npz"
    statistics.write_bytes(statistics.read_bytes()[:5000])
    np.testing.assert_array_equal(get()[0].mean, first.mean)
    assert len(calls) == 3
    assert not list(tmp_path.glob("**/*.tmp"))


def test_a_full_disk_costs_the_cache_and_not_the_score(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("support.files.os.replace", full)
    features = rng().normal(size=(5, 8)).astype(np.float32)
    gaussian, kept = reference_statistics(tmp_path / "set", lambda: features, True)
    np.testing.assert_allclose(gaussian.mean, features.mean(axis=0), rtol=1e-5, atol=1e-6)
    assert kept is features
    assert list(tmp_path.iterdir()) == []
