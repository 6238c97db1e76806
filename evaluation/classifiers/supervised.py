"""Training a classifier on labels: batches, steps, the state of a stopped run, and
the record of another to show beside it."""

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import checkpoint
from datasets import Batches, Batching, Dataset
from evaluation.probe.paper_protocol import cosine
from support import distributed
from support.errors import UserError
from support.files import read_json
from support.resumable import Resumable, all_finite
from utils import autocast, grad_scaler, log, progress, redirect_to_bar, seed_everything

Draw = Callable[[torch.Size, int], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Recipe:
    """The rate rises linearly for `warm_epochs`, then falls to 0 by a cosine.

    `batch_size` is global. Raises UserError, in the words of the command line, for what cannot be.
    """

    epochs: int
    batch_size: int
    lr: float
    warm_epochs: float
    weight_decay: float

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size) < 1:
            raise UserError("--epochs and --batch_size must be at least 1")
        if not (0 < self.lr < math.inf and 0 <= self.weight_decay < math.inf):
            raise UserError("--lr must be more than 0, and --weight_decay not less")
        if not 0 <= self.warm_epochs < self.epochs:
            raise UserError(
                f"--warm_epochs {self.warm_epochs:g}: of {self.epochs} epochs; give fewer, from 0 "
                "up"
            )

    def changed_by(self, given: Mapping[str, object]) -> "Recipe":
        """With those of its values that `given` holds; None: not given."""
        changes = {name: given.get(name) for name in vars(self)}
        return replace(self, **{k: v for k, v in changes.items() if v is not None})

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The rate of `step`, counted from 0 across epochs."""
        warm, last = self.warm_epochs * steps_per_epoch, self.epochs * steps_per_epoch
        if step < warm:
            return self.lr * (step + 1) / (warm + 1)
        return cosine(self.lr, step - warm, last - warm)


def sgd(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Nesterov momentum 0.9, as WideResNets are trained."""
    return torch.optim.SGD(
        module.parameters(), recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay,
        nesterov=True,
    )  # fmt: skip


def training_batches(
    train: Dataset, recipe: Recipe, device: torch.device, seed: int, flip: bool
) -> Batches:
    """This rank's part of the recipe's batches: random crops, and flips if `flip`.

    Raises UserError if there are fewer images than a batch takes.
    """
    how = Batching(seed, shuffle=True, flip=flip, crop=True, drop_last=True)
    part = distributed.share_of_batch(recipe.batch_size)
    batches = Batches(train.images, train.labels, recipe.batch_size, device, how, part)
    if not batches.steps_per_epoch:
        raise UserError(
            f"--batch_size {recipe.batch_size} is more than the {len(train)} training images"
        )
    return batches


