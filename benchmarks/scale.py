"""Does what a linear probe reads grow with the network? One recipe at several widths.

python -m benchmarks.scale --use_amp --channels 32,64,96 --seeds 0,1 --n_step 1562
"""

import argparse
from pathlib import Path

import checkpoint
from benchmarks.experiment import (
    BATCH,
    add_budget_arguments,
    at_a_time,
    grid_arguments,
    job_arguments,
    run_job,
)
from cli import Exclusion, at_least, int_list, job, job_parser
from config import load_config
from evaluation.plots import curves
from evaluation.tables import (
    as_markdown,
    as_text,
    half_width,
    with_interval,
    write_text,
)
from support.errors import UserError
from support.files import check_writable, read_json, write_json

BASE = "config/fast.yaml"
BLOCKS = "out_1,out_2,out_3,out_4,out_5,out_6,out_7,out_8"
EXCLUDES = (Exclusion("seeds", ("seed",), "several seeds, or one"),)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = job_parser(__doc__.splitlines()[0], checkpoint=False, compiles=True, excludes=EXCLUDES)
    parser.add_argument(
        "--channels", type=int_list, default=[32, 64, 96], metavar="N,N",
        help="widths, multiples of 32: the config's n_channels",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int_list, default=[0], metavar="S,S", help="of each width")
    add_budget_arguments(parser, BLOCKS)
    parser.add_argument("--runs", default="runs/scale", metavar="DIR", help="where the runs go")
    parser.add_argument("--output_dir", default="results/scale", help="where the tables go")
    args = parser.parse_args(argv)
    at_least(args, channels=32, seeds=0, n_step=1, n_train=1)
    if args.seed is not None:
        args.seeds = [args.seed]
    for name in ("channels", "seeds"):
        if len(set(vars(args)[name])) < len(vars(args)[name]):
            raise UserError(f"--{name}: name each once")
    return args


def measured(channels: int, seed: int, args: argparse.Namespace) -> dict:
    """Trains and probes one network, and probes its untrained twin."""
    folder = Path(args.runs) / f"{channels}_{args.n_step}_seed{seed}"
    base = args.config or BASE
    settings = [
        *args.overrides, f"seed={seed}", f"network.n_channels={channels}", f"save_dir={folder}",
        "n_sample=1",
    ]  # fmt: skip
    batch_size = load_config(base, settings).batch_size
    shared = job_arguments(args, base, [*settings, f"n_step={args.n_step * BATCH // batch_size}"])
    grid = ["linear.py", *shared, *grid_arguments(args)]
    jobs = {"train": ["train.py", *shared], "trained": grid}
    jobs["untrained"] = [*grid, "--baseline", "random"]
    for name, command in jobs.items():
        run_job(name, command, folder)
    grids = {"trained": "linear_grid_ep*_cached*.json", "untrained": "linear_grid_cached*.json"}
    headlines = {}
    for name, pattern in grids.items():
        (path,) = folder.glob(pattern)
        record = read_json(path)
        headlines[name] = {"headline": record["headline"], "cells": record["cells"]}
    state = checkpoint.load(checkpoint.find(folder))
    return {
        "channels": channels,
        "seed": seed,
        "parameters": sum(weight.numel() for weight in state["ema"].values()),
        "commands": [f"python {' '.join(command)}" for command in jobs.values()],
        **headlines,
        "test_loss": state["metrics"]["best_loss"],
        "versions": record["versions"],
    }


def table(runs: list[dict]) -> list[list[str]]:
    """One row per network."""
    rows = [["channels", "parameters", "seed", "trained, cell", "test (95 % interval)",
             "untrained, cell", "test (95 % interval)", "gain", "test loss"]]  # fmt: skip
    for run in runs:
        best, start = (run[name]["headline"] for name in ("trained", "untrained"))
        row = [str(run["channels"]), f"{run['parameters']:,}", str(run["seed"])]
        for cell in (best, start):
            row.append(f"{cell['block']} at t={cell['t']}")
            row.append(with_interval(cell["test_accuracy"], cell["test_interval"]))
        gain = 100 * (best["test_accuracy"] - start["test_accuracy"])
        rows.append([*row, f"{gain:+.2f}", f"{run['test_loss']:.5f}"])
    return rows


def draw(path: Path, runs: list[dict], title: str) -> None:
    """Accuracy of the picked cells over parameters, a line for each seed, trained and not."""
    sizes = sorted({run["parameters"] for run in runs})
    lines, spread = {}, {}
    for name in ("trained", "untrained"):
        for seed in sorted({run["seed"] for run in runs}):
            of_seed = {
                run["parameters"]: run[name]["headline"] for run in runs if run["seed"] == seed
            }
            found = [of_seed.get(size) for size in sizes]
            line = f"{name}, seed {seed}"
            lines[line] = [cell and 100 * cell["test_accuracy"] for cell in found]
            spread[line] = [half_width(cell["test_interval"]) if cell else 0.0 for cell in found]
    curves(
        path, sizes, lines, title, "parameters", "test accuracy in %, cell picked on held-out",
        spread=spread, log_x=True,
    )  # fmt: skip


def in_order(runs: list[dict]) -> list[dict]:
    """From the smallest up, whichever ended first."""
    return sorted(runs, key=lambda run: (run["channels"], run["seed"]))


@job
def main(argv: list[str] | None = None) -> int:
    """Trains and probes each width, and writes .json after each, then .md and .png."""
    args = parse_args(argv)
    check_writable([args.runs, args.output_dir])
    stem = Path(args.output_dir) / f"scale_{args.n_step}"
    path = stem.with_suffix(".json")
    budget = f"{args.n_step * BATCH:,} images each, {args.n_train or 'all'} probed"
    runs = read_json(path)["runs"] if path.is_file() else []
    there = {(run["channels"], run["seed"]) for run in runs}
    wanted = {f"{c} channels, seed {s}": (c, s) for c in args.channels for s in args.seeds}
    missing = [name for name, key in wanted.items() if key not in there]
    for _, run in at_a_time(args.parallel, missing, lambda name: measured(*wanted[name], args)):
        runs = in_order([*runs, run])
        write_json(path, {"budget": budget, "runs": runs})
    title = f"One recipe at several widths: {budget}"
    heading = {"accuracy in %, each cell picked on the held-out images": table(runs)}
    write_text(stem.with_suffix(".md"), as_markdown(title, heading, []))
    draw(stem.with_suffix(".png"), runs, title)
    print(as_text(title, heading, []))
    print(f"\nwrote {path}, .md and .png beside it")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
