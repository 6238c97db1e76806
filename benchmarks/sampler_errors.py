"""How far a sampler lands from the exact images of a denoiser, and how long it takes.

The exact images are the solution of the probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma
(Karras et al. 2022, eq. 1 and 3) from the highest to the lowest noise level of the process, and D
of that, which is what the last step of every sampler is. Heun's method solves it: its error falls
with the square of the number of steps, so that 1,000 leave far less than the samplers compared.
Euler's method (ddim) falls with the number alone: at 1,000 it would leave a tenth of its own error
at 100, more than the better samplers have there. Pixels are not rounded, nor is D clipped unless
that is asked for: it makes another ODE, one with kinks.
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from checkpoint import TrainedModel
from datasets import Dataset
from evaluation.fid.frechet import (
    fit_gaussian,
    frechet_distance,
    reference_statistics,
    statistics_path,
)
from evaluation.fid.inception import inception_features, load_inception, weights_fingerprint
from model.denoiser import Denoiser
from model.samplers import SAMPLERS
from sampling import (
    SamplerSettings,
    Watcher,
    draw_all,
    evaluations_of,
    labels_of,
    sampler_settings,
    solve,
)
from support.files import load_array, save_array, short_hash
from utils import ImageNoise, progress

REFERENCE = "heun"
REFERENCE_SPACING = "karras"  # of all processes; from the highest noise level to the lowest
TIMED_S = 1.0  # a short run is repeated for so long: other programs on the machine slow it down
CLOCKS = {"processor time": time.process_time, "wall time": time.perf_counter}


def steps_within(sampler: str, evaluations: int) -> int:
    """The most steps that take no more evaluations of D, at least 1: see `evaluations_of`."""
    return 1 + (evaluations - 1) // SAMPLERS[sampler].per_step


def settings_within(
    denoiser: Denoiser, sampler: str, evaluations: int, spacing: str, clip: bool
) -> SamplerSettings:
    """Those with `steps_within` steps. Raises UserError if the spacing has fewer."""
    steps = steps_within(sampler, evaluations)
    return sampler_settings(denoiser, sampler, steps, spacing=spacing, clip=clip)


def clock_of(device: torch.device) -> str:
    """Which of CLOCKS times it: on a CPU the processor time, of all threads together, to which
    other programs add little."""
    return "processor time" if device.type == "cpu" else "wall time"


def rms(difference: Tensor) -> float:
    """The root mean square over all values."""
    return difference.square().mean().sqrt().item()


def median_rms(difference: Tensor) -> float:
    """The median over images: one that goes elsewhere does not count. difference: (N, C, H, W)."""
    return difference.square().mean(dim=(1, 2, 3)).sqrt().quantile(0.5).item()


@dataclass(frozen=True)
class Bench:
    """Draws the images 0 .. n-1 of a model, `batch_size` at a time."""

    model: TrainedModel
    n: int
    batch_size: int
    use_amp: bool = False

    @property
    def device(self) -> torch.device:
        """That of the model."""
        return self.model.denoiser.device

    def solve(
        self, settings: SamplerSettings, use_amp: bool = False, watch: Watcher | None = None
    ) -> Tensor:
        """x0, (n, C, H, W) float64 on the CPU, not rounded."""
        config, denoiser, parts = self.model.config, self.model.denoiser, []
        for start in range(0, self.n, self.batch_size):
            indices = list(range(start, min(start + self.batch_size, self.n)))
            noise = ImageNoise(config.seed, indices, config.network.image_shape, self.device)
            y = labels_of(denoiser, settings, indices)
            parts.append(solve(denoiser, settings, noise.draw, y, use_amp, watch).cpu().double())
        return torch.cat(parts)

    def exact(self, steps: int, clip: bool, folder: Path) -> Tensor:
        """Like `solve` in full precision: the ODE solved in so many steps; kept in `folder`."""
        settings = sampler_settings(
            self.model.denoiser, REFERENCE, steps, spacing=REFERENCE_SPACING, clip=clip
        )
        what = [self.model.fingerprint(), self.model.config.seed, self.n, settings.tag()]
        path = folder / f"samplers_reference_{short_hash(what)}.npy"
        shape = (self.n, *self.model.config.network.image_shape)
        kept = load_array(path, lambda x0: x0.shape == shape and x0.dtype == np.float64)
        if kept is not None:
            return torch.from_numpy(np.array(kept))
        total = evaluations_of(REFERENCE, steps) * -(-self.n // self.batch_size)
        with progress(total=total, desc=f"reference, {steps} steps", unit="evaluation") as bar:
            x0 = self.solve(settings, watch=lambda *_: bar.update())
        save_array(path, x0.numpy())
        return x0

    def measure(self, settings: SamplerSettings, exact: Tensor) -> dict:
        """The number of evaluations of D; seconds_per_image, in the fastest of the runs that
        TIMED_S allows; `error`, the distance to the exact images, root mean square over pixels in
        [-1, 1], and median_error, the median of the images' own; None if the sampler adds noise.
        """
        self.solve(dataclasses.replace(settings, steps=1), self.use_amp)  # warms the device up
        clock, seconds = CLOCKS[clock_of(self.device)], []
        while sum(seconds) < TIMED_S:
            started = clock()
            x0 = self.solve(settings, self.use_amp)
            seconds.append(clock() - started)
        return {
            "evaluations": evaluations_of(settings.sampler, settings.steps),
            "seconds_per_image": min(seconds) / self.n,
            "error": rms(x0 - exact) if settings.deterministic else None,
            "median_error": median_rms(x0 - exact) if settings.deterministic else None,
        }


class FidScore:
    """FID of a model's images 0 .. n-1 against a whole dataset. `facts`: what it depends on.

    Raises UserError if the weights, pytorch-fid's, are damaged.
    """

    def __init__(self, bench: Bench, dataset: Dataset, weights: Path, data_dir: str):
        self.bench = bench
        self.inception = load_inception(weights, bench.device)
        cache = statistics_path(data_dir, dataset, weights_fingerprint(weights))
        self.gaussian, _ = reference_statistics(
            cache, lambda: self._features(dataset.images, "reference"), False
        )
        self.facts = {"images": bench.n, "reference": cache.name}

    def __call__(self, settings: SamplerSettings) -> dict:
        """`facts`, and the `value`."""
        bench = self.bench
        images = draw_all(bench.model, settings, bench.n, bench.use_amp, bench.batch_size)
        gaussian = fit_gaussian(self._features(images, settings.tag()))
        return self.facts | {"value": frechet_distance(gaussian, self.gaussian)}

    def _features(self, images: np.ndarray, title: str) -> np.ndarray:
        return inception_features(self.inception, images, self.bench.batch_size, title)
