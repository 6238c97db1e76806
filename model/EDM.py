"""EDM (Karras et al. 2022, arXiv 2206.00364): the right column of table 1."""

import math

from torch import Tensor, nn

from config.schema import EDMDiffusion
from model.denoiser import Denoiser, lognormal


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
        self.sigma_min, self.sigma_max, self.rho = d.sigma_min, d.sigma_max, d.rho
        S_max = math.inf if d.S_max is None else d.S_max
        self.churn = {"S_min": d.S_min, "S_max": S_max, "S_noise": d.S_noise}

    def sigma(self, t: Tensor) -> Tensor:
        """The rho grid of 18 steps (eq. 5), counted from sigma_min."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + (t - 1) / (self.n_T - 1) * (high - low)) ** self.rho  # eq. 5

    def t(self, sigma: Tensor) -> Tensor:
        """The place on that grid, between whole ones too; clamped to 1..18."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        part = (sigma ** (1 / self.rho) - low) / (high - low)
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
