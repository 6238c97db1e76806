"""Whether samples are of the class that was asked for, as a classifier of real images sees it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from datasets import Dataset, to_model_range
from evaluation.classifiers.supervised import Recipe, SupervisedTraining, sgd, training_batches
from evaluation.plots import image_grids
from evaluation.samples.grids import image_grid, load_png, rows_by_class
from evaluation.samples.sample_sets import png
from evaluation.tables import as_markdown, as_text, percent, wilson_interval, with_interval
from model.wide_resnet import WideResNet
from sampling import class_of
from support.errors import UserError
from support.files import read_json, short_hash, write_text
from utils import autocast, seed_everything

DEPTH, WIDTH = 10, 2  # of the judge
RECIPE = Recipe(epochs=5, batch_size=128, lr=0.1, warm_epochs=0.5, weight_decay=5e-4)
SCORE_BATCH = 500  # images per forward; changes no answer
SET = {  # what is read of samples.json
    "guidance": int | float | None, "dataset": str, "n": int, "classes": list | None,
}  # fmt: skip
SHOWN = 6  # images of each class and set in the picture


class Judge(nn.Module):
    """x0: (N, C, H, W) in [-1, 1] -> logits (N, K): a WideResNet, always told the same noise."""

    def __init__(self, image_channels: int, n_classes: int):
        super().__init__()
        self.net = WideResNet(image_channels, n_classes, DEPTH, WIDTH)

    def forward(self, x0: Tensor) -> Tensor:
        """x0: (N, C, H, W) in [-1, 1] -> logits (N, K)."""
        return self.net(x0, x0.new_zeros(len(x0)))


def trained_judge(
    train: Dataset, recipe: Recipe, folder: Path, device: torch.device, seed: int, flip: bool,
    use_amp: bool,
) -> Judge:  # fmt: skip
    """In eval mode. Its state is kept in `folder`: a second call with the same arguments only reads
    it, a stopped one goes on. Raises UserError if that file is damaged."""
    seed_everything(seed, "judge")
    judge = Judge(train.images.shape[1], len(train.class_names)).to(device)
    what = [train.fingerprint(), vars(recipe), seed, flip, use_amp]
    SupervisedTraining(
        judge, sgd(judge, recipe), lambda shape, step: (),
        training_batches(train, recipe, device, seed, flip), recipe,
        folder / f"guidance_judge_{short_hash(what)}.pth", use_amp=use_amp,
    ).run()  # fmt: skip
    return judge


@torch.no_grad()
def answers(
    judge: nn.Module, images: np.ndarray, device: torch.device, use_amp: bool
) -> np.ndarray:
    """images: (N, C, H, W) uint8 -> the class of each, (N,)."""
    found = []
    for start in range(0, len(images), SCORE_BATCH):
        x0 = to_model_range(torch.from_numpy(images[start : start + SCORE_BATCH]).to(device))
        with autocast(device, use_amp):
            found.append(judge(x0).argmax(1).cpu().numpy())
    return np.concatenate(found)


@dataclass(frozen=True)
class SampleSet:
    """Images 0 .. n-1 of a folder of sample.py's, and the class that each was to be of."""

    folder: Path
    record: dict  # samples.json
    images: np.ndarray  # (N, C, H, W) uint8
    labels: np.ndarray  # (N,)

    @property
    def name(self) -> str:
        """The set's name in tables: its guidance."""
        return f"guidance {self.record['guidance']:g}"


def read_set(folder: Path, dataset: str) -> SampleSet:
    """Raises UserError if it is not a whole set of a class-conditional network of that dataset."""
    path = folder / "samples.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; give folders that sample.py wrote")
    record = read_json(path, SET, "draw the set anew, in another folder")
    if record["guidance"] is None:
        raise UserError(
            f"{path}: of a network without labels; train one with --set cond_drop_prob=0.15"
        )
    if record["dataset"] != dataset:
        raise UserError(f"{path}: images of {record['dataset']}, but the config's are {dataset}")
    if record["n"] < 2 * len(record["classes"]):
        raise UserError(
            f"{path}: {record['n']} images of {len(record['classes'])} classes: draw at least 2 of "
            "each with a larger --n"
        )
    files = [png(folder, i) for i in range(record["n"])]
    for file in files:
        if not file.exists():
            raise UserError(f"{file}: no such file; run the same sample.py again, it goes on")
    labels = np.array([class_of(i, record["classes"]) for i in range(record["n"])])
    return SampleSet(folder, record, np.stack([load_png(file) for file in files]), labels)


def agreement(answered: np.ndarray, labels: np.ndarray) -> dict:
    """`share` of the answers, (N,), that are the labels, 0..1, its 95 % interval, `by_class`."""
    right = answered == labels
    share = float(right.mean())
    return {
        "share": share,
        "interval": wilson_interval(share, len(labels)),
        "by_class": {int(c): float(right[labels == c].mean()) for c in np.unique(labels)},
    }


def variation(images: np.ndarray, labels: np.ndarray) -> float:
    """Variance between images of one class, pixels in [-1, 1]: mean over pixels and classes."""
    x = images.astype(np.float32) / 127.5
    return float(np.mean([x[labels == c].var(axis=0).mean() for c in np.unique(labels)]))


def write_guidance_tables(
    folder: Path, record: dict, sets: Sequence[SampleSet], class_names: list[str]
) -> str:
    """Writes guidance.md and guidance.png to `folder`. Returns the tables as text.

    record: `real` and, in the order of `sets`, `sets`: what `agreement` and `variation` found.
    """
    rows = [record["real"], *record["sets"]]
    header = ["", "images", "of the class asked for in % (95 %)", "variation within a class"]
    real = record["real"]["variation"]
    body = [
        [row["name"], f"{row['n']:,}", with_interval(row["share"], row["interval"]),
         f"{row['variation'] / real:.2f}"]
        for row in rows
    ]  # fmt: skip
    by_class = [
        [class_names[c], *(percent(row["by_class"][c]) for row in rows)]
        for c in record["real"]["by_class"]
    ]
    tables = {
        "as the judge sees them; variation: variance of pixels, as a multiple of real images'":
            [header, *body],
        "by class, in %": [["", *(row["name"] for row in rows)], *by_class],
    }  # fmt: skip
    title = f"{record['dataset']}, judge: {record['judge']}"
    closing = [f"{row['name']}: {row['folder']}" for row in record["sets"]]
    write_text(folder / "guidance.md", as_markdown(title, tables, closing))
    _picture(folder / "guidance.png", record, sets, class_names)
    return as_text(title, tables, closing)


def _picture(path: Path, record: dict, sets: Sequence[SampleSet], class_names: list[str]) -> None:
    """The first images of each set, a row per class."""
    kinds = sets[0].record["classes"]
    grids = []
    for found, row in zip(sets, record["sets"], strict=True):
        n = len(kinds) * SHOWN
        images, columns = rows_by_class(
            torch.from_numpy(found.images[:n]), torch.from_numpy(found.labels[:n])
        )
        name = f"{found.name}: {100 * row['share']:.0f} % of the class"
        grids.append((name, image_grid(images, columns or len(images)).numpy()))
    image_grids(path, grids, [class_names[c] for c in kinds], f"{record['dataset']} samples")
