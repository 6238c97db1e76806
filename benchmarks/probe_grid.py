"""The grid of linear probes three ways: as the reference fits it, in one pass, and cached.

python -m benchmarks.probe_grid --config config/DDPM_ddpm.yaml --epoch 59
python -m benchmarks.probe_grid --config config/DDPM_ddpm.yaml --baseline random --n_train 500
"""

import argparse
from statistics import fmean, median

from arguments import Exclusion, at_least, sums_of
from benchmarks.probe_ways import Race
from benchmarks.record import add_output_dir, record_of, write_record
from checkpoint import TrainedModel
from cli import job, job_parser, load_dataset, load_model, load_untrained, one_process
from datasets import stratified
from evaluation.probe.cells import cells_of
from evaluation.probe.features import model_source
from evaluation.tables import aligned
from support.errors import UserError
from support.files import check_writable
from utils import pick_device

TEST_PART = 5  # of train, as CIFAR-10's test is: so forwards are in the proportion they have there
PROBED_ALIKE = Exclusion("baseline", ("epoch", "input_scale"), "no checkpoint is probed")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = job_parser(__doc__.splitlines()[0], excludes=[PROBED_ALIKE])
    parser.add_argument(
        "--baseline", choices=["random"], help="an untrained network instead of a checkpoint"
    )
    parser.add_argument(
        "--n_train", type=int, default=5000, metavar="N", help="training images of the heads"
    )
    parser.add_argument(
        "--n_test", type=int, metavar="N",
        help="test images (default: a fifth of --n_train, the proportion of CIFAR-10)",
    )  # fmt: skip
    parser.add_argument(
        "--epochs", type=int, help="of the heads (default: the config's linear.n_epoch)"
    )
    parser.add_argument(
        "--timesteps", type=sums_of(int), metavar="T,T", help="default: the process's"
    )
    parser.add_argument("--blocks", type=sums_of(str), metavar="NAME,NAME", help="default: all")
    parser.add_argument("--batch_size", type=int, default=512, help="where features are extracted")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each way")
    add_output_dir(parser, "probe_grid")
    args = parser.parse_args(argv)
    at_least(args, n_train=1, n_test=1, epochs=1, batch_size=1, rounds=1)
    if any(len(parts) > 1 for parts in (args.timesteps or []) + (args.blocks or [])):
        raise UserError("--timesteps, --blocks: no + here: the reference fits none side by side")
    one_process("benchmarks.probe_grid")
    return args


@job
def main(argv: list[str] | None = None) -> int:
    """Fits the grid in all ways, writes probe_grid_<device>.json, and prints a table."""
    args = parse_args(argv)
    check_writable([args.output_dir])
    device = pick_device(args.device)
    model = load_untrained(args, device) if args.baseline else load_model(args, device)
    config, source = model.config, model_source(model, args.use_amp)
    recipe = config.linear.model_copy(update={"n_epoch": args.epochs or config.linear.n_epoch})
    n_test = args.n_test or -(-args.n_train // TEST_PART)
    train, test = (
        stratified(load_dataset(args, config, split, model), n, config.seed)
        for split, n in (("train", args.n_train), ("test", n_test))
    )
    race = Race(
        source=source, train=train, test=test, recipe=recipe, flip=config.flip, device=device,
        cells=cells_of(source, args.timesteps, args.blocks), batch_size=args.batch_size,
        seed=config.seed,
    )  # fmt: skip
    record = record_of("benchmarks.probe_grid", argv, device) | {
        "probed": named(model, args.baseline), "dataset": config.dataset, "n_train": len(train),
        "n_test": len(test), "epochs": recipe.n_epoch, "rounds": args.rounds,
        "cells": [cell.name for cell in race.cells], **race.run(args.rounds),
    }  # fmt: skip
    print(report(record), flush=True)
    print(f"\nwrote {write_record(args.output_dir, 'probe_grid', record)}")
    return 0


def named(model: TrainedModel, baseline: str | None) -> str:
    """What is probed, in words."""
    return "untrained network" if baseline else f"{model.path}, epoch {model.epoch}"


def report(record: dict) -> str:
    """The table, and what it is of."""
    lines = [
        f"{record['probed']}, {record['dataset']}: {len(record['cells'])} cells, "
        f"{record['n_train']:,} images of train, {record['n_test']:,} of test, "
        f"{record['epochs']} epochs; {record['machine']['name']}"
    ]
    rows = [[
        "way", "seconds", "x reference", "mean accuracy %", "to the optimum", "farthest cell",
        "forwards here", "of 50,000 + 10,000",
    ]]  # fmt: skip
    for way, row in record["ways"].items():
        rows.append([
            way, f"{median(row['seconds']):,.1f}", f"{row['times_reference']:.2f}",
            f"{100 * fmean(row['accuracies']):.2f}", f"{row['points_to_optimum']:+.2f}",
            f"{row['farthest_from_optimum']:+.2f}", f"{record['forwards_here'][way]:,}",
            f"{record['forwards_of_cifar10'][way]:,}",
        ])  # fmt: skip
    single = record["forwards_of_cifar10"]["cell by cell"]
    return "\n".join([
        *lines, aligned(rows), "the optimum on the same features, not augmented: "
        f"{100 * fmean(record['optimum']):.2f} % on average (scikit-learn)",
        f"one cell after the other would take {single:,} forwards of 50,000 + 10,000 images",
    ])  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
