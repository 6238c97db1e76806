"""From a denoiser and a sampler's name to images; what sample.py, fid.py and training share."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from checkpoint import TrainedModel
from datasets import to_uint8
from model.denoiser import Denoiser
from model.samplers import (
    SAMPLERS,
    SPACINGS,
    DenoiseFn,
    NoiseFn,
    clipped,
    guided,
    last_timestep,
)
from support import distributed
from support.errors import UserError
from utils import ImageNoise, autocast, progress

Watcher = Callable[[Tensor, float, Tensor], None]  # x (N, C, H, W), sigma, D(x, sigma)


@dataclass(frozen=True)
class SamplerSettings:
    """A sampler, its noise levels and its guidance: with a seed, all that decides an image."""

    sampler: str  # a row of samplers.SAMPLERS
    steps: int
    eta: float | None  # None where the sampler fixes it
    spacing: str | None = None  # a row of samplers.SPACINGS; None: the process's own
    sigma_max: float | None = None  # the noise level that it starts at; None: the process's highest
    clip: bool = True
    guidance: float | None = None  # None: a network without labels
    classes: tuple[int, ...] | None = None  # see class_of; None: all

    @property
    def deterministic(self) -> bool:
        """Whether the starting noise alone decides the image."""
        return SAMPLERS[self.sampler].deterministic and not self.eta

    def tag(self) -> str:
        """For file names: ddim_steps100_eta0.0; what is not the default is appended."""
        parts = [self.sampler, f"steps{self.steps}"]
        parts += [] if self.eta is None else [f"eta{self.eta}"]
        parts += [self.spacing] if self.spacing else []
        parts += [] if self.sigma_max is None else [f"smax{self.sigma_max:g}"]
        parts += [] if self.clip else ["noclip"]
        parts += [] if self.guidance is None else [f"guidance{self.guidance:g}"]
        parts += ["classes" + "-".join(map(str, self.classes))] if self.classes else []
        return "_".join(parts)


def sampler_settings(
    denoiser: Denoiser,
    sampler: str | None = None,
    steps: int | None = None,
    eta: float | None = None,
    spacing: str | None = None,
    sigma_max: float | None = None,
    clip: bool = True,
    guidance: float | None = None,
    classes: list[int] | None = None,
) -> SamplerSettings:
    """Fills in the defaults of the process and the sampler. Raises UserError for what cannot be."""
    sampler = sampler or denoiser.default_sampler
    row = SAMPLERS[sampler]
    low, high = denoiser.sigma_range
    if sigma_max is not None:
        if not low < sigma_max <= high * (1 + 1e-4):  # as it is printed
            raise UserError(
                f"--sigma_max {sigma_max:g}: give more than {low:.3g}, at most {high:.5g}"
            )
        sigma_max = min(sigma_max, high)
    if steps is None:
        all_steps = last_timestep(denoiser, sigma_max or high)
        steps = denoiser.default_steps if row.steps is None else row.steps or all_steps
    if steps < 1:
        raise UserError(f"--steps {steps}: give at least 1")
    spacing = None if spacing == denoiser.default_spacing else spacing
    if eta is not None and not row.takes_eta:
        takes = ", ".join(name for name, row in SAMPLERS.items() if row.takes_eta)
        raise UserError(f"--eta: --sampler {sampler} fixes it; those that take it: {takes}")
    if row.takes_eta:
        eta = 0.0 if eta is None else eta
        if not 0 <= eta <= 1:
            raise UserError(f"--eta {eta}: give 0 (deterministic) to 1 (the most noise)")
    guidance, classes = _checked_labels(denoiser, guidance, classes)
    clip = clip and not denoiser.is_latent
    settings = SamplerSettings(sampler, steps, eta, spacing, sigma_max, clip, guidance, classes)
    noise_levels(denoiser, settings)
    return settings


def _checked_labels(
    denoiser: Denoiser, guidance: float | None, classes: list[int] | None
) -> tuple[float | None, tuple[int, ...] | None]:
    if not denoiser.classes:
        if guidance is not None or classes is not None:
            raise UserError(
                "--guidance and --classes: this network was trained without labels "
                "(cond_drop_prob 0)"
            )
        return None, None
    for label in classes or []:
        if not 0 <= label < denoiser.classes:
            raise UserError(f"--classes {label}: give 0 to {denoiser.classes - 1}")
    if len(set(classes or [])) < len(classes or []):
        raise UserError(f"--classes {','.join(map(str, classes))}: name each class once")
    if guidance is not None and not 0 <= guidance < math.inf:
        raise UserError(f"--guidance {guidance}: give 0 or more")
    return 1.0 if guidance is None else guidance, tuple(classes) if classes else None


def noise_levels(denoiser: Denoiser, settings: SamplerSettings) -> list[float]:
    """The falling noise levels of a sampler, and the final 0.

    Raises UserError if the spacing has not so many steps.
    """
    spacing = settings.spacing or denoiser.default_spacing
    try:
        sigma_max = settings.sigma_max or denoiser.sigma_range[1]
        return SPACINGS[spacing](denoiser, settings.steps, sigma_max)
    except ValueError as error:
        raise UserError(f"--steps {settings.steps}, spacing {spacing}: {error}") from None


def evaluations_of(sampler: str, steps: int) -> int:
    """Of D, for an image: `per_step` in every step but the last, which takes one."""
    return 1 + SAMPLERS[sampler].per_step * (steps - 1)


def labels_of(
    denoiser: Denoiser, settings: SamplerSettings, indices: Sequence[int]
) -> Tensor | None:
    """The classes of the images with these indices, (N,), or None without labels."""
    classes = classes_of(denoiser, settings)
    if classes is None:
        return None
    labels = [class_of(i, classes) for i in indices]
    return torch.tensor(labels, device=denoiser.device)


def classes_of(denoiser: Denoiser, settings: SamplerSettings) -> list[int] | None:
    """Those that the images are of, in turn, or None without labels."""
    if settings.guidance is None:
        return None
    return list(settings.classes or range(denoiser.classes))


def class_of(index: int, classes: Sequence[int]) -> int:
    """The classes take turns."""
    return classes[index % len(classes)]


@torch.no_grad()
def solve(
    denoiser: Denoiser,
    settings: SamplerSettings,
    noise: NoiseFn,
    y: Tensor | None = None,
    use_amp: bool = False,
    watch: Watcher | None = None,
) -> Tensor:
    """x0 from starting and step noise, `noise()` -> (N, C, H, W): like it, near [-1, 1].

    `watch` sees every evaluation of D. Everything outside the network is in float64, except on
    MPS, which has none.
    """
    device = denoiser.device
    row = SAMPLERS[settings.sampler]
    options = dict(row.options) | (denoiser.churn if row.takes_churn else {})
    if settings.eta is not None:
        options["eta"] = settings.eta
    sigmas = noise_levels(denoiser, settings)
    dtype = torch.float32 if device.type == "mps" else torch.float64

    def evaluate(x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        with autocast(device, use_amp):
            return denoiser(x, sigma, y)

    def draw() -> Tensor:
        return noise().to(dtype)

    D: DenoiseFn = evaluate if y is None else guided(evaluate, y, settings.guidance)
    D = clipped(D) if settings.clip else D
    D = D if watch is None else _watched(D, watch)
    return row.run(D, sigmas[0] * draw(), sigmas, draw, **options)


def _watched(D: DenoiseFn, watch: Watcher) -> DenoiseFn:
    def evaluate(x: Tensor, sigma: Tensor) -> Tensor:
        x0 = D(x, sigma)
        watch(x, sigma[0].item(), x0)
        return x0

    return evaluate


def sample(
    denoiser: Denoiser,
    settings: SamplerSettings,
    indices: Sequence[int],
    seed: int,
    image_shape: tuple[int, int, int],
    use_amp: bool = False,
    watch: Watcher | None = None,
) -> Tensor:
    """The images with these indices: (N, C, H, W) uint8, on the denoiser's device.

    Starting and step noise, of `image_shape`, depend on the seed and each index alone; latents
    are decoded.
    """
    return to_uint8(_drawn(denoiser, settings, indices, seed, image_shape, use_amp, watch))


def _drawn(
    denoiser: Denoiser,
    settings: SamplerSettings,
    indices: Sequence[int],
    seed: int,
    image_shape: tuple[int, int, int],
    use_amp: bool,
    watch: Watcher | None = None,
) -> Tensor:
    """As `sample`, near [-1, 1]."""
    noise = ImageNoise(seed, indices, image_shape, denoiser.device)
    y = labels_of(denoiser, settings, indices)
    return denoiser.decode(solve(denoiser, settings, noise.draw, y, use_amp, watch))


def finite_pixels(images: Tensor) -> Tensor:
    """Images near [-1, 1] -> uint8 on the CPU. Raises UserError for a pixel that is no finite
    number, which would be black."""
    if not images.isfinite().all():
        raise UserError(
            "an image is not finite: leave out --use_amp or --no_clip, lower --guidance, or take "
            "another checkpoint"
        )
    return to_uint8(images).cpu()


def sample_in_batches(
    model: TrainedModel,
    settings: SamplerSettings,
    indices: Sequence[int],
    use_amp: bool,
    batch_size: int,
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """(indices, images on the CPU), batch by batch, with a bar: see `sample`. The seed is that of
    the model's config. Raises UserError for an image that is not finite."""
    seed, shape = model.config.seed, model.config.network.image_shape
    title = f"{settings.sampler}, {settings.steps} steps"
    with progress(total=len(indices), desc=title, shared=True, unit="image") as bar:
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            images = _drawn(model.denoiser, settings, batch, seed, shape, use_amp)
            yield batch, finite_pixels(images)
            bar.update(len(batch))


def draw_all(
    model: TrainedModel, settings: SamplerSettings, n: int, use_amp: bool, batch_size: int
) -> np.ndarray:
    """The images that sample.py writes as 0 .. n-1 with these settings: (n, C, H, W) uint8, on
    every rank."""
    drawn = sample_in_batches(model, settings, distributed.share(n), use_amp, batch_size)
    shape = model.config.network.pixel_shape
    parts = [np.empty((0, *shape), np.uint8), *(batch.numpy() for _, batch in drawn)]
    return distributed.gather_rows(np.concatenate(parts))


def default_samples_folder(save_dir: str | Path, epoch: int, settings: SamplerSettings) -> Path:
    """Where sample.py puts its set: <save_dir>/EMAgenerated_ep59_ddim_steps100_eta0.0."""
    return Path(save_dir) / f"EMAgenerated_ep{epoch}_{settings.tag()}"
