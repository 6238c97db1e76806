"""Self-distillation without labels: a loss on the features of one block, beside the denoising loss.

The student is the network that is trained, on its noisy image; its features are those of the pass
that the denoising loss needs anyway. The teacher is the EMA of the weights, on another view of the
same image at no more noise, down to t = 1. See docs/methods.md for what is whose.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config import Config
from config.schema import Distill
from datasets import Batches, Batching, Dataset
from model.denoiser import Denoiser
from support import distributed
from support.errors import UserError
from training.augmentation import augment
from utils import autocast, compiled, generator, log

SMOOTH = 0.05  # where the regression's loss goes over from quadratic to linear
VIEW = 1  # of the batches: the student has view 0
JITTERED = 0.8  # the part of images whose colours change
GREY = 0.2  # the part of those that become grey


# --- the losses


def infonce(queries: Tensor, keys: Tensor, place: Tensor, temperature: float) -> Tensor:
    """-log softmax over all keys of cosine / temperature, at each query's own key: (N,).

    queries: (N, D), keys: (M, D) with M >= N, place: (N,), the own key's row (van den Oord et al.
    2018, arXiv 1807.03748; the others are negatives).
    """
    cosines = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T
    return F.cross_entropy(cosines / temperature, place, reduction="none")


def regression(z: Tensor, target: Tensor) -> Tensor:
    """z, target: (N, D) -> the mean over D of a smooth L1 distance: (N,)."""
    return F.smooth_l1_loss(z, target, beta=SMOOTH, reduction="none").mean(1)


def dispersive(z: Tensor, tau: float) -> Tensor:
    """z: (N, D) -> log of the mean over all pairs, each with itself too, of
    exp(-|z_i - z_j|^2 / (D tau)): between -log N, all far apart, and 0, all the same."""
    squares = F.pdist(z).square() / (z.shape[1] * tau)  # of the pairs i < j
    pairs = torch.cat([squares, squares, squares.new_zeros(len(z))])
    return (-pairs).logsumexp(0) - 2 * math.log(len(z))


def dispersive_cosine(z: Tensor, temperature: float) -> Tensor:
    """z: (N, D) -> log of the mean over all pairs, each with itself too, of
    exp((cosine - 1) / temperature): `dispersive` of directions, which larger z do not change."""
    return dispersive(F.normalize(z, dim=1), 2 * temperature / z.shape[1])


def _infonce(z: Tensor, keys: Tensor, place: Tensor, settings: Distill) -> Tensor:
    return infonce(z, keys, place, settings.temperature).mean()


def _regression(z: Tensor, keys: Tensor, place: Tensor, settings: Distill) -> Tensor:
    return regression(z, keys[place]).mean()


def _dispersive(z: Tensor, keys: None, place: Tensor, settings: Distill) -> Tensor:
    return dispersive(_of_all_ranks(z), settings.tau)


def _dispersive_cosine(z: Tensor, keys: None, place: Tensor, settings: Distill) -> Tensor:
    return dispersive_cosine(_of_all_ranks(z), settings.temperature)


def _of_all_ranks(z: Tensor) -> Tensor:
    return distributed.gather_with_gradient(z, len(z) * distributed.world_size())


@dataclass(frozen=True)
class Row:
    """A loss: (z, keys, place, settings) -> the mean over this rank's images."""

    loss: Callable[[Tensor, Tensor | None, Tensor, Distill], Tensor]
    has_teacher: bool = False
    projects_keys: bool = False  # keys pass through an average of the projector, and are queued


LOSSES = {
    "infonce": Row(_infonce, has_teacher=True, projects_keys=True),
    "regression": Row(_regression, has_teacher=True),
    "dispersive": Row(_dispersive),
    "dispersive_cosine": Row(_dispersive_cosine),
}


# --- the teacher's view


