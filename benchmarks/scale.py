"""Does what a linear probe reads grow with the network? One recipe at several widths.

python -m benchmarks.scale --use_amp --n_step 1562                # two epochs at each width
python -m benchmarks.scale --use_amp --n_step 1562 --seeds 0,1 --compile --parallel 4
"""

import argparse
from pathlib import Path

from arguments import Exclusion, at_least, int_list
from benchmarks.experiment import (
    add_budget_arguments,
    at_a_time,
    budget_of,
    earlier,
    grid_arguments,
    in_words,
    job_arguments,
    raise_failed,
    read_grid,
    run_facts,
    run_jobs,
    run_settings,
)
from cli import job, job_parser
from evaluation.plots import curves
from evaluation.tables import as_markdown, as_text, ends, with_interval
from support.errors import UserError
from support.files import check_writable, write_json, write_text

BLOCKS = "out_1,out_2,out_3,out_4,out_5,out_6,out_7,out_8"
EXCLUDES = (Exclusion("seeds", ("seed",), "several seeds, or one"),)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = job_parser(__doc__.splitlines()[0], checkpoint=False, compiles=True, excludes=EXCLUDES)
    parser.add_argument(
        "--channels", type=int_list, default=[32, 64, 96, 128], metavar="N,N",
        help="widths, multiples of 32: the config's n_channels",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int_list, default=[0], metavar="S,S", help="of each width")
    add_budget_arguments(parser, BLOCKS)
    parser.add_argument("--runs", default="runs/scale", metavar="DIR", help="where the runs go")
    parser.add_argument("--output_dir", default="results/scale", help="where the tables go")
    args = parser.parse_args(argv)
    at_least(args, channels=32, seeds=0, n_step=1, n_train=1)
    if args.seed is not None:
        args.seeds, args.seed = [args.seed], None
    for name in ("channels", "seeds"):
        if len(set(vars(args)[name])) < len(vars(args)[name]):
            raise UserError(f"--{name}: name each once")
    return args


def commands(channels: int, seed: int, args: argparse.Namespace) -> tuple[dict, Path]:
    """({job: its arguments}, the run's folder) of one network at this budget."""
    folder = Path(args.runs) / f"{channels}_{args.n_step}_seed{seed}"
    settings = [*args.overrides, f"seed={seed}", f"network.n_channels={channels}"]
    shared = job_arguments(args, run_settings(args, settings, folder))
    grid = ["linear.py", *shared, *grid_arguments(args)]
    jobs = {"train": ["train.py", *shared], "trained": grid}
    return jobs | {"untrained": [*grid, "--baseline", "random"]}, folder


def measured(channels: int, seed: int, args: argparse.Namespace) -> dict:
    """Trains and probes one network, and probes its untrained twin; the jobs go on where they
    were killed."""
    jobs, folder = commands(channels, seed, args)
    run_jobs(args, jobs, folder)
    grids = {
        "trained": read_grid(args, folder),
        "untrained": read_grid(args, folder, baseline="random"),
    }
    kept = ("epoch", "headline", "cells")
    return {
        "channels": channels,
        "seed": seed,
        **{name: {key: grid[key] for key in kept} for name, grid in grids.items()},
        **run_facts(jobs, folder),
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
    lines, bars, notes = {}, {}, {}
    for name in ("trained", "untrained"):
        for seed in sorted({run["seed"] for run in runs}):
            of_seed = {
                run["parameters"]: run[name]["headline"] for run in runs if run["seed"] == seed
            }
            found = [of_seed.get(size) for size in sizes]
            line = f"{name}, seed {seed}"
            lines[line] = [cell and 100 * cell["test_accuracy"] for cell in found]
            bars[line] = [ends(cell["test_interval"]) if cell else (0.0, 0.0) for cell in found]
            notes[line] = [f"{cell['block']}, t={cell['t']}" if cell else "" for cell in found]
    curves(
        path, sizes, lines, title, "parameters", "test accuracy in %, cell picked on held-out",
        bars=bars, log_x=True, notes=notes,
    )  # fmt: skip


def in_order(runs: list[dict]) -> list[dict]:
    """From the smallest up, whichever ended first."""
    return sorted(runs, key=lambda run: (run["channels"], run["seed"]))


def missing_of(args: argparse.Namespace, runs: list[dict]) -> dict[str, tuple[int, int]]:
    """{name: (channels, seed)} of what is asked for and not among `runs`, the longest first."""
    there = {(run["channels"], run["seed"]) for run in runs}
    asked = [(c, s) for c in sorted(args.channels, reverse=True) for s in args.seeds]
    return {f"{c} channels, seed {s}": (c, s) for c, s in asked if (c, s) not in there}


def report(stem: Path, title: str, runs: list[dict]) -> None:
    """Writes the table as .md and the plot as .png, and prints the table."""
    heading = {"accuracy in %, each cell picked on the held-out images": table(runs)}
    write_text(stem.with_suffix(".md"), as_markdown(title, heading, []))
    draw(stem.with_suffix(".png"), runs, title)
    print(as_text(title, heading, []))
    print(f"\nwrote {stem}.json, {stem}.md and {stem}.png")


@job
def main(argv: list[str] | None = None) -> int:
    """Trains and probes each width; writes .json after each, then .md and .png."""
    args = parse_args(argv)
    check_writable([args.runs, args.output_dir])
    budget = budget_of(args)
    stem = Path(args.output_dir) / f"scale_{args.n_step}"
    path = stem.with_suffix(".json")
    record = earlier(path, {"runs": list}, budget)
    runs, failed = record["runs"] if record else [], []
    missing = missing_of(args, runs)

    def measure(name: str) -> dict:
        return measured(*missing[name], args)

    for _, run in at_a_time(args.parallel, list(missing), measure, failed):
        runs = in_order([*runs, run])
        write_json(path, {"budget": budget, "runs": runs})
    if runs:
        report(stem, f"One recipe at several widths: {in_words(budget)}", runs)
    raise_failed(failed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
