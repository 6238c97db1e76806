"""Frozen features of images: what a linear probe reads.

A part (t, block) is one feature vector per image: the spatial mean of a decoder block on the
image with the noise of timestep t (Xiang et al. 2023, arXiv 2303.09769, section 3.2).
"""

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from checkpoint import TrainedModel
from datasets import Batches, Dataset
from model.denoiser import Denoiser
from support import distributed
from support.errors import UserError
from support.files import load_array, save_array, short_hash
from utils import amp_dtype, autocast, generator, log, progress

Timestep = int | float  # whole ones are an int, see `as_timestep`
Part = tuple[Timestep, str]  # timestep, block: one feature vector per image
FeatureFn = Callable[[Tensor, float, Tensor, Collection[str]], dict[str, Tensor]]

NOISE_CHUNK = 64  # images that share a generator: large enough to be fast


def as_timestep(t: float) -> Timestep:
    """21.0 as 21: a timestep draws the same noise and names the same files however it came."""
    return int(t) if t == int(t) else float(t)


@dataclass(frozen=True)
class FeatureSource:
    """What is probed: a trained network, an untrained one, or the pixels themselves.

    `features` is (x0, t, noise, blocks) -> {block: (N, C) float32}, with x0 and noise
    (N, C, H, W). `fingerprint` is equal only where the features are equal.
    """

    features: FeatureFn
    block_names: list[str]
    timesteps: range  # from the first to the last, any between them may be asked for
    default_timesteps: tuple[int, ...]
    fingerprint: str
    denoiser: Denoiser | None = None  # whose noise levels the timesteps are; None: no noise

    def check(self, timesteps: Collection[float], blocks: Collection[str]) -> None:
        """Raises UserError for a timestep or block that is not there."""
        first, last = self.timesteps[0], self.timesteps[-1]
        for t in timesteps:
            if not first <= t <= last:
                raise UserError(f"timestep {t}: outside {first}..{last}, those of this probe")
        for block in blocks:
            if block not in self.block_names:
                raise UserError(f"no block '{block}': there are {', '.join(self.block_names)}")

    def sigma(self, t: float) -> float | None:
        """The noise level of a timestep, to 6 digits; None where there is no noise."""
        if self.denoiser is None:
            return None
        device = self.denoiser.device
        return float(f"{self.denoiser.sigma(torch.tensor([t], device=device)).item():.6g}")

    def timestep(self, sigma: float) -> Timestep:
        """The timestep of a noise level: an int if it is one, else between two.

        Raises UserError for a level that the process does not reach.
        """
        if self.denoiser is None:
            raise UserError(f"sigma {sigma:g}: there is no noise on {self.fingerprint}")
        low, high = (float(f"{end:.6g}") for end in self.denoiser.sigma_range)
        if not low <= sigma <= high:
            raise UserError(f"sigma {sigma:g}: outside {low:g}..{high:g}, those of this process")
        device = self.denoiser.device
        t = round(self.denoiser.t(torch.tensor([sigma], device=device)).item(), 6)
        return round(t) if self.sigma(round(t)) == float(f"{sigma:.6g}") else t


def network_source(denoiser: Denoiser, fingerprint: str, use_amp: bool) -> FeatureSource:
    """The decoder blocks of a denoiser in eval mode; `fingerprint` is that of its weights."""
    device = denoiser.device
    precision = (amp_dtype(device) if use_amp else None) or torch.float32

    def features(x0: Tensor, t: float, noise: Tensor, blocks: Collection[str]) -> dict[str, Tensor]:
        with autocast(device, use_amp):
            return denoiser.features(x0, t, noise, blocks)

    return FeatureSource(
        features,
        denoiser.block_names,
        timesteps=range(1, denoiser.n_T + 1),
        default_timesteps=denoiser.probe_timesteps,
        fingerprint=f"{fingerprint}-{str(precision).removeprefix('torch.')}",
        denoiser=denoiser,
    )


def model_source(model: TrainedModel, use_amp: bool) -> FeatureSource:
    """The decoder blocks of a trained model."""
    return network_source(model.denoiser, model.fingerprint(), use_amp)


def pixel_source() -> FeatureSource:
    """The raw pixels in [-1, 1] as one block, "pixels", at t = 0."""
    return FeatureSource(
        lambda x0, t, noise, blocks: {"pixels": x0.flatten(1)},
        ["pixels"],
        timesteps=range(1),
        default_timesteps=(0,),
        fingerprint="pixels",
    )


