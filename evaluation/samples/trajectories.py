"""How images come out of the noise, and between two noises."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import TrainedModel
from datasets import to_uint8
from evaluation.plots import image_table, subject
from evaluation.samples.grids import save_png
from model.denoiser import Denoiser
from sampling import SamplerSettings, sample

COLUMNS = 10  # shown, the last one is the image


def slerp(a: Tensor, b: Tensor, part: Tensor) -> Tensor:
    """Spherical interpolation (Shoemake 1985): a, b: (C, H, W), part: (N,) in 0..1 -> (N, C, H, W).

    Noise stays as long as noise is, which a straight line between a and b would not.
    """
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = cosine.clamp(-1, 1).acos()
    part = part.view(-1, 1, 1, 1)
    if angle < 1e-4:
        return a + part * (b - a)
    return (((1 - part) * angle).sin() * a + (part * angle).sin() * b) / angle.sin()


class Trajectory:
    """What the first `n` images of a batch look like while `sample` draws them, with `watch`.

    x is shown divided by sqrt(1 + sigma^2), as the DDPM paper writes it. `decode` is that of the
    denoiser.
    """

    def __init__(self, n: int, decode: Callable[[Tensor], Tensor] = lambda x: x):
        self.n, self.decode = n, decode
        self.seen: list[tuple[float, Tensor, Tensor]] = []

    def watch(self, x: Tensor, sigma: float, x0: Tensor) -> None:
        """Keeps one step: x, x0: (N, C, H, W) at the noise level sigma."""
        x, x0 = x[: self.n] / (1 + sigma**2) ** 0.5, x0[: self.n]
        shown = [to_uint8(self.decode(image)).cpu() for image in (x, x0)]
        self.seen.append((sigma, *shown))

    def titles(self, denoiser: Denoiser) -> list[str]:
        """Of the columns of `table`."""
        sigmas = torch.tensor([sigma for sigma, *_ in self._shown()])
        t = denoiser.t(sigmas.to(denoiser.device))
        pairs = zip(t.tolist(), sigmas.tolist(), strict=True)
        return [*(f"t = {t:.4g}\n$\\sigma$ = {sigma:.3g}" for t, sigma in pairs), "image"]

    def table(self, final: Tensor, predicted: bool = False) -> Tensor:
        """(n, columns, C, H, W) uint8: x, or the predicted x0, at chosen noise levels, and last
        the images, `final`: (n or more, C, H, W) uint8 on the CPU."""
        columns = [x0 if predicted else x for _, x, x0 in self._shown()]
        return torch.stack([*columns, final[: len(columns[0])]], dim=1)

    def save(
        self,
        path: Path,
        model: TrainedModel,
        settings: SamplerSettings,
        final: Tensor,
        predicted: bool = False,
    ) -> None:
        """Writes `table` as one picture."""
        caption = "predicted x0" if predicted else "x / sqrt(1 + sigma^2)"
        what = subject(model.config.dataset, model.config.model_type)
        title = f"{what}, {model.stage}, {settings.tag()}: {caption}"
        image_table(path, self.table(final, predicted), self.titles(model.denoiser), title)

    def _shown(self) -> list[tuple[float, Tensor, Tensor]]:
        chosen = torch.linspace(0, len(self.seen) - 1, COLUMNS - 1).round().int().unique()
        return [self.seen[i] for i in chosen.tolist()]


def save_trajectory(
    folder: Path,
    model: TrainedModel,
    settings: SamplerSettings,
    indices: list[int],
    use_amp: bool,
    save_x0: bool,
) -> None:
    """Writes trajectory.png, x at chosen noise levels down to the image, and each of its images
    as intermediate/<index>_<column>.png; with `save_x0` also the predicted x0, as x0_*."""
    trajectory = Trajectory(len(indices), model.denoiser.decode)
    shape, seed = model.config.network.image_shape, model.config.seed
    final = sample(model.denoiser, settings, indices, seed, shape, use_amp, trajectory.watch).cpu()
    kinds = [("trajectory.png", "", False)]
    if save_x0:
        kinds.append(("trajectory_x0.png", "x0_", True))
    for name, prefix, predicted in kinds:
        trajectory.save(folder / name, model, settings, final, predicted)
        for index, row in zip(indices, trajectory.table(final, predicted), strict=True):
            for column, image in enumerate(row):
                save_png(folder / "intermediate" / f"{prefix}{index}_{column}.png", image)