class SupervisedTraining:
    """A run: `step` counts optimizer steps done, `history` has one dict per finished epoch,
    `seconds` are those of all calls together, `made_by` has device and versions of the last that
    trained.

    The classifier is called with x0: (N, C, H, W) and what `draw` gives for the shape of the
    global batch and the step: tensors with one row per image, of which each rank takes its part.
    `measure` is called in eval mode at the end of every epoch, for what it adds to the history.
    The statistics of batch norm are each rank's own, of which rank 0's are kept, as in
    DistributedDataParallel. The state is kept at `path`, so that a new object with the same
    arguments goes on where the last one stopped. Raises UserError if that file is damaged.
    """

    def __init__(
        self,
        classifier: nn.Module,
        optimizer: torch.optim.Optimizer,
        draw: Draw,
        batches: Batches,
        recipe: Recipe,
        path: Path,
        *,
        use_amp: bool,
        measure: Callable[[], dict[str, float]] = dict,
    ):
        self.classifier, self.optimizer, self.draw = classifier, optimizer, draw
        self.batches, self.recipe, self.use_amp = batches, recipe, use_amp
        self.measure, self.device = measure, batches.device
        self.last = recipe.epochs * batches.steps_per_epoch
        self.scaler = grad_scaler(self.device, use_amp)
        self.step, self.history, self.seconds, self.made_by = 0, [], 0.0, {}
        self.counted = time.monotonic()  # until when `seconds` are counted
        self.sums = torch.zeros(3, device=self.device)  # loss, correct, images of this epoch
        self.kept = Resumable(path, checkpoint.save, unit="batch")
        if self._load() and self.step < self.last:
            log.info(f"going on at batch {self.step:,} of {path}")
        self.model = distributed.replicated(classifier)

    def run(self) -> list[dict]:
        """Trains to the last epoch; the classifier is then in eval mode. Returns the history.

        Accuracies are in 0..1. Raises Stopped after a signal, and UserError if the loss or the
        weights stop being finite.
        """
        self.counted = time.monotonic()
        self.classifier.train()
        options = {"total": self.last, "initial": self.step, "unit": "batch"}
        with progress(desc="training", **options) as bar, redirect_to_bar(), self.kept:
            while self.step < self.last:
                self.train_step()
                bar.update()
                ends_epoch = self.step % self.batches.steps_per_epoch == 0
                if self.kept.is_due(ends_epoch):
                    self._refuse_ruined_weights()
                    if ends_epoch:
                        self._end_epoch()
                    self.kept.save(self.step, self._state())
                self.kept.stop_if_told(self.step, self.last)
        distributed.barrier()
        self._load()  # every rank has rank 0's statistics of batch norm
        self.classifier.eval()
        return self.history

    def train_step(self) -> None:
        """One optimizer step on batch number `self.step`, of which each rank takes its part."""
        lr = self.recipe.learning_rate(self.step, self.batches.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x0, y = self.batches[self.step]
        drawn = self.draw(torch.Size((self.recipe.batch_size, *x0.shape[1:])), self.step)
        seed_everything(self.batches.how.seed, "dropout", self.step, distributed.rank())
        with autocast(self.device, self.use_amp):
            logits = self.model(x0, *(rows[self.batches.part] for rows in drawn))
        loss = F.cross_entropy(logits.float(), y)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        correct, n = (logits.argmax(1) == y).sum(), len(y)
        sums = torch.stack([loss.detach() * n, correct.float(), correct.new_tensor(n).float()])
        self.sums += distributed.sum_over_ranks(sums)
        self.step += 1

    def _refuse_ruined_weights(self) -> None:
        """Raises UserError where the state would replace a better one on the disk."""
        if all_finite([self.sums, *self.classifier.state_dict().values()]):
            return
        epoch = 1 + (self.step - 1) // self.batches.steps_per_epoch
        raise UserError(
            f"epoch {epoch}: the loss or the weights are not finite. {self.kept.what_is_saved()}; "
            "lower --lr" + (", or leave out --use_amp" if self.use_amp else "")
        )

    def _end_epoch(self) -> None:
        loss, correct, n = self.sums.tolist()
        self.sums.zero_()
        epoch = len(self.history) + 1
        self.classifier.eval()
        values = {"train_loss": loss / n, "train_accuracy": correct / n, **self.measure()}
        self.classifier.train()
        self.history.append({"epoch": epoch, **values})
        log.info(f"epoch {epoch}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))

    def _state(self) -> dict:
        now = time.monotonic()
        self.seconds, self.counted = self.seconds + now - self.counted, now
        return {
            "step": self.step,
            "history": self.history,
            "seconds": self.seconds,
            "sums": self.sums,
            "classifier": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "made_by": {"device": self.device.type, "versions": checkpoint.versions()},
        }

    def _load(self) -> bool:
        """Takes over the saved state; False if there is none."""
        state = checkpoint.load_state(self.kept.path)
        if state is None:
            return False
        with checkpoint.taking_over(self.kept.path, checkpoint.FIT_ANEW):
            self.kept.saved_step = state["step"]
            self.step, self.history = state["step"], state["history"]
            self.seconds = state["seconds"]
            self.sums = state["sums"].to(self.device)
            self.classifier.load_state_dict(state["classifier"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.made_by = state.get("made_by", {})  # older ones do not say it
        return True


def comparable(path: Path, record: dict, keys: Collection[str], form: dict) -> dict | None:
    """The record of another run at `path`, if there is one that is equal in these keys.

    Raises UserError if the file is damaged or not of `form`, see `support.files.has_form`.
    """
    if not path.exists():
        return None
    other = read_json(path, form)
    different = [key for key in keys if other.get(key) != record[key]]
    if different:
        log.info(f"note: {path} is of another {', '.join(different)}: not shown beside this one")
        return None
    return other
