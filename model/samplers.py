"""Every sampler: x at sigmas[0] -> x0, knowing only D(x, sigma) and a falling list of sigmas.

All work in the coordinate x = x0 + sigma * n; `sigmas` ends in 0.
"""

import math
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


def heun(
    D: DenoiseFn,
    x: Tensor,
    sigmas: list[float],
    noise: NoiseFn,
    eta: float = 0.0,
    S_min: float = 0.0,
    S_max: float = float("inf"),
    S_noise: float = 1.0,
) -> Tensor:
    """Heun's second-order method with churn (Karras et al. 2022, algorithm 2).

    Between S_min and S_max every step first adds noise, which raises sigma by the part
    (sqrt(2) - 1) * eta: none at eta 0, the most that the paper allows at eta 1. Two evaluations a
    step, one in the last.
    """
    for s, s_next in pairwise(sigmas):
        if eta and S_min <= s <= S_max:
            s_hat = s * (1 + (2**0.5 - 1) * eta)
            x = x + S_noise * (s_hat**2 - s**2) ** 0.5 * noise()
            s = s_hat
        slope = (x - D(x, x.new_full((len(x),), s))) / s
        x_next = x + (s_next - s) * slope
        if s_next:
            slope_next = (x_next - D(x_next, x.new_full((len(x),), s_next))) / s_next
            x_next = x + (s_next - s) * (slope + slope_next) / 2
        x = x_next
    return x


def dpmpp_2m(D: DenoiseFn, x: Tensor, sigmas: list[float], noise: NoiseFn) -> Tensor:
    """DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095, algorithm 2); first order in the first
    step and in the one that lands on x0."""
    x0_before, h_before = None, None
    for s, s_next in pairwise(sigmas):
        x0 = D(x, x.new_full((len(x),), s))
        h = math.log(s / s_next) if s_next else math.inf
        direction = x0
        if h_before is not None and s_next:
            direction = x0 + (x0 - x0_before) * h / (2 * h_before)
        x = s_next / s * x + (1 - s_next / s) * direction
        x0_before, h_before = x0, h
    return x


def ipndm(D: DenoiseFn, x: Tensor, sigmas: list[float], noise: NoiseFn) -> Tensor:
    """iPNDM of order 4 (Zhang and Chen 2023, arXiv 2204.13902): Adams-Bashforth's formulas for
    equal steps on the slopes dx/dsigma, of lower order until there are four; on other grids of
    second order. The step that lands on x0 is Euler's."""
    slopes: list[Tensor] = []  # the newest first
    for s, s_next in pairwise(sigmas):
        slopes = [(x - D(x, x.new_full((len(x),), s))) / s, *slopes[: 3 if s_next else 0]]
        weights = ADAMS_BASHFORTH[len(slopes)]
        x = x + (s_next - s) * sum(w * d for w, d in zip(weights, slopes, strict=True))
    return x


ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def sde(D: DenoiseFn, x: Tensor, sigmas: list[float], noise: NoiseFn) -> Tensor:
    """Euler-Maruyama on the reverse SDE (Song et al. 2021, arXiv 2011.13456, eq. 6) with sigma^2
    as time; the step that lands on x0 adds no noise."""
    for s, s_next in pairwise(sigmas):
        x = _reverse_step(D, x, s, s_next, noise)
    return x


def pc(D: DenoiseFn, x: Tensor, sigmas: list[float], noise: NoiseFn, snr: float = 0.16) -> Tensor:
    """Predictor-corrector (Song et al. 2021, algorithms 2 and 4): the step of `sde`, then one of
    Langevin dynamics, whose size `snr` sets for each image."""
    for s, s_next in pairwise(sigmas):
        x = _reverse_step(D, x, s, s_next, noise)
        if s_next:
            z = noise()
            score = (D(x, x.new_full((len(x),), s_next)) - x) / s_next**2
            size = 2 * (snr * _norm(z) / _norm(score)) ** 2
            x = x + size * score + (2 * size).sqrt() * z
    return x


def _reverse_step(D: DenoiseFn, x: Tensor, s: float, s_next: float, noise: NoiseFn) -> Tensor:
    variance = s**2 - s_next**2
    x = x + variance * (D(x, x.new_full((len(x),), s)) - x) / s**2
    return x + variance**0.5 * noise() if s_next else x


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class Sampler:
    """A row of the samplers' table: the function, its fixed options, whether it takes eta and
    the process's churn, whether it adds no noise (at eta 0), its evaluations of D per step (one
    in the last), and its number of steps (None: the process's own, 0: every timestep)."""

    run: Callable
    options: dict = field(default_factory=dict)
    takes_eta: bool = False
    takes_churn: bool = False
    deterministic: bool = True
    per_step: int = 1
    steps: int | None = None


