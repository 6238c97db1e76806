"""Classifiers of noisy images, over all noise levels of a process.

A noisy classifier is a module (x0, sigma, noise) -> logits (N, K), with x0, noise (N, C, H, W) and
sigma (N,); of these it sees x0 + sigma * noise and sigma, never x0. Two kinds are compared: a
network trained for this and nothing else, and a small head on a denoiser's frozen features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from checkpoint import TrainedModel
from config import Config
from config.schema import PROCESSES
from datasets import Dataset, to_model_range
from evaluation.classifiers.supervised import Draw, Recipe, sgd
from evaluation.probe.features import FeatureSource, model_source
from evaluation.tables import wilson_interval
from model.block import TimeEmbedding
from model.denoiser import Denoiser
from model.wide_resnet import WideResNet
from support import distributed
from utils import (
    ImageNoise,
    autocast,
    derive_seed,
    generator,
    permutation,
    progress,
    seed_everything,
)

LEVELS = 20  # at most so many timesteps are scored
HIDDEN = 1024  # units of the MLP
STANDARDISED = 512  # training images whose features give mean and standard deviation

RECIPES = {
    "wrn": Recipe(epochs=200, batch_size=128, lr=0.1, warm_epochs=5, weight_decay=5e-4),
    "ddae": Recipe(epochs=30, batch_size=128, lr=1e-3, warm_epochs=0, weight_decay=0),
}

FrozenFeatures = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class NoisyWideResNet(nn.Module):
    """A noisy classifier: a WideResNet, fed c_in * x and c_noise as `process` feeds its network."""

    def __init__(self, process: Denoiser, net: WideResNet):
        super().__init__()
        self.process, self.net = process, net

    def forward(self, x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """x0, noise: (N, C, H, W), sigma: (N,) -> logits (N, K) of x0 + sigma * noise."""
        s = sigma.view(-1, 1, 1, 1)
        return self.net(self.process.c_in(s) * (x0 + s * noise), self.process.c_noise(sigma))

    def optimizer(self, recipe: Recipe) -> torch.optim.Optimizer:
        """SGD, see `sgd`."""
        return sgd(self, recipe)


class FeatureClassifier(nn.Module):
    """A noisy classifier: two linears with a time embedding, on standardised frozen features.

    `features` gives them and c_noise: (N,); its weights are no part of this module. sample:
    (M, width), features whose mean and standard deviation count as those of all.
    """

    def __init__(
        self, features: FrozenFeatures, sample: Tensor, n_classes: int, hidden: int = HIDDEN
    ):
        super().__init__()
        self.features = features
        self.register_buffer("mean", sample.mean(0))
        self.register_buffer("std", sample.std(0).clamp(min=1e-6))
        self.time_emb = TimeEmbedding(hidden // 4)  # 4 times as wide as its argument
        self.lin1 = nn.Linear(sample.shape[1], hidden)
        self.lin2 = nn.Linear(hidden, n_classes)

    def forward(self, x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """x0, noise: (N, C, H, W), sigma: (N,) -> logits (N, K) of x0 + sigma * noise."""
        features, c_noise = self.features(x0, sigma, noise)
        z = (features - self.mean) / self.std
        return self.lin2(F.silu(self.lin1(z) + self.time_emb(c_noise)))

    def optimizer(self, recipe: Recipe) -> torch.optim.Optimizer:
        """Adam with the recipe's rate and weight decay."""
        return torch.optim.Adam(self.parameters(), recipe.lr, weight_decay=recipe.weight_decay)


