"""The pictures of a training run, <save_dir>/visual/, which are renewed while it trains."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from checkpoint import TrainedModel
from datasets import Dataset
from evaluation.plots import loss_by_bucket, loss_curve, subject
from evaluation.samples.grids import rows_by_class, save_image_grid
from evaluation.samples.trajectories import Trajectory
from model.denoiser import Denoiser
from sampling import SamplerSettings, labels_of
from support.files import has_form
from training.loss_sums import BUCKETS

NUMBER = int | float
TRAINED = {"loss": NUMBER, "loss_by_t": [NUMBER | None]}  # in a line of metrics.jsonl
TESTED = {"loss": NUMBER}


def draw_pictures(
    folder: Path,
    model: TrainedModel,
    lines: list[dict],
    samples: Tensor,
    settings: SamplerSettings,
    trajectory: Trajectory,
    test: Dataset,
) -> np.ndarray:
    """Writes samples_ep<epoch>.png, denoise_trajectory.png and, from the `lines` of the run's
    log, loss_curve.png and loss_by_timestep_bucket.png. Returns the grid of samples, (3, H, W).

    samples: (N, C, H, W) uint8 on the CPU, drawn with `settings` under the eyes of `trajectory`;
    real images of `test` are shown below them. Raises UserError if a file cannot be written.
    """
    y = labels_of(model.denoiser, settings, list(range(len(samples))))
    ordered, columns = rows_by_class(samples, y)
    columns = columns or min(10, math.ceil(math.sqrt(len(samples))) * 2)
    spread = [i * len(test) // columns for i in range(columns)]  # over the classes
    real = torch.from_numpy(test.images[spread])
    grid = save_image_grid(folder / f"samples_ep{model.epoch}.png", ordered, columns, real)
    trajectory.save(folder / "denoise_trajectory.png", model, settings, samples)
    draw_losses(folder, model, lines)
    return grid


def draw_losses(folder: Path, model: TrainedModel, lines: list[dict]) -> None:
    """The two curves of `draw_pictures`. A line without a loss, all of its steps skipped, is left
    out; so is one of another program's log."""
    kinds = {kind: [line for line in lines if line["kind"] == kind] for kind in ("train", "test")}
    train = [line for line in kinds["train"] if has_form(line, TRAINED)]
    test = {line["step"]: line["loss"] for line in kinds["test"] if has_form(line, TESTED)}
    steps = [line["step"] for line in train]
    name = subject(model.config.dataset, model.config.model_type)
    until = f"up to epoch {model.epoch}"
    raw = [line["loss"] for line in train]
    title = f"{name}: loss {until}"
    loss_curve(folder / "loss_curve.png", steps, raw, smoothed(raw), test, title)
    by_t = np.array([line["loss_by_t"] for line in train], dtype=float)  # None: NaN, not drawn
    by_t = by_t.reshape(-1, BUCKETS)  # also without any line
    parts = dict(zip(bucket_names(model.denoiser), by_t.T, strict=True))
    title = f"{name}: training loss by noise level {until}"
    loss_by_bucket(folder / "loss_by_timestep_bucket.png", steps, parts, title)


def smoothed(values: list[float]) -> list[float]:
    """The mean of each value and those around it, a twentieth of all."""
    half = 1 + len(values) // 40
    return [float(np.mean(values[max(i - half, 0) : i + half + 1])) for i in range(len(values))]


def bucket_names(denoiser: Denoiser) -> list[str]:
    """The noise levels of each part of the training distribution, as t and as sigma."""
    edges = torch.linspace(0, 1, BUCKETS + 1, device=denoiser.device)
    inside = 1e-6  # of its bucket, at both ends
    sigma = denoiser.training_sigma(torch.stack([edges[:-1] + inside, edges[1:] - inside], 1))
    ends = zip(denoiser.t(sigma).tolist(), sigma.tolist(), strict=True)
    return [rf"t {a:.4g}–{b:.4g}, $\sigma$ {low:.3g}–{high:.3g}" for (a, b), (low, high) in ends]