SAMPLERS = {
    "ddim": Sampler(ddim, takes_eta=True),
    "ddpm": Sampler(ddim, {"eta": 1.0, "variance": beta_variance}, deterministic=False, steps=0),
    "heun": Sampler(heun, takes_eta=True, takes_churn=True, per_step=2),
    "dpmpp_2m": Sampler(dpmpp_2m),
    "ipndm": Sampler(ipndm),
    "pc": Sampler(pc, deterministic=False, per_step=2),
    "sde": Sampler(sde, deterministic=False),
}


def clipped(D: DenoiseFn) -> DenoiseFn:
    """D with its x0 clipped to [-1, 1]."""
    return lambda x, sigma: D(x, sigma).clamp(-1, 1)


def guided(D: Callable[..., Tensor], y: Tensor, w: float) -> DenoiseFn:
    """D_u + w (D_c - D_u), with D_c the denoiser of the classes y: (N,) and D_u that of no class
    (Ho and Salimans 2022, arXiv 2207.12598; their w is ours less 1)."""
    if w == 0:
        return lambda x, sigma: D(x, sigma, None)
    if w == 1:
        return lambda x, sigma: D(x, sigma, y)
    nothing = torch.full_like(y, -1)

    def evaluate(x: Tensor, sigma: Tensor) -> Tensor:
        both = D(torch.cat((x, x)), torch.cat((sigma, sigma)), torch.cat((nothing, y)))
        D_u, D_c = both.chunk(2)
        return D_u + w * (D_c - D_u)

    return evaluate


# where the noise levels lie: (denoiser, steps, the highest sigma) -> so many, falling, and 0


def leading(denoiser: Denoiser, steps: int, sigma_max: float) -> list[float]:
    """t = 1 + floor(i n / steps), n that of sigma_max: the reference's 1, 11, .. 991 for 100."""
    n = last_timestep(denoiser, sigma_max)
    if steps < n < denoiser.n_T:
        raise ValueError(
            f"it starts below --sigma_max, at t = {1 + (steps - 1) * n // steps} and not {n}; "
            "--spacing trailing, karras or log_snr start there"
        )
    return _sigmas_of(denoiser, [1 + i * n // steps for i in reversed(range(steps))], n)


def trailing(denoiser: Denoiser, steps: int, sigma_max: float) -> list[float]:
    """t = round(n (1 - i / steps)), n that of sigma_max, where it starts (Lin et al. 2023)."""
    n = last_timestep(denoiser, sigma_max)
    return _sigmas_of(denoiser, [round((steps - i) * n / steps) for i in range(steps)], n)


def last_timestep(denoiser: Denoiser, sigma_max: float) -> int:
    """The t whose noise level is nearest to sigma_max."""
    return round(denoiser.t(torch.tensor([sigma_max], device=denoiser.device)).item())


def _sigmas_of(denoiser: Denoiser, t: list[int], n: int) -> list[float]:
    if len(t) > n:
        raise ValueError(f"there are {n} timesteps; --spacing karras or log_snr takes any number")
    return [*denoiser.sigma(torch.tensor(t, device=denoiser.device)).tolist(), 0.0]


def karras(denoiser: Denoiser, steps: int, sigma_max: float) -> list[float]:
    """Equal steps of sigma^(1 / rho) from the highest to the lowest (Karras et al. 2022, eq. 5)."""
    low, high = (s ** (1 / denoiser.rho) for s in (denoiser.sigma_range[0], sigma_max))
    last = max(steps - 1, 1)
    return [*((high + i / last * (low - high)) ** denoiser.rho for i in range(steps)), 0.0]


def log_snr(denoiser: Denoiser, steps: int, sigma_max: float) -> list[float]:
    """Equal steps of log SNR = -2 log sigma, from the highest sigma to the lowest."""
    low, high = denoiser.sigma_range[0], sigma_max
    last = max(steps - 1, 1)
    return [*(high * (low / high) ** (i / last) for i in range(steps)), 0.0]


SPACINGS = {"leading": leading, "trailing": trailing, "karras": karras, "log_snr": log_snr}