def frozen_features(denoiser: Denoiser, source: FeatureSource, block: str) -> FrozenFeatures:
    """The features of one block at any sigma; `source` is that of `denoiser`.

    Beyond the denoiser's own noise levels the image keeps its noise, and the network is told the
    nearest level that it knows.
    """

    @torch.no_grad()
    def features(x0: Tensor, sigma: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        t = denoiser.t(sigma)
        told = denoiser.sigma(t)
        noise = noise * (sigma / told).view(-1, 1, 1, 1)
        return source.features(x0, t, noise, [block])[block], denoiser.c_noise(told)

    return features


@dataclass(frozen=True)
class Backbone:
    """A noisy classifier that is not yet trained, and its name in tables and figures.

    `settings` are those that decide it, beside the data, the recipe and the seed.
    """

    classifier: NoisyWideResNet | FeatureClassifier
    name: str
    settings: dict


def with_process(config: Config, mode: str | None) -> Config:
    """The config, or one whose process is the one named `mode`, with its defaults.

    A process of timesteps draws all of them alike, whatever noise the denoiser was trained on:
    the classifier is scored at all of them.
    """
    if mode not in (None, config.model_type):
        diffusion = PROCESSES[mode]().diffusion
        config = config.model_copy(update={"model_type": mode, "diffusion": diffusion})
    if not hasattr(config.diffusion, "time"):
        return config
    alike = config.diffusion.model_copy(update={"time": "discrete"})
    return config.model_copy(update={"diffusion": alike})


def wide_resnet(process: Denoiser, train: Dataset, depth: int, width: int, seed: int) -> Backbone:
    """WRN-<depth>-<width> on the CPU. Raises UserError for a depth that there is not."""
    seed_everything(seed, "wrn")
    net = WideResNet(train.images.shape[1], len(train.class_names), depth, width)
    settings = {"depth": depth, "width": width}
    return Backbone(NoisyWideResNet(process, net), f"WRN-{depth}-{width}", settings)


def mlp_on_features(
    model: TrainedModel, process: Denoiser, train: Dataset, block: str, use_amp: bool
) -> Backbone:
    """The MLP on the CPU, on features that are computed where the model is.

    They are standardised by those of some training images at all noise levels of `process`.
    Raises UserError for a block that the model does not have.
    """
    seed, device = model.config.seed, model.denoiser.device
    source = model_source(model, use_amp)
    source.check([], [block])
    features = frozen_features(model.denoiser, source, block)
    chosen = train.images[permutation(len(train), seed, "standardised")[:STANDARDISED]]
    x0 = to_model_range(torch.from_numpy(chosen).to(device))
    sample, _ = features(x0, *noise_drawer(process, seed, device, as_trained=False)(x0.shape, -1))
    seed_everything(seed, "ddae")
    classifier = FeatureClassifier(features, sample.cpu(), len(train.class_names))
    settings = {"fingerprint": source.fingerprint, "blockname": block}
    return Backbone(classifier, f"DDAE {block}, {model.stage}", settings)


def noise_drawer(process: Denoiser, seed: int, device: torch.device, as_trained: bool) -> Draw:
    """(shape, step) -> sigma, noise: for every image a noise level and noise, new at every step.

    The level is that of a t uniform in 1..n_T, so that all that are scored are trained on; with
    `as_trained` one of those that `process` trains on, as the paper's code draws them for a
    WideResNet. For DDPM these are the same.
    """

    def draw(shape: torch.Size, step: int) -> tuple[Tensor, Tensor]:
        source = generator(device, seed, "noisy classifier", step)
        u = torch.rand(shape[0], generator=source, device=device)
        t = (u * process.n_T).long().clamp(max=process.n_T - 1) + 1
        sigma = process.training_sigma(u) if as_trained else process.sigma(t)
        return sigma, torch.randn(shape, generator=source, device=device)

    return draw


@dataclass(frozen=True)
class Level:
    """The accuracy, in 0..1, and its 95 % interval at timestep t of the process."""

    t: int
    sigma: float
    accuracy: float
    interval: tuple[float, float]


def scored_timesteps(n_T: int) -> list[int]:
    """All of 1..n_T, or `LEVELS` of them, evenly spread with both ends."""
    return torch.linspace(1, n_T, min(n_T, LEVELS)).round().int().tolist()


@torch.no_grad()
def score(
    classifier: nn.Module,
    process: Denoiser,
    test: Dataset,
    indices: Sequence[int],
    device: torch.device,
    seed: int,
    batch_size: int,
    use_amp: bool = False,
) -> list[Level]:
    """The accuracy on test[indices] at each of the scored timesteps; each rank does its share,
    `batch_size` images per forward.

    The noise of an image depends on (seed, t) and its index in `test` alone. The classifier has
    to be in eval mode.
    """
    timesteps = scored_timesteps(process.n_T)
    sigmas = process.sigma(torch.tensor(timesteps, device=device))
    correct = torch.zeros(len(timesteps), dtype=torch.int64, device=device)
    mine = [int(indices[i]) for i in distributed.share(len(indices))]
    with progress(total=len(mine), desc="scoring", shared=True, unit="image") as bar:
        for start in range(0, len(mine), batch_size):
            chosen = mine[start : start + batch_size]
            x0 = to_model_range(torch.from_numpy(test.images[chosen]).to(device))
            y = torch.from_numpy(test.labels[chosen]).to(device)
            for i, t in enumerate(timesteps):
                key = derive_seed(seed, "noisy test", t)
                noise = ImageNoise(key, chosen, x0.shape[1:], device).draw()
                with autocast(device, use_amp):
                    logits = classifier(x0, sigmas[i].expand(len(x0)), noise)
                correct[i] += (logits.argmax(1) == y).sum()
            bar.update(len(chosen))
    n = len(indices)
    accuracies = [count / n for count in distributed.sum_over_ranks(correct).tolist()]
    return [
        Level(t, sigma, accuracy, wilson_interval(accuracy, n))
        for t, sigma, accuracy in zip(timesteps, sigmas.tolist(), accuracies, strict=True)
    ]
