"""Compares training recipes at one budget: each changes a few values of config/fast.yaml.

python -m benchmarks.recipes --use_amp                         # one epoch of the main network each
python -m benchmarks.recipes --use_amp --channels 32 --n_step 390 --n_train 10000     # coarse
python -m benchmarks.recipes --use_amp --compile --parallel 4                  # on a large GPU
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from arguments import at_least
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
from cli import job, job_parser, overrides_and_seed
from evaluation.tables import as_markdown, as_text, percent, with_interval
from support.errors import UserError
from support.files import check_writable, write_json, write_text

BLOCKS = "out_2,out_5,out_6,out_2+out_5+out_6"


@dataclass(frozen=True)
class Recipe:
    """What a row changes (`settings`, as after --set) and why it might help."""

    settings: tuple[str, ...]
    why: str


RECIPES = {
    "fast": Recipe((), "the recipe itself"),
    "lr 5e-4": Recipe(("lrate=5e-4",), "a smaller step"),
    "lr 1e-3": Recipe(("lrate=1e-3",), "a smaller step"),
    "lr 3e-3": Recipe(("lrate=3e-3",), "a larger step"),
    "constant lr": Recipe(("lr_decay=none",), "no decay: the EMA alone averages the noise out"),
    "cosine": Recipe(("lr_decay=cosine",), "a decay that stays high longer"),
    "uniform t": Recipe(("diffusion.time=discrete",), "DDPM's noise levels"),
    "more noise": Recipe(("diffusion.p_mean=-0.5",), "log-normal about a higher level"),
    "less noise": Recipe(("diffusion.p_mean=-2",), "log-normal about a lower level"),
    "dropout 0.1": Recipe(("network.dropout=0.1",), "the main config's regularisation"),
    "beta2 0.95": Recipe(("optim_args.betas=[0.9,0.95]",), "a shorter memory of the gradients"),
    "AdamW": Recipe(("optim=AdamW", "optim_args.weight_decay=0.05"), "decoupled weight decay"),
    "batch 32": Recipe(("batch_size=32",), "twice the steps from the same images"),
    "batch 128": Recipe(("batch_size=128",), "half the steps from the same images"),
    "v": Recipe(("diffusion.objective=v",), "predicts v instead of the noise"),
    "v, min-SNR": Recipe(
        ("diffusion.objective=v", "diffusion.weighting=min_snr"), "weighs high noise down"
    ),
    "zero init": Recipe(("network.zero_init=True",), "residual blocks begin as identities"),
    "self-condition": Recipe(("network.self_condition=out_4",), "a block guides those after it"),
    "self-condition, gate": Recipe(
        ("network.self_condition=out_4", "network.self_condition_gate=True"),
        "the same, scaled by the noise level",
    ),
    "InfoNCE": Recipe(
        ("distill.loss=infonce", "distill.block=out_5"), "agrees with the EMA on another view"
    ),
    "InfoNCE, less": Recipe(
        ("distill.loss=infonce", "distill.block=out_5", "distill.weight=0.02"),
        "InfoNCE at a fifth of its weight",
    ),
    "InfoNCE, colour": Recipe(
        ("distill.loss=infonce", "distill.block=out_5", "distill.teacher_color=0.5"),
        "the other view has other colours",
    ),
    "InfoNCE, colour, less": Recipe(
        (
            "distill.loss=infonce",
            "distill.block=out_5",
            "distill.teacher_color=0.5",
            "distill.weight=0.01",
        ),
        "the same, and denoising weighs more",
    ),
    "InfoNCE, colour, more": Recipe(
        (
            "distill.loss=infonce",
            "distill.block=out_5",
            "distill.teacher_color=0.5",
            "distill.weight=0.5",
        ),
        "the same, and denoising weighs less",
    ),
    "InfoNCE, colour, geometry": Recipe(
        (
            "distill.loss=infonce",
            "distill.block=out_5",
            "distill.teacher_color=0.5",
            "distill.teacher_augment=0.5",
        ),
        "and is scaled, turned and moved",
    ),
    "regression": Recipe(
        ("distill.loss=regression", "distill.block=out_5"), "agrees without negatives"
    ),
    "regression, less": Recipe(
        ("distill.loss=regression", "distill.block=out_5", "distill.weight=0.02"),
        "regression at a fifth of its weight",
    ),
    "dispersive": Recipe(("distill.loss=dispersive", "distill.block=out_5"), "spreads features"),
    "dispersive, less": Recipe(
        ("distill.loss=dispersive", "distill.block=out_5", "distill.weight=0.02"),
        "dispersive at a fifth of its weight",
    ),
    "dispersive, cosine": Recipe(
        ("distill.loss=dispersive_cosine", "distill.block=out_5", "distill.weight=0.02"),
        "the same, and spreads directions alone",
    ),
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments. Raises UserError for a recipe that is not there."""
    parser = job_parser(__doc__.splitlines()[0], checkpoint=False, compiles=True)
    parser.add_argument(
        "--rows", metavar="NAME;NAME", help=f"which recipes (default: all): {'; '.join(RECIPES)}"
    )
    parser.add_argument("--channels", type=int, default=64, help="width of the network")
    add_budget_arguments(parser, BLOCKS)
    parser.add_argument("--runs", default="runs/recipes", metavar="DIR", help="where the runs go")
    parser.add_argument("--output_dir", default="results/recipes", help="where the tables go")
    parser.add_argument("--base", default="fast", help="the row that gains are over")
    args = parser.parse_args(argv)
    at_least(args, channels=32, n_step=1, n_train=1)
    unknown = {*asked_rows(args), args.base} - set(RECIPES)
    if unknown:
        raise UserError(f"no recipe '{min(unknown)}': there are {'; '.join(RECIPES)}")
    return args


