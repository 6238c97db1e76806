"""What benchmarks that train share: the jobs as commands, several at a time, logged in the run's
folder, and what the jobs wrote there. A job that was killed goes on where it stopped."""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import checkpoint
from arguments import int_from, int_list, sums_of
from cli import config_path, job_words, overrides_and_seed
from config import load_config
from evaluation.probe.cells import ALL
from evaluation.probe.grid_files import file_stem
from support.errors import UserError
from support.files import read_json
from utils import log

BASE = "config/fast.yaml"
BATCH = 64  # images of a step of the budget, whatever batches a run takes
NEVER = 1_000_000  # epochs; what is due at the end of a run is due all the same
ONCE = ("n_sample=1", f"sample_every={NEVER}", f"save_every={NEVER}")  # of the last weights alone
LAST_LINES = 3  # of a job that failed, in the message
THREADS = ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")


# --- the command line


def add_budget_arguments(parser: argparse.ArgumentParser, blocks: str) -> None:
    """What every run is given, how it is probed, and how many run at a time."""
    parser.add_argument(
        "--n_step", type=int, default=781,
        help="batches of 64 images to train on; 781 are one epoch of CIFAR-10",
    )  # fmt: skip
    parser.add_argument("--timesteps", type=int_list, default=[1, 11, 21], help="of the probe")
    parser.add_argument(
        "--blocks", type=blocks_of_probe, default=blocks,
        help="of the probe, as linear.py takes them; one of them alone at least",
    )  # fmt: skip
    parser.add_argument("--n_train", type=int, help="training images of the probe (default: all)")
    parser.add_argument(
        "--parallel", type=int_from(1), default=1, metavar="N",
        help="so many runs at a time: a large GPU has room for several",
    )  # fmt: skip


def blocks_of_probe(text: str) -> str:
    """The argument type of --blocks: it stays text. Among them is one that stands alone, since a
    row is of the best single cell."""
    if all(len(sum_) > 1 or sum_ == [ALL] for sum_ in sums_of(str)(text)):
        raise argparse.ArgumentTypeError(f"{text}: name one block that stands alone too")
    return text


def base_of(args: argparse.Namespace) -> str:
    """The config that the command line names; config/fast.yaml without one."""
    return str(config_path(args)) if args.config or args.dataset else BASE


def budget_of(args: argparse.Namespace) -> dict:
    """What the rows of one file have in common: what every run was given, and how it is probed."""
    probe = ("n_train", "blocks", "timesteps", "use_amp")
    config = load_config(base_of(args), overrides_and_seed(args), may_be_idle=True)  # till a row
    return {
        "images": args.n_step * BATCH,
        **{name: vars(args)[name] for name in probe},
        "config": config.model_dump(mode="json"),
    }


def in_words(budget: Mapping) -> str:
    """For titles."""
    heads = f"{budget['n_train']:,} images" if budget["n_train"] else "all of train"
    return f"{budget['images']:,} images, heads fitted on {heads}"


def earlier(path: Path, form: dict, budget: dict) -> dict | None:
    """What an earlier call wrote to `path`; None without it.

    Raises UserError if it is of another budget: its rows do not compare with those to come.
    """
    if not path.is_file():
        return None
    record = read_json(path, {"budget": dict, **form})
    other = [name for name in budget if record["budget"].get(name) != budget[name]]
    if other:
        raise UserError(
            f"{path} is of another budget ({', '.join(other)} differ): choose another "
            "--output_dir, and another --runs where it is the config"
        )
    return record


# --- a run


def run_settings(args: argparse.Namespace, settings: Iterable[str], folder: Path) -> list[str]:
    """`settings`, as after --set, and those of a run at this budget in `folder`.

    Raises UserError for a budget that is less than one step. A last step that it does not fill is
    not taken.
    """
    settings = [*settings, *ONCE, f"save_dir={folder}"]
    config = load_config(base_of(args), settings)
    images = config.images_per_step
    n_step = args.n_step * BATCH // images
    if not n_step:
        raise UserError(f"--n_step {args.n_step}: fewer than the {images} images of one step")
    return [*settings, f"n_step={n_step}"]


