"""Denoisers of networks that were trained on another range than [-1, 1]."""

from torch import Tensor

from model.denoiser import Denoiser

# --input_scale: (scale, shift) of what the network was trained on, z0 = scale * x0 + shift.
# The public tiny-ddae normalises twice: its z0 = 2 x0 - 1 is in [-3, 1].
INPUT_SCALES = {"tiny-ddae": (2.0, -1.0)}


class RescaledDenoiser(Denoiser):
    """D(x, sigma) around a denoiser D_z of z0 = scale * x0 + shift, for images x0 in [-1, 1].

    x = x0 + sigma n is z = z0 + scale * sigma n, so D(x, sigma) = (D_z(z, scale * sigma) - shift)
    / scale. A timestep t is what it was in training, sigma_t of z: hence sigma_t / scale here.
    Around the image that z = 0 stands for, this is a denoiser with coefficients of its own.
    """

    def __init__(self, trained: Denoiser, scale: float, shift: float):
        super().__init__(trained.net)
        self.trained, self.scale, self.centre = trained, scale, -shift / scale
        for name in ("default_sampler", "default_steps", "default_spacing", "probe_timesteps",
                     "n_T", "rho"):  # fmt: skip
            setattr(self, name, getattr(trained, name))
        sigmas = {"S_min", "S_max"}  # S_noise is a factor, and stays
        self.churn = {k: v / scale if k in sigmas else v for k, v in trained.churn.items()}

    def forward(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        """D(x, sigma): (N, C, H, W), like x."""
        return self.centre + super().forward(x - self.centre, sigma, y)

    def loss(self, x0: Tensor, *args, **kwargs) -> Tensor:
        """That of the trained denoiser, per image: (N,)."""
        return super().loss(x0 - self.centre, *args, **kwargs)

    def features(self, x0: Tensor, *args, **kwargs) -> dict[str, Tensor]:
        """See `Denoiser.features`; x0 in [-1, 1]."""
        return super().features(x0 - self.centre, *args, **kwargs)

    def sigma(self, t: Tensor) -> Tensor:
        """sigma_t of z, over the scale."""
        return self.trained.sigma(t) / self.scale

    def t(self, sigma: Tensor) -> Tensor:
        """The inverse of `sigma`."""
        return self.trained.t(self.scale * sigma)

    def training_sigma(self, u: Tensor) -> Tensor:
        """What the trained one saw, over the scale."""
        return self.trained.training_sigma(u) / self.scale

    def c_in(self, sigma: Tensor) -> Tensor:
        """scale * c_in(scale * sigma) of the trained one."""
        return self.scale * self.trained.c_in(self.scale * sigma)

    def c_skip(self, sigma: Tensor) -> Tensor:
        """c_skip(scale * sigma) of the trained one."""
        return self.trained.c_skip(self.scale * sigma)

    def c_out(self, sigma: Tensor) -> Tensor:
        """c_out(scale * sigma) / scale of the trained one."""
        return self.trained.c_out(self.scale * sigma) / self.scale

    def c_noise(self, sigma: Tensor) -> Tensor:
        """c_noise(scale * sigma) of the trained one."""
        return self.trained.c_noise(self.scale * sigma)

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """loss_weight(scale * sigma) of the trained one."""
        return self.trained.loss_weight(self.scale * sigma)
