"""From a denoiser and a sampler's name to images; what sample.py, fid.py and training share."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from batches import to_uint8
from errors import UserError
from model.denoiser import Denoiser
from model.samplers import MODES, clipped, sigmas_of
from utils import ImageNoise, autocast


@dataclass(frozen=True)
class SamplerSettings:
    mode: str  # a row of samplers.MODES
    steps: int
    eta: float | None  # None where the mode fixes it
    clip: bool = True

    def tag(self) -> str:
        """For file names: ddim_steps100_eta0.0."""
        eta = "" if self.eta is None else f"_eta{self.eta}"
        return f"{self.mode.lower()}_steps{self.steps}{eta}" + ("" if self.clip else "_noclip")


def add_sampler_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampler")
    group.add_argument("--mode", choices=list(MODES), help="default: the process's own")
    group.add_argument(
        "--steps", type=int, help="network evaluations (default: 100 for DDIM, n_T for DDPM)"
    )
    group.add_argument(
        "--eta", type=float, help="DDIM's noise, 0 (default, deterministic) to 1 (ancestral)"
    )
    group.add_argument("--no_clip", action="store_true", help="do not clip x0 to [-1, 1]")


def sampler_settings(
    denoiser: Denoiser,
    mode: str | None = None,
    steps: int | None = None,
    eta: float | None = None,
    clip: bool = True,
) -> SamplerSettings:
    """Fills in the defaults of the process and the mode. Raises UserError for what cannot be."""
    mode = mode or denoiser.default_mode
    row = MODES[mode]
    if steps is None:
        steps = denoiser.default_steps if row.steps is None else row.steps or denoiser.n_T
    if not 1 <= steps <= denoiser.n_T:
        raise UserError(f"--steps {steps}: give 1 to {denoiser.n_T}")
    if eta is not None and not row.takes_eta:
        raise UserError(f"--eta: --mode {mode} fixes it; leave it out or use --mode DDIM")
    if row.takes_eta:
        eta = 0.0 if eta is None else eta
        if not 0 <= eta <= 1:
            raise UserError(f"--eta {eta}: give 0 (deterministic) to 1 (ancestral)")
    return SamplerSettings(mode, steps, eta, clip)


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

    Starting and step noise depend on the seed and each index alone.
    """
    device = next(denoiser.parameters()).device
    row = MODES[settings.mode]
    options = dict(row.options) if settings.eta is None else {**row.options, "eta": settings.eta}
    sigmas = sigmas_of(denoiser, denoiser.sampling_timesteps(settings.steps))
    noise = ImageNoise(seed, indices, image_shape, device)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        with autocast(device, use_amp):
            return denoiser(x, sigma)

    D = clipped(denoise) if settings.clip else denoise
    return to_uint8(row.sampler(D, sigmas[0] * noise.draw(), sigmas, noise.draw, **options))


def settings_of(args: argparse.Namespace, denoiser: Denoiser) -> SamplerSettings:
    """The settings that the arguments of `add_sampler_arguments` name. Raises UserError."""
    return sampler_settings(denoiser, args.mode, args.steps, args.eta, not args.no_clip)


def default_samples_folder(save_dir: str | Path, epoch: int, settings: SamplerSettings) -> Path:
    """Where sample.py puts its set: <save_dir>/EMAgenerated_ep59_ddim_steps100_eta0.0."""
    return Path(save_dir) / f"EMAgenerated_ep{epoch}_{settings.tag()}"
