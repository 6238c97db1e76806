"""What test_distributed.py runs, in its own process and under torchrun: jobs on a few digits.

python -m torch.distributed.run ... tests/distributed_jobs.py YAML FOLDER
"""

import contextlib
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
import linear
import sample
import train
from model.DDPM import DDPM
from support import distributed
from training.trainer import Trainer

read_all = cli.read_dataset


def some_digits(config, data_dir, split, skip_bad_images):
    data, n = read_all(config, data_dir, split, skip_bad_images), {"train": 160, "test": 41}[split]
    return data.take(slice(n))


def make_small(setattr) -> None:
    """Little data, and few steps of the sampler in training."""
    setattr(cli, "read_dataset", some_digits)
    setattr(DDPM, "default_steps", 10)


def training(yaml: str, *more: str) -> int:
    return train.main(["--config", yaml, "--device", "cpu", *more])


def evaluation(ckpt: str, folder: Path) -> None:
    common = ["--ckpt", ckpt, "--device", "cpu", "--set", f"save_dir={folder}"]
    sample.main([*common, "--steps", "4", "--n", "5"])
    linear.main([*common, "--grid", "--timesteps", "1,21", "--protocol", "cached"])
    linear.main([*common, "--timestep", "21", "--blockname", "out_2"])


def at_step(number: int, rank: int, act) -> None:
    """Lets `act` happen on one rank before its step `number`."""
    step = Trainer.train_step

    def train_step(self):
        if self.step == number and distributed.rank() == rank:
            act()
        step(self)

    Trainer.train_step = train_step


def fail():
    raise RuntimeError("rank 1 has a bug")


def together(yaml: str, folder: Path) -> None:
    """`folder`/one holds the run of one process; what two processes do goes beside it."""
    training(yaml, "--set", f"save_dir={folder}/one_then_two")
    evaluation(f"{folder}/one/ckpts/model_0.pth", folder / "two_evaluated")
    at_step(3, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        training(yaml, "--set", f"save_dir={folder}/stopped")
    except SystemExit as stop:
        print("stopped with", stop.code, "on rank", distributed.rank())
    with contextlib.suppress(SystemExit):
        training(yaml, "--set", "batch_size=15")
    at_step(2, 1, fail)
    training(yaml, "--set", f"save_dir={folder}/failed")


if __name__ == "__main__":
    make_small(setattr)
    distributed.start()
    distributed.stop = lambda: None  # several jobs, one process group
    together(sys.argv[1], Path(sys.argv[2]))
