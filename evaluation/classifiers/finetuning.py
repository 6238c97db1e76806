"""Fine-tuning: the network up to one block and a linear head, all trained on labels.

The paper's second evaluation (Xiang et al. 2023, arXiv 2303.09769, section 4.3). Nothing is
selected: the test accuracy that counts is the last epoch's, so no image has to be held out.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from datasets import Dataset
from evaluation.classifiers.supervised import Recipe, SupervisedTraining, training_batches
from evaluation.probe.features import Extractor, network_source
from evaluation.probe.heads import Head
from evaluation.tables import aligned, percent, with_interval
from model.denoiser import Denoiser
from utils import generator, seed_everything

RECIPE = Recipe(epochs=20, batch_size=128, lr=1e-3, warm_epochs=1.0, weight_decay=0.05)

# what two starting points must have in common to be compared
COMPARED = (
    "dataset", "images", "timestep", "blockname", "recipe", "seed", "use_amp", "architecture",
)  # fmt: skip
NUMBER = int | float
RECORD = {  # the form of a starting point's .json, as far as it is read
    "scratch": bool, "epoch": int | None, "parameters_trained": int, "test_accuracy": NUMBER,
    "test_interval": [NUMBER],
    "history": [{"epoch": int, "train_accuracy": NUMBER, "test_accuracy": NUMBER}],
}  # fmt: skip


class Classifier(nn.Module):
    """(x0, noise), both (N, C, H, W) -> logits (N, K): a linear head on a block's spatial mean.

    Trained is all that the logits depend on; what lies above the block has requires_grad False.
    The weights are the denoiser's own, not a copy; the head starts as torch.nn.Linear does, from
    `seed` alone.
    """

    def __init__(self, denoiser: Denoiser, t: int, block: str, dataset: Dataset, seed: int):
        super().__init__()
        self.denoiser, self.t, self.block = denoiser.requires_grad_(), t, block
        device = denoiser.device
        blank = torch.zeros(1, *dataset.images.shape[1:], device=device)
        features = self.features(blank, blank)
        weights = list(denoiser.parameters())
        used = torch.autograd.grad(features.sum(), weights, allow_unused=True)
        for weight, gradient in zip(weights, used, strict=True):
            weight.requires_grad_(gradient is not None)
        seed_everything(seed, "head")
        self.head = nn.Linear(features.shape[1], len(dataset.class_names)).to(device)

    def features(self, x0: Tensor, noise: Tensor) -> Tensor:
        """The spatial mean of the block: (N, D)."""
        return self.denoiser.features(x0, self.t, noise, [self.block])[self.block]

    def forward(self, x0: Tensor, noise: Tensor) -> Tensor:
        """Logits: (N, K)."""
        return self.head(self.features(x0, noise))

    def trained_parameters(self) -> list[nn.Parameter]:
        """What an optimizer changes."""
        return [weight for weight in self.parameters() if weight.requires_grad]


def fine_tuning(
    classifier: Classifier,
    train: Dataset,
    test: Dataset,
    recipe: Recipe,
    path: Path,
    *,
    seed: int,
    flip: bool,
    use_amp: bool,
) -> SupervisedTraining:
    """The run that trains the classifier, and adds to each epoch's history its `test_accuracy`.

    AdamW, whose weight decay is of matrices and kernels, not of biases and norms; every batch has
    new noise of the classifier's timestep, by (seed, step).
    """
    weights = classifier.trained_parameters()
    groups = [
        {"params": [w for w in weights if w.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [w for w in weights if w.ndim <= 1], "weight_decay": 0.0},
    ]
    device = classifier.head.weight.device

    def draw(shape: torch.Size, step: int) -> tuple[Tensor]:
        source = generator(device, seed, "finetune", step)
        return (torch.randn(shape, generator=source, device=device),)

    return SupervisedTraining(
        classifier, torch.optim.AdamW(groups, lr=recipe.lr), draw,
        training_batches(train, recipe, device, seed, flip), recipe, path, use_amp=use_amp,
        measure=lambda: {"test_accuracy": accuracy(classifier, test, seed, use_amp)},
    )  # fmt: skip


def accuracy(classifier: Classifier, dataset: Dataset, seed: int, use_amp: bool) -> float:
    """In 0..1; an image's noise depends on (seed, split, t) and its index alone, as in a probe."""
    t, block, head = classifier.t, classifier.block, classifier.head
    device = head.weight.device
    extractor = Extractor(network_source(classifier.denoiser, "", use_amp), device, seed)
    features = torch.from_numpy(extractor(dataset, [t], [block])[t, block])
    y = torch.from_numpy(dataset.labels).to(device)
    return Head(head.weight.detach(), head.bias.detach()).accuracy(features, y)


# --- the two starting points side by side


def start_name(record: dict) -> str:
    """What the run of this record started from, as tables and figures name it."""
    if record["scratch"]:
        return "from scratch"
    return "pre-trained" if record["epoch"] < 0 else f"from epoch {record['epoch']}"


def side_by_side(records: list[dict]) -> str:
    """A table with a row per starting point: the accuracy on train during the last epoch, in
    augmented batches and with dropout, and on test after it."""
    rows = [["accuracy in %", "parameters trained", "train, last epoch", "test (95 % interval)"]]
    for record in records:
        rows.append([
            start_name(record), f"{record['parameters_trained']:,}",
            percent(record["history"][-1]["train_accuracy"]),
            with_interval(record["test_accuracy"], record["test_interval"]),
        ])  # fmt: skip
    return aligned(rows)
