"""DDPM (Ho et al. 2020, arXiv 2006.11239) in the coordinate sigma."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from config.schema import DDPMDiffusion
from model.denoiser import ALMOST_0, Denoiser, check_levels, lognormal

MAX_BETA = 0.999  # of the cosine schedule, whose last abar would be 0


def linear_alphas_cumprod(diffusion: DDPMDiffusion) -> np.ndarray:
    """abar_1 .. abar_{n_T} in float64 for betas linear from the first to the second."""
    return np.cumprod(1 - np.linspace(*diffusion.betas, diffusion.n_T, dtype=np.float64))


def scaled_linear_alphas_cumprod(diffusion: DDPMDiffusion) -> np.ndarray:
    """The same for sqrt(beta) linear, as in latent diffusion (Rombach et al. 2022)."""
    first, last = np.sqrt(diffusion.betas)
    return np.cumprod(1 - np.linspace(first, last, diffusion.n_T, dtype=np.float64) ** 2)


def cosine_alphas_cumprod(diffusion: DDPMDiffusion) -> np.ndarray:
    """abar_t = f(t) / f(0), f(t) = cos^2((t / n_T + 0.008) / 1.008 * pi / 2) (Nichol and Dhariwal
    2021, eq. 17), with no beta above 0.999."""
    t = np.arange(diffusion.n_T + 1) / diffusion.n_T
    f = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], MAX_BETA))


SCHEDULES = {
    "linear": linear_alphas_cumprod,
    "scaled_linear": scaled_linear_alphas_cumprod,
    "cosine": cosine_alphas_cumprod,
}


def alpha(sigma: Tensor) -> Tensor:
    """sqrt(abar) at this noise level."""
    return (1 + sigma**2).rsqrt()


OBJECTIVES = {  # what the network predicts: c_skip and c_out of D = c_skip x + c_out F
    "eps": (torch.ones_like, lambda sigma: -sigma),
    "x0": (torch.zeros_like, torch.ones_like),
    # v = sqrt(abar) eps - sqrt(1 - abar) x0 (Salimans and Ho 2022, arXiv 2202.00512)
    "v": (lambda sigma: alpha(sigma) ** 2, lambda sigma: -alpha(sigma) * sigma),
}


def _discrete(process: "DDPM", u: Tensor) -> Tensor:
    return process.sigma((u * process.n_T).long().clamp(max=process.n_T - 1) + 1)


def _continuous(process: "DDPM", u: Tensor) -> Tensor:
    return process.sigma(u * process.n_T)


def _lognormal(process: "DDPM", u: Tensor) -> Tensor:
    sigma = lognormal(u, process.diffusion.p_mean, process.diffusion.p_std)
    return sigma.clamp(process.sigmas[0], process.sigmas[-1])


TRAINING_SIGMA = {"discrete": _discrete, "continuous": _continuous, "lognormal": _lognormal}


class DDPM(Denoiser):
    """sigma_t = sqrt((1 - abar_t) / abar_t) for t = 1 .. n_T, so that
    x / sqrt(1 + sigma^2) = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps (eq. 4)."""

    default_sampler = "ddim"
    default_steps = 100
    default_spacing = "leading"
    probe_timesteps = (1, 11, 21)
    more_noise = (
        "raise diffusion.betas (with fewer timesteps, in proportion), or take "
        "diffusion.schedule=cosine"
    )

    def __init__(self, net: nn.Module, diffusion: DDPMDiffusion):
        super().__init__(net)
        self.n_T = diffusion.n_T
        self.default_steps = min(self.default_steps, self.n_T)  # spacing by timesteps takes no more
        self.probe_timesteps = tuple(t for t in self.probe_timesteps if t <= self.n_T)
        self.diffusion = diffusion
        self._c_skip, self._c_out = OBJECTIVES[diffusion.objective]
        abar = SCHEDULES[diffusion.schedule](diffusion)
        with np.errstate(divide="ignore"):
            sigmas = np.sqrt((1 - abar) / abar)
        check_levels(sigmas, "lower n_T or betas", "raise betas")
        sigmas = torch.tensor(sigmas.astype(np.float32))
        self.register_buffer("sigmas", sigmas, persistent=False)

    def sigma(self, t: Tensor) -> Tensor:
        """Log-linear between whole t; below t = 1, where beta is constant, sigma_1 sqrt(t)."""
        low = t.long().clamp(1, self.n_T)
        s, above = self.sigmas[low - 1], self.sigmas[low.clamp(max=self.n_T - 1)]
        between = s * (above / s) ** (t - low).clamp(min=0)
        return between * t.clamp(ALMOST_0, 1).sqrt()

    def t(self, sigma: Tensor) -> Tensor:
        """The fractional timestep: linear in log sigma, exact at integers, clamped to 1..n_T."""
        sigma = sigma.float().clamp(self.sigmas[0], self.sigmas[-1])
        above = torch.searchsorted(self.sigmas, sigma).clamp(1, self.n_T - 1)
        low, high = self.sigmas[above - 1], self.sigmas[above]
        return above + torch.log(sigma / low) / torch.log(high / low)

    def training_sigma(self, u: Tensor) -> Tensor:
        """That of the config's `time`: of whole t, of all t, or log-normal."""
        return TRAINING_SIGMA[self.diffusion.time](self, u)

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """1, or min(SNR, gamma) c_out^2 with the weighting min_snr: (N,)."""
        if self.diffusion.weighting == "simple":
            return torch.ones_like(sigma)
        snr = sigma**-2  # min-SNR-gamma (Hang et al. 2023, arXiv 2303.09556), w = min(SNR, gamma)
        return snr.clamp(max=self.diffusion.gamma) * self.c_out(sigma) ** 2

    def c_in(self, sigma: Tensor) -> Tensor:
        """1 / sqrt(1 + sigma^2)."""
        return alpha(sigma)

    def c_skip(self, sigma: Tensor) -> Tensor:
        """That of the objective, see OBJECTIVES."""
        return self._c_skip(sigma)

    def c_out(self, sigma: Tensor) -> Tensor:
        """That of the objective, see OBJECTIVES."""
        return self._c_out(sigma)

    def c_noise(self, sigma: Tensor) -> Tensor:
        """t / n_T, in (0, 1]."""
        return self.t(sigma) / self.n_T
