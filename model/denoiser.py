"""The denoiser D(x, sigma, y) -> x0: all that a sampler, a probe or a classifier sees.

Noise is a standard deviation: x = x0 + sigma * n, with x0 in [-1, 1] and n ~ N(0, I).
A process (DDPM, EDM) is a schedule and the coefficients of Karras et al. 2022
(arXiv 2206.00364), eq. 7: D(x; sigma) = c_skip * x + c_out * F(c_in * x; c_noise).
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from model.diffusers_networks import Codec
from support.errors import UserError

ALMOST_0 = 2.0**-24  # the step of float32 uniforms: keeps a continuous sigma in (0, inf)


class Denoiser(nn.Module, ABC):
    """Base of the processes. `net` is F(c_in * x, c_noise, y=None, blocks=None): see UNet.forward.

    The abstract methods take a tensor and return one of the same shape.
    """

    default_sampler: ClassVar[str]  # of sample.py, by its name in model/samplers.py
    default_steps: int
    default_spacing: ClassVar[str]  # of the sampler's noise levels, by its name there
    probe_timesteps: ClassVar[tuple[int, ...]]  # the grid of the linear probe
    more_noise: ClassVar[str]  # advice: what raises the highest noise level

    n_T: int  # timesteps that people type run from 1 (almost clean) to n_T (almost pure noise)
    rho: float = 7.0  # of the "karras" spacing
    churn: Mapping[str, float] = {}  # heun's S_min, S_max and S_noise

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.classes: int = getattr(net, "classes", 0)  # labels it is conditioned on; 0: none

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """The noise level of the timesteps t in 1..n_T, integers or between."""

    @abstractmethod
    def t(self, sigma: Tensor) -> Tensor:
        """The inverse of `sigma`, clamped to 1..n_T."""

    @abstractmethod
    def training_sigma(self, u: Tensor) -> Tensor:
        """The training distribution of sigma as a function of u, uniform in [0, 1).

        Increasing, so that equal buckets of u are equal buckets of the noise level.
        """

    @abstractmethod
    def c_in(self, sigma: Tensor) -> Tensor:
        """Scales the network's input."""

    @abstractmethod
    def c_skip(self, sigma: Tensor) -> Tensor:
        """The share of x in D."""

    @abstractmethod
    def c_out(self, sigma: Tensor) -> Tensor:
        """Scales the network's output."""

    @abstractmethod
    def c_noise(self, sigma: Tensor) -> Tensor:
        """What the network is told of the noise level."""

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """w(sigma) c_out^2, the weight of the network's own squared error: like sigma."""
        return torch.ones_like(sigma)

    @property
    def device(self) -> torch.device:
        """That of its weights."""
        return next(self.parameters()).device

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The lowest and the highest noise level, those of t = 1 and t = n_T."""
        ends = torch.tensor([1, self.n_T], device=self.device)
        low, high = self.sigma(ends).tolist()
        return low, high

    @property
    def block_names(self) -> list[str]:
        """The decoder blocks, out_1 .. out_n from the lowest resolution up."""
        return self.net.block_names

    @property
    def codec(self) -> Codec | None:
        """What stands between images and x0; None where x0 is an image in [-1, 1]."""
        return getattr(self.net, "codec", None)

    @property
    def is_latent(self) -> bool:
        """Whether x0 is no image, and has no bounds."""
        return self.codec is not None and self.codec.vae is not None

    def decode(self, x0: Tensor) -> Tensor:
        """x0: (N, C, H, W) -> images (N, C', H', W'), near [-1, 1]."""
        return x0 if self.codec is None else self.codec.decode(x0)

    def forward(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        """x: (N, C, H, W), sigma: (N,) -> the expected clean image, (N, C, H, W), unclipped.

        y: (N,), the labels for a class-conditional network; None, or -1 for an image: no label.

        In the precision of x; the network itself gets float32.
        """
        s = _per_image(sigma)
        f = self._net(self.c_in(s) * x, self.c_noise(sigma), y=y)
        return self.c_skip(s) * x + self.c_out(s) * f

    def loss(
        self,
        x0: Tensor,
        sigma: Tensor,
        noise: Tensor,
        y: Tensor | None = None,
        augment: Tensor | None = None,
        blocks: Collection[str] | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The weighted mean squared error per image: (N,).

        w(sigma) |D - x0|^2, computed as w c_out^2 |F - target|^2: `loss_weight` is w c_out^2,
        so that no large weight meets a small error.

        x0: (N, C, H, W) in [-1, 1], sigma: (N,), noise: like x0, standard normal, y: (N,)
        labels, augment: (N, augment_dim), how x0 was augmented. For eps prediction this is DDPM's
        L_simple (Ho et al. 2020, eq. 14), for EDM eq. 8 of Karras et al. 2022.

        With `blocks`, beside it what `features` gives of the same pass: (loss, {name: (N, C)}).
        """
        s = _per_image(sigma)
        x = x0 + s * noise
        given = {"augment": augment, "y": y}
        if blocks:
            given |= {"blocks": blocks, "with_output": True}
        f = self._net(self.c_in(s) * x, self.c_noise(sigma), **given)
        f, features = f if blocks else (f, None)
        target = (x0 - self.c_skip(s) * x) / self.c_out(s)
        loss = self.loss_weight(sigma) * (f.float() - target).square().mean(dim=(1, 2, 3))
        return (loss, features) if blocks else loss

    def features(
        self,
        x0: Tensor,
        t: float | Tensor,
        noise: Tensor,
        blocks: Collection[str],
        augment: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Spatial means of the named decoder blocks on x0 + sigma_t * noise: {name: (N, C)}.

        x0, noise: (N, C, H, W); t: one for all or (N,), in 1..n_T, whole or between; augment:
        (N, augment_dim), how x0 was augmented. Raises ValueError for a block that the network does
        not have.
        """
        unknown = set(blocks) - set(self.block_names)
        if unknown or not blocks:
            raise ValueError(f"no block {sorted(unknown)}; there are {', '.join(self.block_names)}")
        sigma = self.sigma(torch.as_tensor(t, device=x0.device).expand(len(x0)))
        s = _per_image(sigma)
        x = self.c_in(s) * (x0 + s * noise)
        told = {} if augment is None else {"augment": augment}
        return self._net(x, self.c_noise(sigma), blocks=blocks, **told)

    def _net(self, x: Tensor, c_noise: Tensor, **conditions: Any) -> Tensor | dict[str, Tensor]:
        return self.net(x.float(), c_noise.float(), **conditions)


def check_levels(sigmas: np.ndarray, lower: str, higher: str) -> None:
    """Raises UserError unless these noise levels, of t = 1 .. n_T, rise from above 0 to one whose
    square is finite, in float32. lower, higher: advice, what makes the levels so."""
    last = float(sigmas[-1])
    if not last**2 <= np.finfo(np.float32).max:
        raise UserError(
            f"diffusion: the last noise level is too large to compute with ({last:.3g}): {lower}"
        )
    found = sigmas.astype(np.float32)
    if not (found[0] > 0 and (found[1:] > found[:-1]).all()):
        raise UserError(
            f"diffusion: some noise levels are 0, or no higher than those before: {higher}"
        )


def lognormal(u: Tensor, mean: float, std: float) -> Tensor:
    """sigma whose logarithm is normal with this mean and standard deviation, as an increasing
    function of u, uniform in [0, 1) (Karras et al. 2022, table 1)."""
    return (mean + std * torch.special.ndtri(u.clamp(ALMOST_0, 1 - ALMOST_0))).exp()


def _per_image(sigma: Tensor) -> Tensor:
    return sigma.view(-1, 1, 1, 1)
