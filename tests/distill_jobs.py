"""What the tests of self-distillation run, also under torchrun: a few steps of each loss.

python -m torch.distributed.run ... tests/distill_jobs.py FOLDER
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from config import parse_config
from datasets import Dataset
from support import distributed
from training.trainer import Trainer

CPU = torch.device("cpu")
STEPS = 3
RUNS = {  # by loss: batches per step
    "infonce": 2, "regression": 2, "dispersive": 1, "dispersive_cosine": 1,
}  # fmt: skip


def dataset(n: int) -> Dataset:
    images = np.random.default_rng(0).integers(0, 256, (n, 1, 8, 8), dtype=np.uint8)
    return Dataset("digits", "train", images, np.arange(n), ["0"])


def config(loss: str, **changes):
    """Of a network on 8x8 images, trained with SGD, which leaves the size of gradients visible."""
    network = {"image_shape": [1, 8, 8], "n_channels": 32, "ch_mults": [1, 2], "dropout": 0.0}
    network["is_attn"] = [False, False]
    distill = {
        "loss": loss,
        "weight": 1.0,
        "queue": 20,
        "projector_width": 16,
        **changes.pop("distill", {}),
    }
    values = {
        "dataset": "digits", "network": network, "batch_size": 8, "accumulate": RUNS[loss],
        "optim": "SGD", "lrate": 0.1, "warm_epoch": 0, "ema": 0.9, "grad_clip": 100.0,
        "distill": distill, **changes,
    }  # fmt: skip
    return parse_config(values)


def trainer(loss: str, **changes) -> Trainer:
    return Trainer(config(loss, **changes), dataset(80), CPU, use_amp=False)


def trained(loss: str, **changes) -> dict:
    """The full state after STEPS steps."""
    t = trainer(loss, **changes)
    for _ in range(STEPS):
        t.train_step()
    return t.full_state()


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.start()
    for name in RUNS:
        state = trained(name)
        if distributed.is_main():
            torch.save(state, Path(sys.argv[1]) / f"{name}.pth")
    distributed.stop()