@dataclass
class Extractor:
    """Computes the features of whole datasets, without augmentation.

    An image's noise depends on (seed, split, t) and its index alone, so `batch_size` changes no
    feature beyond rounding. With a `folder`, finished timesteps are kept there, one .npy a part,
    and read from there the next time. `n_forwards` counts images times timesteps computed in
    `seconds`. Several processes divide the images among them; each gets the features of all.
    """

    source: FeatureSource
    device: torch.device
    seed: int = 0
    batch_size: int = 512
    folder: Path | None = None
    n_forwards: int = 0
    seconds: float = 0.0

    @property
    def images_per_s(self) -> float | None:
        """Images times timesteps per second; None before anything is computed."""
        return self.n_forwards / self.seconds if self.seconds else None

    def __call__(
        self, dataset: Dataset, timesteps: Collection[float], blocks: Collection[str]
    ) -> dict[Part, np.ndarray]:
        """{(t, block): (N, C) float32}, in the order of the dataset; memory-mapped if kept."""
        timesteps = [as_timestep(t) for t in timesteps]
        mine = distributed.at_least_one(distributed.share(len(dataset)))
        share = dataset  # not a slice where it is all: a GPU has one copy of each array
        if len(mine) < len(dataset):
            share = dataset.take(slice(mine.start, mine.stop))
        if self.folder is None:
            return {
                (t, block): values
                for t in timesteps
                for block, values in self._compute(dataset, share, t, blocks).items()
            }
        folder = self.folder / self._key(dataset)

        def kept(t: float, block: str) -> np.ndarray | None:
            path = folder / f"t{t}_{block}.npy"
            return load_array(path, lambda a: a.ndim == 2 and len(a) == len(dataset))

        cells = {}
        for t in timesteps:
            cells |= {(t, block): kept(t, block) for block in blocks}
            missing = [block for block in blocks if cells[t, block] is None]
            computed = self._compute(dataset, share, t, missing) if missing else {}
            for block, values in computed.items() if distributed.is_main() else ():
                save_array(folder / f"t{t}_{block}.npy", values)
            distributed.barrier()
            cells |= {(t, block): kept(t, block) for block in missing}
        return cells

    @torch.no_grad()
    def _compute(
        self, dataset: Dataset, share: Dataset, t: float, blocks: Collection[str]
    ) -> dict[str, np.ndarray]:
        """The features of all of `dataset`, of which this rank computes `share`."""
        mine = distributed.share(len(dataset))
        batches = Batches(share.images, share.labels, self.batch_size, self.device)
        key = (self.seed, "features", dataset.split, t)
        indices = distributed.at_least_one(mine)
        noises = _noise(indices, self.batch_size, share.images.shape[1:], key)
        parts: dict[str, list[np.ndarray]] = {block: [] for block in blocks}
        start = time.perf_counter()
        title = f"features of {dataset.split}, t={t}"
        with progress(total=len(mine), desc=title, shared=True, unit="image") as bar:
            for step, noise in enumerate(noises):
                x0, _ = batches[step]
                features = self.source.features(x0, t, noise.to(self.device), blocks)
                for block in blocks:
                    parts[block].append(features[block].float().cpu().numpy())
                bar.update(len(x0))
        features = {
            block: distributed.gather_rows(np.concatenate(part)[: len(mine)])
            for block, part in parts.items()
        }
        seconds = time.perf_counter() - start
        self.n_forwards += len(dataset)
        self.seconds += seconds
        log.info(f"{title}: {len(dataset):,} images in {seconds:.1f} s")
        for block, values in features.items():
            if not np.isfinite(values).all():
                raise UserError(
                    f"the features of {block} at t={t} are not finite: take another checkpoint, "
                    "or leave out --use_amp"
                )
        return features

    def _key(self, dataset: Dataset) -> str:
        settings = [self.source.fingerprint, dataset.fingerprint(), dataset.split, self.seed]
        return f"{dataset.name}_{dataset.split}_{short_hash(settings)}"


def save_features(
    path: Path, datasets: list[Dataset], features: list[dict[Part, np.ndarray]]
) -> None:
    """Writes one .npz: `<split>_t<t>_<block>` (N, C) and `<split>_labels` (N,) of each dataset."""
    arrays = {f"{dataset.split}_labels": dataset.labels for dataset in datasets}
    for dataset, cells in zip(datasets, features, strict=True):
        arrays |= {f"{dataset.split}_t{t}_{block}": cells[t, block] for t, block in cells}
    save_array(path, arrays)


def _noise(indices: range, batch_size: int, shape: tuple[int, ...], key: tuple) -> Iterator[Tensor]:
    """Standard normal batches for these images; every chunk of images has its own generator."""
    waiting = torch.empty(0, *shape)
    chunk, before = divmod(indices.start, NOISE_CHUNK)  # images of the first chunk to leave out
    for start in range(0, len(indices), batch_size):
        end = before + min(batch_size, len(indices) - start)
        parts = [waiting]
        while sum(map(len, parts)) < end:
            parts.append(torch.randn(NOISE_CHUNK, *shape, generator=generator("cpu", *key, chunk)))
            chunk += 1
        drawn = torch.cat(parts)
        yield drawn[before:end]
        waiting, before = drawn[end:], 0
