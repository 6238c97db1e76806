"""From a denoiser and a sampler's name to images; what sample.py, fid.py and training share."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from batches import to_uint8
from errors import UserError
from model.denoiser import Denoiser
from model.samplers import SAMPLERS, SPACINGS, clipped
from utils import ImageNoise, autocast


@dataclass(frozen=True)
class SamplerSettings:
    sampler: str  # a row of samplers.SAMPLERS
    steps: int
    eta: float | None  # None where the sampler fixes it
    spacing: str | None = None  # a row of samplers.SPACINGS; None: the process's own
    clip: bool = True

    def tag(self) -> str:
        """For file names: ddim_steps100_eta0.0; what is not the default is appended."""
        eta = "" if self.eta is None else f"_eta{self.eta}"
        spacing = f"_{self.spacing}" if self.spacing else ""
        clip = "" if self.clip else "_noclip"
        return f"{self.sampler}_steps{self.steps}{eta}{spacing}{clip}"


def add_sampler_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampler")
    group.add_argument(
        "--sampler", "--mode", type=str.lower, choices=list(SAMPLERS),
        help="default: the process's own, ddim for DDPM and heun for EDM",
    )  # fmt: skip
    group.add_argument(
        "--steps", type=int, help="default: the process's own (100 for DDPM, 18 for EDM); ddpm: all"
    )
    group.add_argument(
        "--eta", type=float,
        help="noise, from 0 (default, deterministic) to 1: ancestral for ddim, full churn for heun",
    )  # fmt: skip
    group.add_argument(
        "--spacing", choices=list(SPACINGS),
        help="of the noise levels; default: the process's own, leading for DDPM, karras for EDM",
    )  # fmt: skip
    group.add_argument("--no_clip", action="store_true", help="do not clip x0 to [-1, 1]")


def sampler_settings(
    denoiser: Denoiser,
    sampler: str | None = None,
    steps: int | None = None,
    eta: float | None = None,
    spacing: str | None = None,
    clip: bool = True,
) -> SamplerSettings:
    """Fills in the defaults of the process and the sampler. Raises UserError for what cannot be."""
    sampler = sampler or denoiser.default_sampler
    row = SAMPLERS[sampler]
    if steps is None:
        steps = denoiser.default_steps if row.steps is None else row.steps or denoiser.n_T
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
    settings = SamplerSettings(sampler, steps, eta, spacing, clip)
    noise_levels(denoiser, settings)
    return settings


def noise_levels(denoiser: Denoiser, settings: SamplerSettings) -> list[float]:
    """The falling noise levels of a sampler, and the final 0. Raises UserError."""
    spacing = settings.spacing or denoiser.default_spacing
    try:
        return SPACINGS[spacing](denoiser, settings.steps)
    except ValueError as error:
        raise UserError(f"--steps {settings.steps}, spacing {spacing}: {error}") from None


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    settings: SamplerSettings,
    indices: list[int],
    seed: int,
    image_shape: tuple[int, int, int],
    use_amp: bool = False,
) -> Tensor:
    """The images with these indices: (N, C, H, W) uint8, on the denoiser's device.

    Starting and step noise depend on the seed and each index alone. Everything outside the
    network is in float64, except on MPS, which has none.
    """
    device = next(denoiser.parameters()).device
    row = SAMPLERS[settings.sampler]
    options = dict(row.options) | (denoiser.churn if row.takes_churn else {})
    if settings.eta is not None:
        options["eta"] = settings.eta
    sigmas = noise_levels(denoiser, settings)
    noise = ImageNoise(seed, indices, image_shape, device)
    dtype = torch.float32 if device.type == "mps" else torch.float64

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        with autocast(device, use_amp):
            return denoiser(x, sigma)

    def draw() -> Tensor:
        return noise.draw().to(dtype)

    D = clipped(denoise) if settings.clip else denoise
    return to_uint8(row.run(D, sigmas[0] * draw(), sigmas, draw, **options))


def settings_of(args: argparse.Namespace, denoiser: Denoiser) -> SamplerSettings:
    """The settings that the arguments of `add_sampler_arguments` name. Raises UserError."""
    return sampler_settings(
        denoiser, args.sampler, args.steps, args.eta, args.spacing, not args.no_clip
    )


def default_samples_folder(save_dir: str | Path, epoch: int, settings: SamplerSettings) -> Path:
    """Where sample.py puts its set: <save_dir>/EMAgenerated_ep59_ddim_steps100_eta0.0."""
    return Path(save_dir) / f"EMAgenerated_ep{epoch}_{settings.tag()}"
