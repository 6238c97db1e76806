"""What benchmarks that train share: the jobs as commands, several at a time, logged in the run's
folder. A job that was killed goes on where it stopped."""

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from cli import int_from, int_list
from support.errors import UserError
from utils import log

BATCH = 64  # images of a step of the budget, whatever batches a run takes
LAST_LINES = 3  # of a job that failed, in the message


def add_budget_arguments(parser: argparse.ArgumentParser, blocks: str) -> None:
    """What every run is given, how it is probed, and how many run at a time."""
    parser.add_argument(
        "--n_step", type=int, default=781,
        help="batches of 64 images to train on; 781 are one epoch of CIFAR-10",
    )  # fmt: skip
    parser.add_argument("--timesteps", type=int_list, default=[1, 11, 21], help="of the probe")
    parser.add_argument("--blocks", default=blocks, help="of the probe, as linear.py takes them")
    parser.add_argument("--n_train", type=int, help="training images of the probe (default: all)")
    parser.add_argument(
        "--parallel", type=int_from(1), default=1, metavar="N",
        help="so many runs at a time: a large GPU has room for several",
    )  # fmt: skip


def job_arguments(args: argparse.Namespace, base: str, settings: list[str]) -> list[str]:
    """What train.py and linear.py both take: config, data, device and settings."""
    shared = ["--config", base, "--data_dir", args.data_dir]
    shared += ["--use_amp"] if args.use_amp else []
    shared += ["--compile"] if args.compile else []
    shared += ["--device", args.device] if args.device else []
    return shared + [word for setting in settings for word in ("--set", setting)]


def grid_arguments(args: argparse.Namespace, protocol: str = "cached") -> list[str]:
    """What linear.py is asked for."""
    grid = ["--grid", "--protocol", protocol, "--blocks", args.blocks, "--timesteps"]
    grid.append(",".join(map(str, args.timesteps)))
    return grid + (["--n_train", str(args.n_train)] if args.n_train else [])


def run_job(name: str, command: list[str], folder: Path) -> None:
    """Runs `python <command>`, of the run `name`; what it says goes into <folder>/<name>.log.

    Raises UserError with its last lines if it fails.
    """
    log.info(f"python {' '.join(command)}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.log"
    with open(path, "w") as file:
        done = subprocess.run([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        said = path.read_text(errors="replace").strip().splitlines()[-LAST_LINES:]
        raise UserError(
            f"python {' '.join(command)} ended with {done.returncode}: {' | '.join(said)}; all of "
            f"it is in {path}"
        )


def at_a_time(
    n: int, names: list[str], measure: Callable[[str], dict]
) -> Iterator[tuple[str, dict]]:
    """(name, what measure(name) gives) as they end, n at a time.

    One that fails does not stop the others: after all, UserError says which did, and why.
    """
    failed = []
    with ThreadPoolExecutor(n) as pool:
        jobs = {pool.submit(measure, name): name for name in names}
        for job in as_completed(jobs):
            try:
                result = job.result()
            except UserError as error:
                failed.append(f"{jobs[job]}: {error}")
                log.warning("%s failed; the others go on", jobs[job])
                continue
            yield jobs[job], result
    if failed:
        raise UserError("\n".join(failed))
