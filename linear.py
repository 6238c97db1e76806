"""Linear probe: how well a linear classifier reads the classes from frozen features."""

import argparse
from pathlib import Path

import torch

from arguments import Exclusion, at_least, int_list, sums_of
from checkpoint import TrainedModel, versions
from cli import (
    add_output_dir,
    job,
    job_parser,
    load_datasets,
    load_model,
    load_untrained,
    one_cell,
    pick_config,
    results_folder,
)
from config import Config
from evaluation.plots import subject
from evaluation.probe.cells import Cell, cells_of
from evaluation.probe.features import FeatureSource, model_source, pixel_source
from evaluation.probe.grid import Grid
from evaluation.probe.grid_files import file_stem, untrained_results
from evaluation.probe.over_epochs import EpochCurve, probe_epochs
from evaluation.probe.over_seeds import SeedTable, probe_seeds
from evaluation.probe.probe import PROTOCOLS, Probe, Protocol
from support import distributed
from support.errors import UserError
from support.files import check_writable
from utils import log, pick_device

EXCLUDES = (
    Exclusion("grid", ("timestep", "blockname"), "--grid takes --timesteps and --blocks"),
    Exclusion("sigmas", ("timesteps", "timestep"), "the noise levels are named in one way"),
    Exclusion("timesteps", ("timestep",), "the noise levels are named in one way"),
    Exclusion("blocks", ("blockname",), "the blocks are named in one way"),
    Exclusion(
        "epochs", ("epoch", "ckpt", "baseline", "seeds", "save_features"),
        "--epochs reads the checkpoints in the config's save_dir, with one seed",
    ),
    Exclusion("seeds", ("seed", "save_features"), "--seeds probes with several"),
    Exclusion("baseline", ("epoch", "input_scale"), "no checkpoint is probed"),
)  # fmt: skip


