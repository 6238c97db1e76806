"""Compares training recipes at one budget: each changes a few values of config/fast.yaml.

python -m benchmarks.recipes --use_amp                         # one epoch of the main network each
python -m benchmarks.recipes --use_amp --channels 32 --n_step 390 --n_train 10000     # coarse
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import checkpoint
from cli import at_least, int_list, job, job_parser
from config import load_config
from evaluation.tables import as_markdown, as_text, percent, with_interval, write_text
from support.errors import UserError
from support.files import read_json, write_json
from utils import log

BASE = "config/fast.yaml"
BATCH = 64  # images of a step of the budget, whatever batches a recipe takes


@dataclass(frozen=True)
class Recipe:
    """What a row changes (`settings`, as after --set) and why it might help."""

    settings: tuple[str, ...]
    why: str


RECIPES = {
    "fast": Recipe((), "the recipe itself"),
    "lr 3e-4": Recipe(("lrate=3e-4",), "a smaller step"),
    "lr 2e-3": Recipe(("lrate=2e-3",), "a larger step"),
    "lr 3e-3": Recipe(("lrate=3e-3",), "a larger step still"),
    "constant lr": Recipe(("lr_decay=none",), "no decay: the EMA alone averages the noise out"),
    "cosine": Recipe(("lr_decay=cosine",), "a decay that stays high longer"),
    "dropout 0.1": Recipe(("network.dropout=0.1",), "the main config's regularisation"),
    "beta2 0.95": Recipe(("optim_args.betas=[0.9,0.95]",), "a shorter memory of the gradients"),
    "batch 32": Recipe(("batch_size=32",), "twice the steps from the same images"),
    "batch 128": Recipe(("batch_size=128",), "half the steps from the same images"),
    "v": Recipe(("diffusion.objective=v",), "predicts v instead of the noise"),
    "v, min-SNR": Recipe(
        ("diffusion.objective=v", "diffusion.weighting=min_snr"), "weighs high noise down"
    ),
    "log-normal": Recipe(("diffusion.time=lognormal",), "trains on EDM's noise levels"),
    "log-normal, higher": Recipe(
        ("diffusion.time=lognormal", "diffusion.p_mean=-0.5"), "the same, more noise"
    ),
    "log-normal, lr 2e-3": Recipe(("diffusion.time=lognormal", "lrate=2e-3"), "both together"),
    "log-normal, v": Recipe(("diffusion.time=lognormal", "diffusion.objective=v"), "both together"),
    "zero init": Recipe(("network.zero_init=True",), "residual blocks begin as identities"),
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments. Raises UserError for a recipe that is not there."""
    parser = job_parser(__doc__.splitlines()[0], checkpoint=False)
    parser.add_argument(
        "--rows", metavar="NAME;NAME", help=f"which recipes (default: all): {'; '.join(RECIPES)}"
    )
    parser.add_argument("--channels", type=int, default=64, help="width of the network")
    parser.add_argument(
        "--n_step", type=int, default=781,
        help="batches of 64 images to train on; 781 are one epoch of CIFAR-10",
    )  # fmt: skip
    parser.add_argument("--timesteps", type=int_list, default=[1, 11, 21], help="of the probe")
    parser.add_argument("--blocks", default="out_2,out_5,out_6", help="of the probe")
    parser.add_argument("--n_train", type=int, help="training images of the probe (default: all)")
    parser.add_argument("--runs", default="runs/recipes", metavar="DIR", help="where the runs go")
    parser.add_argument("--output_dir", default="results/recipes", help="where the tables go")
    args = parser.parse_args(argv)
    at_least(args, channels=32, n_step=1, n_train=1)
    unknown = set(names_of(args)) - set(RECIPES)
    if unknown:
        raise UserError(f"--rows: no recipe '{min(unknown)}': there are {'; '.join(RECIPES)}")
    return args


