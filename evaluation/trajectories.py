"""How images come out of the noise, and between two noises."""

from pathlib import Path

import torch
from torch import Tensor

from batches import to_uint8
from checkpoint import TrainedModel
from evaluation.grids import save_png
from evaluation.plots import image_table
from sampling import SamplerSettings, sample

COLUMNS = 10  # steps shown


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


def save_trajectory(
    folder: Path,
    model: TrainedModel,
    settings: SamplerSettings,
    indices: list[int],
    use_amp: bool,
    save_x0: bool,
) -> None:
    """Writes trajectory.png, x at chosen noise levels down to the image, and each of its images
    as intermediate/<index>_<column>.png; with `save_x0` also the predicted x0, as x0_*.

    x is shown divided by sqrt(1 + sigma^2), as the DDPM paper writes it.
    """
    seen: list[tuple[float, Tensor, Tensor]] = []

    def watch(x: Tensor, sigma: float, x0: Tensor) -> None:
        seen.append((sigma, to_uint8(x / (1 + sigma**2) ** 0.5).cpu(), to_uint8(x0).cpu()))

    shape, seed = model.config.network.image_shape, model.config.seed
    final = sample(model.denoiser, settings, indices, seed, shape, use_amp, watch).cpu()
    last = len(seen) - 1
    shown = sorted({round(i * last / (COLUMNS - 2)) for i in range(COLUMNS - 1)})
    titles = [*(rf"$\sigma$ = {seen[i][0]:.3g}" for i in shown), "image"]
    what = f"{model.config.dataset}, epoch {model.epoch}, {settings.tag()}"
    kinds = [("trajectory.png", "", 1, "x / sqrt(1 + sigma^2)")]
    if save_x0:
        kinds.append(("trajectory_x0.png", "x0_", 2, "predicted x0"))
    for name, prefix, part, caption in kinds:
        images = torch.stack([*(seen[i][part] for i in shown), final], dim=1)
        image_table(folder / name, images, titles, f"{what}: {caption}")
        for row, index in enumerate(indices):
            for column in range(len(titles)):
                path = folder / "intermediate" / f"{prefix}{index}_{column}.png"
                save_png(path, images[row, column])
