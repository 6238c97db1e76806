"""EDM (Karras et al. 2022, arXiv 2206.00364): the right column of table 1."""

import math

import torch
from torch import Tensor, nn

from config.schema import EDMDiffusion
from model.denoiser import Denoiser, check_levels, lognormal


class EDM(Denoiser):
    """D = c_skip x + c_out F with unit variance of the input and target of F.

    The timesteps of the probe, t = 1 .. 18, count the sampler's grid of 18 steps from the clean
    end, as in the tables of Xiang et al. 2023: t = 4 is sigma = 0.060.
    """

    default_sampler = "heun"
    default_steps = 18
    default_spacing = "karras"
    probe_timesteps = (3, 4, 5)
    more_noise = "raise diffusion.sigma_max"
    n_T = 18

    def __init__(self, net: nn.Module, diffusion: EDMDiffusion):
        super().__init__(net)
        d = diffusion
        self.sigma_data, self.p_mean, self.p_std = d.sigma_data, d.p_mean, d.p_std
        self.rho = d.rho
        self.low, self.high = _root(d.sigma_min, d.rho), _root(d.sigma_max, d.rho)
        levels = self.sigma(torch.arange(1, self.n_T + 1, device="cpu"))
        check_levels(
            levels.numpy(), "lower sigma_max, or take rho 7", "raise sigma_min, or take rho 7"
        )
        S_max = math.inf if d.S_max is None else d.S_max
        self.churn = {"S_min": d.S_min, "S_max": S_max, "S_noise": d.S_noise}

    def sigma(self, t: Tensor) -> Tensor:
        """The rho grid of 18 steps (eq. 5), counted from sigma_min."""
        return (self.low + (t - 1) / (self.n_T - 1) * (self.high - self.low)) ** self.rho

    def t(self, sigma: Tensor) -> Tensor:
        """The place on that grid, between whole ones too; clamped to 1..18."""
        part = (sigma ** (1 / self.rho) - self.low) / (self.high - self.low)
        return 1 + (self.n_T - 1) * part.clamp(0, 1)

    def training_sigma(self, u: Tensor) -> Tensor:
        """Log-normal: ln(sigma) ~ N(p_mean, p_std^2)."""
        return lognormal(u, self.p_mean, self.p_std)

    def c_in(self, sigma: Tensor) -> Tensor:
        """1 / sqrt(sigma^2 + sigma_data^2)."""
        return (sigma**2 + self.sigma_data**2).rsqrt()

    def c_skip(self, sigma: Tensor) -> Tensor:
        """sigma_data^2 / (sigma^2 + sigma_data^2)."""
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)

    def c_out(self, sigma: Tensor) -> Tensor:
        """sigma sigma_data / sqrt(sigma^2 + sigma_data^2)."""
        return sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()

    def c_noise(self, sigma: Tensor) -> Tensor:
        """ln(sigma) / 4."""
        return sigma.log() / 4


def _root(sigma: float, rho: float) -> float:
    try:
        return sigma ** (1 / rho)
    except OverflowError:
        return math.inf
