"""How far apart two sets of images are: the Frechet distance (FID) and the kernel distance (KID).

FID is Heusel et al. 2017 (arXiv 1706.08500), eq. 6; KID is Binkowski et al. 2018
(arXiv 1801.01401). Both read features of Inception (evaluation/fid/inception.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets import Dataset
from evaluation.fid.inception import N_FEATURES
from support import distributed
from support.errors import UserError
from support.files import load_array, save_array
from utils import derive_seed, log, progress

CHUNK = 4096  # rows that are float64 at once: 64 MiB of features


@dataclass(frozen=True)
class Gaussian:
    """The normal distribution that FID fits to the features of n images."""

    mean: np.ndarray  # (D,) float64
    covariance: np.ndarray  # (D, D) float64, unbiased
    n: int


def fit_gaussian(features: np.ndarray) -> Gaussian:
    """Mean and unbiased covariance in float64. features: (N, D). Raises ValueError if N < 2."""
    n, width = features.shape
    if n < 2:
        raise ValueError(f"a covariance needs at least 2 images, not {n}")
    mean = features.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((width, width))
    for start in range(0, n, CHUNK):
        centred = features[start : start + CHUNK] - mean
        covariance += centred.T @ centred
    return Gaussian(mean, covariance / (n - 1), n)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), in the features' units squared.

    S_a S_b has the eigenvalues of S_a^(1/2) S_b S_a^(1/2), which is symmetric: so the trace of
    the square root is the sum of their roots, also where few images leave S_a or S_b singular.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    products = np.linalg.eigvalsh(root @ b.covariance @ root)
    trace_of_root = np.sqrt(products.clip(min=0)).sum()
    shift = a.mean - b.mean
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return float(shift @ shift + traces - 2 * trace_of_root)


SUBSET_SIZE = 1000  # images of a subset of KID


@dataclass(frozen=True)
class KernelDistance:
    """KID: the squared MMD's mean and standard deviation over subsets."""

    mean: float
    std: float
    subsets: int
    subset_size: int  # images of either side


def kernel_distance(
    x: np.ndarray, y: np.ndarray, seed: int = 0, subsets: int = 100, subset_size: int = SUBSET_SIZE
) -> KernelDistance:
    """KID from the unbiased squared MMD of random subsets.

    x: (N, D), y: (M, D); the kernel is (x.y / D + 1)^3. Subsets are drawn without replacement,
    from the seed alone, of at most N and M images. Raises ValueError if N or M is below 2.
    """
    size = min(subset_size, len(x), len(y))
    if size < 2:
        raise ValueError(f"KID needs at least 2 images on either side, not {size}")
    random = np.random.default_rng(derive_seed(seed, "kid"))

    def draw(features: np.ndarray) -> np.ndarray:
        return features[random.choice(len(features), size, replace=False)].astype(np.float64)

    values = [
        _unbiased_mmd2(draw(x), draw(y))
        for _ in progress(range(subsets), desc="KID", unit="subset")
    ]
    return KernelDistance(float(np.mean(values)), float(np.std(values)), subsets, size)


def _unbiased_mmd2(x: np.ndarray, y: np.ndarray) -> float:
    n = len(x)
    xx, yy, xy = _cubic_kernel(x, x), _cubic_kernel(y, y), _cubic_kernel(x, y)
    # An image's likeness to itself says nothing of the distribution: the diagonals stay out.
    within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
    return within / (n * (n - 1)) - 2 * xy.mean()


def _cubic_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def score_name(n: int) -> str:
    """What the literature calls the score of n samples: FID at 50,000, FID-5k at 5,000."""
    if n == 50_000:
        return "FID"
    return f"FID-{n // 1000}k" if n and n % 1000 == 0 else f"FID ({n:,} images)"


# --- the reference set: its features are slow to compute on a CPU, so they are kept


def statistics_path(data_dir: str | Path, dataset: Dataset, weights_sha256: str) -> Path:
    """Where `reference_statistics` keeps those of a dataset, by Inception's weights."""
    key = f"{dataset.name}-{dataset.split}-{dataset.fingerprint()}-{weights_sha256[:16]}"
    return Path(data_dir, ".fid", key)


def reference_statistics(
    cache: Path, compute: Callable[[], np.ndarray], keep_features: bool
) -> tuple[Gaussian, np.ndarray | None]:
    """The Gaussian of the reference set, from `<cache>.npz` or of the features of `compute()`.

    The file has pytorch-fid's keys, mu and sigma, and can be given to it. With `keep_features`
    the features, (N, 2048), are returned too and kept in `<cache>.npy`; else they are None.
    """
    statistics = cache.with_name(cache.name + ".npz")
    kept = cache.with_name(cache.name + ".npy")
    arrays = load_array(statistics, _are_statistics)
    gaussian = arrays and Gaussian(arrays["mu"], arrays["sigma"], int(arrays["n"]))
    features = load_array(kept, _are_features) if keep_features else None
    if gaussian is not None and (features is not None or not keep_features):
        return gaussian, features
    features = compute()
    gaussian = fit_gaussian(features)
    if distributed.is_main():
        _keep(statistics, kept if keep_features else None, gaussian, features)
    return gaussian, features if keep_features else None


def _keep(statistics: Path, kept: Path | None, gaussian: Gaussian, features: np.ndarray) -> None:
    try:
        arrays = {"mu": gaussian.mean, "sigma": gaussian.covariance, "n": gaussian.n}
        save_array(statistics, arrays)
        if kept is not None:
            save_array(kept, features)
    except UserError as error:  # data_dir may be read-only: the score can still be had
        log.warning(f"the statistics of the reference set could not be kept: {error}")


def _are_statistics(arrays: dict[str, np.ndarray]) -> bool:
    width = len(arrays["mu"])
    return arrays["sigma"].shape == (width, width) and int(arrays["n"]) > 1


def _are_features(features: np.ndarray) -> bool:
    return features.ndim == 2 and features.shape[1] == N_FEATURES
