"""The reference's recipe for the heads: Adam on augmented images, resumable at any step."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import checkpoint
from config.schema import Linear
from datasets import Batches, Batching, Dataset
from evaluation.probe.cells import Cell, timesteps_and_blocks
from evaluation.probe.features import Extractor
from evaluation.probe.heads import Head, HeadBank
from support import distributed
from support.errors import UserError
from support.files import short_hash
from support.resumable import SAVE_EVERY_S, Resumable, all_finite
from utils import generator, log, progress


def fit_paper(
    extractor: Extractor,
    train: Dataset,
    held: np.ndarray,
    cells: Sequence[Cell],
    recipe: Linear,
    flip: bool,
    folder: Path,
    save_every_s: float = SAVE_EVERY_S,
) -> dict[Cell, list[Head]]:
    """{cell: [the head that has not seen `held`, the head that has seen all of train]}.

    held: (N,) bool. Adam at recipe.lrate, falling to 0 by a cosine, epoch by epoch; random crops,
    flips if `flip`, new noise in every batch; features as they are. One forward per timestep and
    batch feeds all heads. What is drawn depends on (seed, step) alone, and the state is saved in
    `folder`, so that calling again with the same arguments goes on where the last call stopped.
    Several processes divide every batch's forwards among them, and each fits all heads.
    Raises UserError if a saved state is damaged, or if the heads stop being finite.
    """
    device, seed = extractor.device, extractor.seed
    batches = Batches(
        train.images,
        np.stack([train.labels, held], axis=1),  # a batch has to say which of it is held out
        recipe.batch_size,
        device,
        Batching(seed, shuffle=True, flip=flip, crop=True),
    )
    features_of = _noisy_features(extractor, cells)
    widths = {cell: f.shape[1] for cell, f in features_of(batches[0][0][:1], 0).items()}
    bank = HeadBank(widths, len(train.class_names), copies=2, seed=seed).to(device)
    adam = torch.optim.Adam(bank.parameters(), lr=recipe.lrate)

    fit = [recipe.n_epoch, recipe.batch_size, recipe.lrate, flip, seed, device.type]
    names = [(cell.t, cell.block) for cell in cells]
    settings = [extractor.source.fingerprint, train.fingerprint(), names, fit]
    path = folder / f"linear_state_{short_hash(settings)}.pth"
    timesteps, _ = timesteps_and_blocks(cells)
    first, last = _resume(path, bank, adam), recipe.n_epoch * batches.steps_per_epoch
    begun = time.monotonic()
    steps = progress(range(first, last), "heads", total=last, initial=first, unit="batch")
    with Resumable(path, checkpoint.save, save_every_s, "batch") as kept:
        for step in steps:
            x0, tags = batches[step]
            y, is_held = tags.unbind(1)
            seen = torch.stack([1 - is_held, torch.ones_like(is_held)], dim=1).float()
            epoch = step // batches.steps_per_epoch
            adam.param_groups[0]["lr"] = cosine(recipe.lrate, epoch, recipe.n_epoch)
            adam.zero_grad()
            bank.loss(features_of(x0, step), y, seen).backward()
            adam.step()
            if kept.is_due(step + 1 == last):
                kept.save(step + 1, _state(step + 1, bank, adam))
            extractor.n_forwards += len(x0) * len(timesteps)
            kept.stop_if_told(step + 1, last)
    extractor.seconds += time.monotonic() - begun if first < last else 0
    return bank.heads()


def cosine(lrate: float, epoch: int, n_epoch: int) -> float:
    """The learning rate of `epoch`, counted from 0: from lrate towards 0 at n_epoch."""
    return lrate * (1 + math.cos(math.pi * epoch / n_epoch)) / 2


def _noisy_features(
    extractor: Extractor, cells: Sequence[Cell]
) -> Callable[[Tensor, int], dict[Cell, Tensor]]:
    timesteps, blocks = timesteps_and_blocks(cells)

    @torch.no_grad()
    def features_of(x0: Tensor, step: int) -> dict[Cell, Tensor]:
        n, mine = len(x0), distributed.share(len(x0))
        forwarded = distributed.at_least_one(mine)
        part = slice(forwarded.start, forwarded.stop)
        found = {}
        for t in timesteps:
            draw = generator(x0.device, extractor.seed, "probe", step, t)
            noise = torch.randn(x0.shape, generator=draw, device=x0.device)
            features = extractor.source.features(x0[part], t, noise[part], blocks)
            for block in blocks:
                rows = features[block].float()[: len(mine)]
                found[t, block] = distributed.gather_shares(rows, n)
        return {cell: torch.cat([found[p] for p in cell.parts], dim=1) for cell in cells}

    return features_of


def _state(step: int, bank: HeadBank, adam: torch.optim.Adam) -> dict:
    """Raises UserError for heads that must not replace better ones."""
    if not all_finite(bank.parameters()):
        raise UserError(
            f"the heads are no longer finite at batch {step:,}: take another checkpoint, lower "
            "linear.lrate, or leave out --use_amp"
        )
    return {"step": step, "bank": bank.state_dict(), "adam": adam.state_dict()}


def _resume(path: Path, bank: HeadBank, adam: torch.optim.Adam) -> int:
    """Puts the saved state into bank and adam. Returns the step to go on at, 0 without one."""
    state = checkpoint.load_state(path)
    if state is None:
        return 0
    with checkpoint.taking_over(path, checkpoint.FIT_ANEW):
        bank.load_state_dict(state["bank"])
        adam.load_state_dict(state["adam"])
        log.info(f"going on at batch {state['step']:,} of {path}")
        return state["step"]