def names_of(args: argparse.Namespace) -> list[str]:
    """The recipes that --rows names; all without it."""
    return [name.strip() for name in args.rows.split(";")] if args.rows else list(RECIPES)


def commands(name: str, args: argparse.Namespace) -> tuple[list[str], list[str], Path]:
    """(train.py's arguments, linear.py's, the run's folder) of a row at this budget."""
    words = "_".join(name.replace(",", "").split())
    folder = Path(args.runs) / f"{words}_{args.channels}_{args.n_step}"
    settings = [
        *RECIPES[name].settings, *args.overrides, f"network.n_channels={args.channels}",
        f"save_dir={folder}", "n_sample=1",
    ]  # fmt: skip
    base = args.config or BASE
    batch_size = load_config(base, settings).batch_size
    settings.append(f"n_step={args.n_step * BATCH // batch_size}")
    shared = ["--config", base, "--data_dir", args.data_dir]
    shared += ["--use_amp"] if args.use_amp else []
    shared += ["--device", args.device] if args.device else []
    shared += [word for setting in settings for word in ("--set", setting)]
    probe = ["--grid", "--protocol", "cached", "--blocks", args.blocks, "--timesteps"]
    probe.append(",".join(map(str, args.timesteps)))
    probe += ["--n_train", str(args.n_train)] if args.n_train else []
    return ["train.py", *shared], ["linear.py", *shared, *probe], folder


def measured(name: str, args: argparse.Namespace) -> dict:
    """Trains and probes one recipe; both jobs go on where they were killed."""
    train, probe, folder = commands(name, args)
    for command in (train, probe):
        log.info(f"{name}: python {' '.join(command)}")
        done = subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL)
        if done.returncode:
            raise UserError(f"{name}: python {' '.join(command)} ended with {done.returncode}")
    (grid,) = sorted(folder.glob("linear_grid*cached*.json"))
    record = read_json(grid)
    return {
        "settings": list(RECIPES[name].settings),
        "commands": [f"python {' '.join(command)}" for command in (train, probe)],
        "headline": record["headline"],
        "cells": record["cells"],
        "test_loss": checkpoint.load(checkpoint.find(folder))["metrics"]["best_loss"],
        "versions": record["versions"],
    }


def table(records: dict[str, dict]) -> list[list[str]]:
    """One row per recipe: the picked cell, its accuracies, the gain over the first row's."""
    rows = [["recipe", "cell", "held-out", "test (95 % interval)", "gain", "test loss"]]
    base = next(iter(records.values()))["headline"]["validation_accuracy"]
    for name, record in records.items():
        best = record["headline"]
        rows.append([
            name, f"{best['block']} at t={best['t']}", percent(best["validation_accuracy"]),
            with_interval(best["test_accuracy"], best["test_interval"]),
            f"{100 * (best['validation_accuracy'] - base):+.2f}", f"{record['test_loss']:.5f}",
        ])  # fmt: skip
    return rows


@job
def main(argv: list[str] | None = None) -> int:
    """Trains and probes each recipe, and writes the table as .json and .md."""
    args = parse_args(argv)
    budget = (
        f"{args.channels} channels, {args.n_step * BATCH:,} images, {args.n_train or 'all'} probed"
    )
    stem = Path(args.output_dir) / f"recipes_{args.channels}_{args.n_step}"
    path = stem.with_suffix(".json")
    earlier = read_json(path) if path.is_file() else {}
    records = dict(earlier.get("recipes", {}))
    for name in names_of(args):
        if name not in records:
            records[name] = measured(name, args)
            records = {row: records[row] for row in RECIPES if row in records}
            write_json(path, {"budget": budget, "recipes": records})
    title = f"Recipes compared: {budget}"
    heading = {"accuracy in %; held-out picks the cell, and the gain is of it": table(records)}
    why = [f"{name}: {RECIPES[name].why}" for name in records]
    write_text(stem.with_suffix(".md"), as_markdown(title, heading, why))
    print(as_text(title, heading, why))
    print(f"\nwrote {path} and {stem.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