def jitter_color(
    x: Tensor, strength: float, draw: torch.Generator, batch_size: int, share: slice
) -> Tensor:
    """x: (N, C, H, W) in [-1, 1] -> the same with other colours, clipped to [-1, 1].

    Of the images 80 % change: brightness, saturation and contrast, in this order, by factors
    within 1 +- 0.8 strength, and the hue by up to 0.2 strength of a turn about the grey axis. Of
    these 20 % become grey, 16 % of all. Probabilities and ranges are those of SimCLR (Chen et al.
    2020, arXiv 2002.05709), whose strength for CIFAR-10 is 0.5; but there 20 % of all become grey,
    jittered or not, the order is drawn, the hue is that of HSV, and grey is a weighted mean of the
    channels, here their mean. What is grey stays grey. x is the `share` of a batch of `batch_size`,
    for the whole of which is drawn.
    """
    u = torch.rand(6, batch_size, generator=draw, device=x.device)[:, share, None, None, None]
    brightness, contrast, saturation = 1 + 0.8 * strength * (2 * u[:3] - 1)
    angle = 2 * math.pi * 0.2 * strength * (2 * u[3] - 1)
    saturation = torch.where(u[4] < GREY, 0.0, saturation)
    light = brightness * (x + 1) / 2  # in [0, brightness]
    grey = light.mean(1, keepdim=True)
    color = light - grey
    turned = (color.roll(1, 1) - color.roll(-1, 1)) / math.sqrt(3)  # a quarter turn about grey
    color = saturation * (color * angle.cos() + turned * angle.sin())
    middle = grey.mean((2, 3), keepdim=True)
    light = middle + contrast * (grey + color - middle)
    return torch.where(u[5] < JITTERED, (2 * light - 1).clamp(-1, 1), x)


# --- what a training step asks


def projector(channels: int, width: int) -> nn.Module:
    """(N, channels) -> the same shape; no norm over the batch, whose parts ranks hold."""
    return nn.Sequential(
        nn.LayerNorm(channels), nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, channels)
    )


def checked_timesteps(settings: Distill, teacher: Denoiser) -> tuple[float, float]:
    """The lowest t and the highest of the teacher's images. Raises UserError if the settings name a
    block or timesteps that are not there."""
    names, n_T = teacher.block_names, teacher.n_T
    if settings.block not in names:
        raise UserError(f"distill.block: no block '{settings.block}': there are {', '.join(names)}")
    low, high = settings.teacher_timesteps or (
        teacher.probe_timesteps[0],
        teacher.probe_timesteps[-1],
    )
    if high > n_T:
        raise UserError(f"distill.teacher_timesteps: {high} is outside 1..{n_T}")
    return low, high


