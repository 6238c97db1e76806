"""DDPM (Ho et al. 2020, arXiv 2006.11239) in the coordinate sigma: eps prediction, linear betas."""

import numpy as np
import torch
from torch import Tensor, nn

from config.schema import DDPMDiffusion
from model.denoiser import Denoiser


def linear_alphas_cumprod(n_T: int, betas: tuple[float, float]) -> np.ndarray:
    """abar_1 .. abar_{n_T} in float64 for betas linear from the first to the second."""
    return np.cumprod(1 - np.linspace(*betas, n_T, dtype=np.float64))


class DDPM(Denoiser):
    """sigma_t = sqrt((1 - abar_t) / abar_t) for t = 1 .. n_T, so that
    x / sqrt(1 + sigma^2) = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps (eq. 4)."""

    default_sampler = "ddim"
    default_steps = 100
    default_spacing = "leading"
    probe_timesteps = (1, 11, 21)

    def __init__(self, net: nn.Module, diffusion: DDPMDiffusion):
        super().__init__(net)
        self.n_T = diffusion.n_T
        abar = linear_alphas_cumprod(diffusion.n_T, diffusion.betas)
        sigmas = torch.tensor(np.sqrt((1 - abar) / abar), dtype=torch.float32)
        self.register_buffer("sigmas", sigmas, persistent=False)

    def sigma(self, t: Tensor) -> Tensor:
        low = t.long().clamp(1, self.n_T)
        s, above = self.sigmas[low - 1], self.sigmas[low.clamp(max=self.n_T - 1)]
        return s * (above / s) ** (t - low)

    def t(self, sigma: Tensor) -> Tensor:
        """The fractional timestep: linear in log sigma, exact at integers, clamped to 1..n_T."""
        sigma = sigma.float().clamp(self.sigmas[0], self.sigmas[-1])
        above = torch.searchsorted(self.sigmas, sigma).clamp(1, self.n_T - 1)
        low, high = self.sigmas[above - 1], self.sigmas[above]
        return above + torch.log(sigma / low) / torch.log(high / low)

    def training_sigma(self, u: Tensor) -> Tensor:
        return self.sigma((u * self.n_T).long().clamp(max=self.n_T - 1) + 1)

    def c_in(self, sigma: Tensor) -> Tensor:
        return (1 + sigma**2).rsqrt()

    def c_skip(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)

    def c_out(self, sigma: Tensor) -> Tensor:
        return -sigma

    def c_noise(self, sigma: Tensor) -> Tensor:
        return self.t(sigma) / self.n_T
