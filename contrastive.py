"""Alignment and uniformity of every block's features, over the checkpoints of a run."""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from arguments import Exclusion, at_least
from checkpoint import TrainedModel, saved_epochs, versions
from cli import (
    add_output_dir,
    job,
    job_parser,
    load_dataset,
    load_model,
    one_cell,
    pick_config,
    results_folder,
)
from datasets import SPLITS, Dataset
from evaluation.alignment import LABELS, METRICS, figure, kept_rows, measure, table
from evaluation.plots import subject
from evaluation.probe.features import model_source
from evaluation.tables import find_or_add_row
from support import distributed
from support.errors import UserError
from support.files import check_writable, write_json
from utils import log, permutation, pick_device

EXCLUDES = tuple(
    Exclusion(one, ("epoch_interval",), f"--{one} is one checkpoint") for one in ("epoch", "ckpt")
)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; `epoch` is None where all checkpoints are measured."""
    parser = job_parser(__doc__, excludes=EXCLUDES)
    parser.set_defaults(epoch=None)  # all that --epoch_interval chooses
    parser.add_argument(
        "--epoch_interval", type=int, default=1, metavar="N",
        help="of the saved epochs the first, then each that is N or more after the one before, "
        "and the newest; --epoch or --ckpt is one checkpoint instead",
    )  # fmt: skip
    parser.add_argument("--timestep", type=int, help="default: the config's linear.timestep")
    parser.add_argument("--blocks", metavar="NAME,NAME", help="default: all")
    parser.add_argument("--split", choices=SPLITS, default="test", help="whose images")
    parser.add_argument(
        "--n", "--num_images", type=int, metavar="N",
        help="how many, drawn by the seed (default: all); under torchrun --num_images",
    )  # fmt: skip
    parser.add_argument(
        "--batch_size", type=int, default=512, help="images per forward; changes no number"
    )
    add_output_dir(parser)
    args = parser.parse_args(argv)
    at_least(args, epoch_interval=1, batch_size=1, n=2)  # uniformity is of pairs of images
    return args


def at_interval(epochs: list[int], interval: int) -> list[int]:
    """Of ascending epochs the first, each `interval` or more after the one taken, and the last."""
    taken: list[int] = []
    for epoch in epochs:
        if not taken or epoch >= taken[-1] + interval or epoch == epochs[-1]:
            taken.append(epoch)
    return taken


def for_each_model(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The arguments once for every checkpoint, as `load_model` reads them."""
    if args.ckpt is not None or args.epoch is not None:
        return [args]
    epochs = at_interval(saved_epochs(pick_config(args).save_dir), args.epoch_interval)
    newest = [-1]  # of none: `load_model` says what is missing
    return [argparse.Namespace(**vars(args) | {"epoch": epoch}) for epoch in epochs or newest]


def some_images(dataset: Dataset, n: int | None, seed: int) -> Dataset:
    """n images drawn by the seed, in the order of the dataset; the dataset itself if n is None."""
    if n is None:
        return dataset
    return dataset.take(np.sort(permutation(len(dataset), seed, "contrastive")[:n]))


def measured(
    args: argparse.Namespace, model: TrainedModel, images: Dataset, path: Path, device: torch.device
) -> tuple[dict, list[str]]:
    """The row of a checkpoint and its blocks; what is not yet in the file `path` is added there.

    Raises UserError for a timestep or block that is not there.
    """
    config = model.config
    source = model_source(model, args.use_amp)
    t, _ = one_cell(args, config)
    blocks = list(dict.fromkeys(args.blocks.split(","))) if args.blocks else source.block_names
    source.check([t], blocks)
    settings = {
        "epoch": model.epoch, "fingerprint": source.fingerprint, "t": t, "seed": config.seed,
        "dataset": images.name, "split": images.split, "n_images": len(images),
        "images_fingerprint": images.fingerprint(),
    }  # fmt: skip
    blank = {metric: {} for metric in METRICS}
    row = find_or_add_row(kept_rows(path), settings, blank)
    missing = [block for block in blocks if block not in row["alignment"]]
    if not missing:
        log.info(f"{model.stage}: kept in {path}")
        return row, blocks
    start = time.perf_counter()
    values = measure(source, images, t, missing, device, config.seed, args.batch_size)
    rows = kept_rows(path)  # again: another process may have added to them
    row = find_or_add_row(rows, settings, blank)
    for metric in METRICS:
        row[metric] |= values[metric]
    seconds = time.perf_counter() - start
    row |= {
        "checkpoint": str(model.path), "input_scale": model.input_scale, "device": device.type,
        "use_amp": args.use_amp, "versions": versions(), "config": config.model_dump(mode="json"),
    }  # fmt: skip
    row["seconds"] = row.get("seconds", 0.0) + seconds
    log.info(f"{model.stage}: measured in {seconds:.1f} s")
    if distributed.is_main():
        write_json(path, {"measurements": rows})
    return row, blocks


@job
def main(argv: list[str] | None = None) -> int:
    """Measures each checkpoint, and writes contrastive.json and contrastive.png."""
    args = parse_args(argv)
    device = pick_device(args.device)
    images, rows = None, []
    for one in for_each_model(args):
        model = load_model(one, device)
        path = results_folder(args, model.config) / "contrastive.json"
        if images is None:  # the same for every checkpoint of a run
            check_writable([path.parent])
            dataset = load_dataset(args, model.config, args.split, model)
            if len(dataset) < 2:
                raise UserError(f"{dataset.name} {args.split}: one image; uniformity is of pairs")
            images = some_images(dataset, args.n, model.config.seed)
        row, blocks = measured(args, model, images, path, device)
        rows.append(row)
    what = subject(images.name, model.config.model_type)
    title = f"{what}, {images.split}, {len(images):,} images, t={row['t']}"
    if distributed.is_main():
        figure(path.with_suffix(".png"), rows, blocks, f"features on the unit sphere: {title}")
    print(title)
    for metric in METRICS:
        print(f"\n{LABELS[metric]}\n{table(rows, metric, blocks)}")
    print(f"\nwrote {path} and {path.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