def job_arguments(args: argparse.Namespace, settings: list[str]) -> list[str]:
    """What train.py and linear.py both take: config, data, device and settings."""
    words = job_words(args, base_of(args), settings)
    return words + (["--compile"] if args.compile else [])


def grid_arguments(args: argparse.Namespace, protocol: str = "cached") -> list[str]:
    """What linear.py is asked for."""
    grid = ["--grid", "--protocol", protocol, "--blocks", args.blocks, "--timesteps"]
    grid.append(",".join(map(str, args.timesteps)))
    return grid + (["--n_train", str(args.n_train)] if args.n_train else [])


def run_jobs(args: argparse.Namespace, jobs: dict[str, list[str]], folder: Path) -> None:
    """Runs `python <arguments>` for each of the jobs, by name, in turn; what a job says goes into
    <folder>/<name>.log.

    Raises UserError with its last lines if one fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, command in jobs.items():
        log.info("%s", in_shell(command))
        path = folder / f"{name}.log"
        with open(path, "w") as file:
            done = subprocess.run(
                [sys.executable, *command], stdout=file, stderr=subprocess.STDOUT,
                env=shared_cores(args.parallel),
            )  # fmt: skip
        if done.returncode:
            said = path.read_text(errors="replace").strip().splitlines()[-LAST_LINES:]
            raise UserError(
                f"{in_shell(command)} ended with {done.returncode}: {' | '.join(said)}; all of it "
                f"is in {path}"
            )


def shared_cores(parallel: int) -> dict[str, str]:
    """The environment of a job that runs beside others: each with its share of the cores, unless
    the environment says how many."""
    share = max(1, (os.cpu_count() or 1) // parallel)
    threads = dict.fromkeys(THREADS, str(share)) if parallel > 1 else {}
    return threads | os.environ


def in_shell(command: list[str]) -> str:
    """As it is typed."""
    return shlex.join(["python", *command])


# --- what the jobs wrote


def read_grid(
    args: argparse.Namespace, folder: Path, protocol: str = "cached", baseline: str | None = None
) -> dict:
    """The record of the run's grid of the newest checkpoint, or of the baseline's."""
    epoch = None if baseline else checkpoint.saved_epochs(folder)[-1]
    return read_json(
        folder / f"{file_stem(None, protocol, baseline, epoch=epoch, n_train=args.n_train)}.json"
    )


def run_facts(jobs: dict[str, list[str]], folder: Path) -> dict:
    """Commands, size and test loss of the run; all of its last step."""
    state = checkpoint.load(checkpoint.find(folder))
    return {
        "commands": [in_shell(command) for command in jobs.values()],
        "parameters": sum(weight.numel() for weight in state["ema"].values()),
        "step": state["step"],
        "test_loss": state["metrics"]["best_loss"],  # the only one, see ONCE
        "versions": state["versions"],
    }


# --- several runs


def at_a_time(
    n: int, names: list[str], measure: Callable[[str], dict], failed: list[str]
) -> Iterator[tuple[str, dict]]:
    """(name, what measure(name) gives) as they end, n at a time.

    One that raises UserError does not stop the others: `failed` gets its name and why. Any other
    end leaves out those that have not begun.
    """
    pool = ThreadPoolExecutor(n)
    try:
        jobs = {pool.submit(measure, name): name for name in names}
        for job in as_completed(jobs):
            try:
                result = job.result()
            except UserError as error:
                failed.append(f"{jobs[job]}: {error}")
                log.warning("%s failed; the others go on", jobs[job])
                continue
            log.info("%s is done", jobs[job])
            yield jobs[job], result
    finally:
        pool.shutdown(cancel_futures=True)


def raise_failed(failed: list[str]) -> None:
    """Raises UserError with all that failed, if something did: after all the rest is written."""
    if failed:
        raise UserError("\n".join(failed))