class Distillation:
    """The loss of a step beside the denoising loss, and all that it keeps from step to step.

    A step calls `look`, then `loss` for each of its batches, then `keep`. `part` is this rank's of
    a step's images. Raises UserError if the config names a block or timesteps that are not there.
    """

    def __init__(
        self,
        config: Config,
        teacher: Denoiser,
        train: Dataset,
        part: slice,
        use_amp: bool,
        compiles: bool = False,
    ):
        self.config, self.settings, self.part = config, config.distill, part
        self.row = LOSSES[self.settings.loss]
        self.teacher, self.use_amp = teacher, use_amp
        self.device = device = teacher.device
        self.seen_by_teacher = teacher.features
        if compiles and self.row.has_teacher:
            self.seen_by_teacher = compiled(teacher.features, device)
        self.timesteps = checked_timesteps(self.settings, teacher)
        self.projector, channels = nn.Identity(), self._channels()
        if self.row.has_teacher:
            self.projector = projector(channels, self.settings.projector_width).to(device)
        self.key_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.queue = torch.zeros(0, channels, device=device)
        self.sums = torch.zeros(2, device=device)  # of losses, and of the steps that had them
        self.images_per_step = config.images_per_step
        how = Batching(
            config.seed, shuffle=True, flip=config.flip, crop=True, drop_last=True, view=VIEW
        )
        self.views = Batches(train.images, train.labels, self.images_per_step, device, how, part)
        # shorter than an epoch: earlier keys are negatives, and an image is not one of its own
        most = max(self.views.steps_per_epoch - 1, 0) * self.images_per_step
        self.queue_length = min(self.settings.queue, most)
        if self.row.projects_keys and most < self.settings.queue:
            log.info("note: distill.queue is %d, that of an epoch without a step", most)
        self._keys: Tensor | None = None  # (images_per_step, C), of all ranks
        self._loss = torch.zeros((), device=device)  # of the step that is under way

    @torch.no_grad()
    def _channels(self) -> int:
        x0 = torch.zeros(1, *self.config.network.image_shape, device=self.device)
        return self.teacher.features(x0, 1, x0, [self.settings.block])[self.settings.block].shape[1]

    @torch.no_grad()
    def look(self, step: int, sigma: Tensor) -> dict[str, Tensor]:
        """The teacher looks at the images of optimizer step number `step`, of which the student
        gets this rank's part at the noise levels sigma: (N,). Its noise is no higher, down to that
        of t = 1: the student's may be below (`diffusion.time: continuous`). All is drawn by (seed,
        step).

        Returns `keys` for `loss`, those of this step first, (M, C); {} without a teacher.
        """
        self._loss.zero_()
        if not self.row.has_teacher:
            return {}
        settings, n = self.settings, self.images_per_step
        x0, _ = self.views[step]
        draw = generator(self.device, self.config.seed, "teacher", step)
        u = torch.rand(n, generator=draw, device=self.device)[self.part]
        noise = torch.randn((n, *x0.shape[1:]), generator=draw, device=self.device)[self.part]
        if settings.teacher_color:
            x0 = jitter_color(x0, settings.teacher_color, draw, n, self.part)
        told = None
        if settings.teacher_augment:
            x0, labels = augment(
                x0, settings.teacher_augment, draw, n, self.part, flip=self.config.flip
            )
            learns_labels = self.config.diffusion.augment_prob > 0
            told = labels if learns_labels else None
        low, high = self.timesteps
        t = torch.minimum(low + (high - low) * u, self.teacher.t(sigma))
        features = []
        for batch in batches_of(len(x0), self.config.accumulate):
            labels = None if told is None else told[batch]
            with autocast(self.device, self.use_amp):
                features.append(self._features(x0[batch], t[batch], noise[batch], labels))
        self._keys = distributed.gather_shares(torch.cat(features), n)
        return {"keys": torch.cat([self._keys, self.queue])}

    def _features(self, x0: Tensor, t: Tensor, noise: Tensor, told: Tensor | None) -> Tensor:
        """What the student's projected features are compared with: (N, C)."""
        block = self.settings.block
        seen = self.seen_by_teacher(x0, t, noise, [block], told)[block]
        if self.row.projects_keys:
            return F.normalize(self.key_projector(seen).float(), dim=1)
        return F.layer_norm(seen, seen.shape[1:])

    def loss(self, z: Tensor, batch: slice, keys: Tensor | None) -> Tensor:
        """The weighted loss of z: (N, C), the student's projected features of a `batch` of this
        rank's images, beside the keys of `look`: a scalar."""
        place = torch.arange(batch.start, batch.stop, device=self.device) + self.part.start
        loss = self.row.loss(z.float(), keys, place, self.settings)
        self._loss += loss.detach() / self.config.accumulate
        return self.settings.weight * loss

    @torch.no_grad()
    def keep(self, skipped: Tensor, decay: float) -> None:
        """After the optimizer's step, which was `skipped` or not: the newest keys enter the queue,
        and the average of the projector follows it by 1 - decay."""
        loss = distributed.sum_over_ranks(self._loss) / distributed.world_size()
        self.sums += torch.stack([torch.where(skipped, 0, loss), (~skipped).float()])
        if not self.row.projects_keys:
            return
        self.queue = torch.cat([self._keys, self.queue])[: self.queue_length]
        pairs = zip(self.key_projector.parameters(), self.projector.parameters(), strict=True)
        for average, newest in pairs:
            average.lerp_(newest, 1 - decay)

    def read_and_reset(self) -> float | None:
        """The mean loss, not weighted, of all steps since the last call that were not skipped."""
        total, steps = self.sums.tolist()
        self.sums.zero_()
        return total / steps if steps else None

    def state_dict(self) -> dict:
        """All that a resumed run needs beside the optimizer."""
        return {
            "projector": self.projector.state_dict(),
            "key_projector": self.key_projector.state_dict(),
            "queue": self.queue,
            "sums": self.sums,
        }

    def load_state_dict(self, state: dict) -> None:
        """Takes over what `state_dict` gave."""
        self.projector.load_state_dict(state["projector"])
        self.key_projector.load_state_dict(state["key_projector"])
        self.queue = state["queue"].to(self.device)
        self.sums = state["sums"].to(self.device)


def batches_of(n: int, accumulate: int) -> list[slice]:
    """The n images of an optimizer step in `accumulate` batches of equal size."""
    each = n // accumulate
    return [slice(start, start + each) for start in range(0, n, each)]
