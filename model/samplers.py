"""Every sampler: x at sigmas[0] -> x0, knowing only D(x, sigma) and a falling list of sigmas.

All work in the coordinate x = x0 + sigma * n; `sigmas` ends in 0.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from model.denoiser import Denoiser

DenoiseFn = Callable[[Tensor, Tensor], Tensor]  # (N, C, H, W), (N,) -> (N, C, H, W)
NoiseFn = Callable[[], Tensor]  # -> (N, C, H, W), standard normal


def posterior_variance(s: float, s_next: float) -> float:
    """Var[x_next | x, x0] of the forward process: the smaller choice of Ho et al. 2020, 3.2."""
    return s_next**2 * (s**2 - s_next**2) / s**2


def beta_variance(s: float, s_next: float) -> float:
    """The larger choice, beta_t, which the reference takes; 0 for the step that lands on x0."""
    return (s**2 - s_next**2) * (1 + s_next**2) / (1 + s**2) if s_next else 0.0


def ddim(
    D: DenoiseFn,
    x: Tensor,
    sigmas: list[float],
    noise: NoiseFn,
    eta: float = 0.0,
    variance: Callable[[float, float], float] = posterior_variance,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12): deterministic at eta 0, DDPM's ancestral step at eta 1.

    `variance` is that of the noise added at eta 1; the mean is the posterior's at any choice.
    """
    for s, s_next in pairwise(sigmas):
        x0 = D(x, x.new_full((len(x),), s))
        eps = (x - x0) / s
        x = x0 + max(s_next**2 - eta**2 * posterior_variance(s, s_next), 0.0) ** 0.5 * eps
        added = eta * variance(s, s_next) ** 0.5
        if added:
            x = x + added * noise()
    return x


@dataclass(frozen=True)
class Mode:
    """A row of the samplers' table: the function, its fixed options, whether it takes eta, and
    its number of steps (None: the process's own default, 0: every timestep)."""

    sampler: Callable
    options: dict = field(default_factory=dict)
    takes_eta: bool = False
    steps: int | None = None


MODES = {
    "DDIM": Mode(ddim, takes_eta=True),
    "DDPM": Mode(ddim, {"eta": 1.0, "variance": beta_variance}, steps=0),
}


def clipped(D: DenoiseFn) -> DenoiseFn:
    """D with its x0 clipped to [-1, 1]."""
    return lambda x, sigma: D(x, sigma).clamp(-1, 1)


def sigmas_of(denoiser: Denoiser, timesteps: list[int]) -> list[float]:
    """The falling noise levels of ascending timesteps, and the final 0."""
    device = next(denoiser.parameters()).device
    sigmas = denoiser.sigma(torch.tensor(timesteps, device=device))
    return [*reversed(sigmas.tolist()), 0.0]