def asked_rows(args: argparse.Namespace) -> list[str]:
    """The recipes that --rows names; all without it."""
    return [name.strip() for name in args.rows.split(";")] if args.rows else list(RECIPES)


def commands(name: str, args: argparse.Namespace) -> tuple[dict[str, list[str]], Path]:
    """({job: its arguments}, the run's folder) of a row at this budget."""
    words = "_".join(name.replace(",", "").split())
    folder = Path(args.runs) / f"{words}_{budget_name(args)}"
    width = f"network.n_channels={args.channels}"
    settings = [*overrides_and_seed(args), *RECIPES[name].settings, width]
    shared = job_arguments(args, run_settings(args, settings, folder))
    jobs = {"train": ["train.py", *shared]}
    for protocol in ("cached", "knn"):
        jobs[protocol] = ["linear.py", *shared, *grid_arguments(args, protocol)]
    return jobs, folder


def budget_name(args: argparse.Namespace) -> str:
    """For names of files: width, steps, and the seed where one is given."""
    seed = [] if args.seed is None else [f"seed{args.seed}"]
    return "_".join([str(args.channels), str(args.n_step), *seed])


def measured(name: str, args: argparse.Namespace) -> dict:
    """Trains and probes one recipe; the jobs go on where they were killed."""
    jobs, folder = commands(name, args)
    run_jobs(args, jobs, folder)
    grid = read_grid(args, folder)
    return {
        "settings": list(RECIPES[name].settings),
        **{key: grid[key] for key in ("epoch", "headline", "headline_combined", "cells")},
        "headline_knn": read_grid(args, folder, "knn")["headline"],
        **run_facts(jobs, folder),
    }


def table(records: dict[str, dict], base: str) -> list[list[str]]:
    """One row per recipe: the picked cell, its accuracies, the gain over that of `base`."""
    rows = [["recipe", "cell", "held-out", "test (95 % interval)", "gain", "side by side", "k-NN",
             "test loss"]]  # fmt: skip
    start = records[base]["headline"]["validation_accuracy"] if base in records else None
    for name, record in records.items():
        best, combined = record["headline"], record["headline_combined"]
        gain = "" if start is None else f"{100 * (best['validation_accuracy'] - start):+.2f}"
        rows.append([
            name, f"{best['block']} at t={best['t']}", percent(best["validation_accuracy"]),
            with_interval(best["test_accuracy"], best["test_interval"]), gain,
            percent(combined["test_accuracy"]) if combined else "",
            percent(record["headline_knn"]["test_accuracy"]), f"{record['test_loss']:.5f}",
        ])  # fmt: skip
    return rows


def in_order(records: dict[str, dict]) -> dict[str, dict]:
    """In the order of RECIPES, whichever ended first, without those whose settings have changed."""
    return {
        name: records[name]
        for name, recipe in RECIPES.items()
        if name in records and records[name]["settings"] == list(recipe.settings)
    }


def report(args: argparse.Namespace, stem: Path, title: str, records: dict[str, dict]) -> None:
    """Writes the table as .md, and prints it."""
    what = (
        f"accuracy in %; held-out picks the cell, and the gain is of it, over {args.base}; side by "
        "side: the test accuracy of several blocks together; k-NN: that of its own best cell; test "
        "loss: of the row's own objective and noise levels"
    )
    heading = {what: table(records, args.base)}
    why = [f"{name}: {RECIPES[name].why}" for name in records]
    write_text(stem.with_suffix(".md"), as_markdown(title, heading, why))
    print(as_text(title, heading, why))
    print(f"\nwrote {stem}.json and {stem}.md")


@job
def main(argv: list[str] | None = None) -> int:
    """Trains and probes each recipe; writes .json after each, and the table as .md at the end."""
    args = parse_args(argv)
    check_writable([args.runs, args.output_dir])
    budget = budget_of(args)
    stem = Path(args.output_dir) / f"recipes_{budget_name(args)}"
    path = stem.with_suffix(".json")
    record = earlier(path, {"recipes": dict}, budget)
    records = in_order(record["recipes"] if record else {})
    missing, failed = [name for name in asked_rows(args) if name not in records], []
    for name, row in at_a_time(args.parallel, missing, lambda name: measured(name, args), failed):
        records = in_order({**records, name: row})
        write_json(path, {"budget": budget, "recipes": records})
    if records:
        title = f"Recipes compared: {args.channels} channels, {in_words(budget)}"
        report(args, stem, title, records)
    raise_failed(failed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