def epoch_list(text: str) -> list[int]:
    """The argument type of 1,2,3 or all; [] stands for all."""
    return [] if text == "all" else int_list(text)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments. Raises UserError for cells and seeds that do not go together."""
    parser = job_parser(__doc__, compiles=True, excludes=EXCLUDES)
    parser.add_argument("--grid", action="store_true", help="probe all blocks x timesteps")
    parser.add_argument(
        "--timesteps", type=sums_of(int), metavar="T,T+T",
        help="of the grid (default: the process's); 1+11: their features side by side",
    )  # fmt: skip
    parser.add_argument(
        "--blocks", type=sums_of(str), metavar="NAME,NAME+NAME",
        help="of the grid (default: each alone); out_1+out_2, or all: side by side as one cell",
    )  # fmt: skip
    parser.add_argument("--timestep", type=int, help="of the one cell (default: the config's)")
    parser.add_argument("--blockname", help="of the one cell (default: the config's)")
    parser.add_argument(
        "--sigmas", type=sums_of(float), metavar="S,S+S",
        help="noise levels of the grid, or the one of the cell, instead of timesteps",
    )  # fmt: skip
    parser.add_argument(
        "--protocol", choices=PROTOCOLS, default="paper",
        help="paper: Adam on augmented images, as the reference; cached: each image's features "
        "once, heads at their optimum, in a fraction of the time; knn: the same features, the "
        "votes of the 20 and of the 200 nearest by cosine",
    )  # fmt: skip
    parser.add_argument(
        "--epochs", type=epoch_list, metavar="all|E,E",
        help="the cell, or the grid's best, at all checkpoints of the run or at these",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=int_list, metavar="S,S",
        help="mean and standard deviation over these seeds of the probe",
    )  # fmt: skip
    parser.add_argument(
        "--baseline", choices=["random", "pixels"],
        help="probe an untrained network or the raw pixels instead of a checkpoint",
    )  # fmt: skip
    parser.add_argument(
        "--n_train", type=int, metavar="N",
        help="fit the heads on N of the training images, the classes in proportion (default: all)",
    )  # fmt: skip
    parser.add_argument("--save_features", metavar="NPZ", help="also write features and labels")
    parser.add_argument(
        "--batch_size", type=int, default=512,
        help="images per forward where features are extracted; changes nothing but speed and "
        "memory (the heads' batch is linear.batch_size)",
    )  # fmt: skip
    add_output_dir(parser)
    args = parser.parse_args(argv)
    of_one_cell = (args.timesteps, args.blocks, args.sigmas)
    if not args.grid and any(len(given or []) > 1 for given in of_one_cell):
        raise UserError("several --timesteps, --blocks or --sigmas are of the grid: add --grid")
    at_least(args, batch_size=1, epochs=0, seeds=0, n_train=1)
    if args.seeds and len(set(args.seeds)) < 2:
        raise UserError("--seeds: a standard deviation needs two that differ")
    if args.seeds and args.baseline == "pixels" and args.protocol != "paper":
        raise UserError(f"--seeds: on raw pixels, --protocol {args.protocol} draws nothing")
    return args


def probed_source(
    args: argparse.Namespace, device: torch.device
) -> tuple[TrainedModel | None, FeatureSource, Config, str, dict]:
    """The model (of --epochs the newest; None: pixels), what is probed of it, the config, words
    for titles, facts for files."""
    facts = {"checkpoint": None, "epoch": None}
    if args.baseline == "pixels":
        model, config, what = None, pick_config(args), "raw pixels"
        source = pixel_source()
    else:
        model = load_untrained(args, device) if args.baseline else load_model(args, device)
        config, what = model.config, model.stage
        source = model_source(model, args.use_amp)
    if args.baseline is None:
        facts = {"checkpoint": str(model.path), "epoch": model.epoch}
        facts["input_scale"] = model.input_scale
    return model, source, config, what, facts | {"fingerprint": source.fingerprint}


def asked_cells(
    args: argparse.Namespace, source: FeatureSource, config: Config
) -> tuple[Cell, ...]:
    """The cells of the grid, or the one cell."""
    timesteps, blocks = args.timesteps, args.blocks
    if not args.grid:
        at_pixels = (args.timestep or 0, args.blockname or "pixels")
        t, block = at_pixels if args.baseline == "pixels" else one_cell(args, config)
        timesteps, blocks = timesteps or [[t]], blocks or [[block]]
    return cells_of(source, timesteps, blocks, args.sigmas)


def results_of(
    args: argparse.Namespace,
    probe: Probe,
    source: FeatureSource,
    config: Config,
    what: str,
    facts: dict,
) -> Grid | EpochCurve | SeedTable:
    """What the probe finds, under a title and with the facts that its files record."""
    cell = None if args.grid else probe.cells[0]
    if args.epochs is not None:
        what = cell.name if cell else "the grid's best cell"
        facts = {"input_scale": args.input_scale}
    about_what = subject(probe.train.name, config.model_type)
    title = f"{probe.kind} probe: {about_what}, {what}, protocol {args.protocol}"
    about = {
        "dataset": config.dataset, "baseline": args.baseline, "grid": args.grid, **facts,
        **probe.facts(), "seed": None if args.seeds else config.seed, "use_amp": args.use_amp,
        "versions": versions(), "config": config.model_dump(mode="json"),
    }  # fmt: skip
    folder = results_folder(args, config)
    if args.epochs is not None:
        found = probe_epochs(
            probe, args.epochs, config, args.use_amp, args.compile, args.input_scale
        )
        untrained = untrained_results(folder, about, found[0].outcome.results)
        return EpochCurve(found, title, about, untrained)
    if args.seeds:
        return SeedTable(probe_seeds(probe, source, args.seeds), title, about)
    outcome = probe(source, config.seed)
    untrained = untrained_results(folder, about, outcome.results) if args.grid else []
    return Grid(outcome, title, about, untrained)


@job
def main(argv: list[str] | None = None) -> int:
    """Probes the cells, and writes what it finds as .json, .md and .png."""
    args = parse_args(argv)
    device = pick_device(args.device)
    model, source, config, what, facts = probed_source(args, device)
    cells = asked_cells(args, source, config)
    kept = [Path(config.save_dir, name) for name in ("features", "probes")]
    check_writable([results_folder(args, config), *kept], [args.save_features])
    train, test = load_datasets(args, config, model)
    probe = Probe(
        train=train, test=test, cells=cells,
        protocol=Protocol(args.protocol, config.linear, config.flip),
        device=device, batch_size=args.batch_size, folder=Path(config.save_dir),
    )  # fmt: skip
    results = results_of(args, probe, source, config, what, facts)
    stem = file_stem(
        None if args.grid else cells[0], args.protocol, args.baseline,
        epoch=results.about.get("epoch"), over=results.OVER, n_train=args.n_train,
    )  # fmt: skip
    if distributed.is_main():
        paths = results.save(results_folder(args, config) / stem)
        print(results.text())
        print("\nwrote " + ", ".join(map(str, paths)))
    if args.save_features:
        probe.save_features(source, config.seed, Path(args.save_features))
        print(f"wrote {args.save_features}")
    if args.baseline != "pixels" and probe.features_folder.is_dir():
        log.info(f"features are kept in {probe.features_folder}: a second probe reads them there")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
