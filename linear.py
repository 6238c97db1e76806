"""Linear probe: how well a linear classifier reads the classes from frozen features."""

import argparse
from pathlib import Path

from checkpoint import untrained, versions
from cli import (
    add_output_dir,
    at_least,
    float_list,
    int_list,
    job,
    job_parser,
    load_dataset,
    load_model,
    one_cell,
    pick_config,
    results_folder,
)
from config import Config
from datasets import SPLITS
from evaluation import tables
from evaluation.probe import over_epochs as epochs
from evaluation.probe import over_seeds as seeds
from evaluation.probe.features import FeatureSource, model_source, pixel_source
from evaluation.probe.probe import PROTOCOLS, Probe
from support import distributed
from support.errors import UserError
from utils import log, pick_device

EXCLUDES = (  # see cli.JobParser
    ("grid", ("timestep", "blockname"), "--grid takes --timesteps and --blocks"),
    ("sigmas", ("timesteps", "timestep"), "the noise levels are named in one way"),
    (
        "epochs", ("epoch", "ckpt", "baseline", "seeds", "save_features"),
        "--epochs reads the checkpoints in the config's save_dir, with one seed",
    ),
    ("seeds", ("seed", "save_features"), "--seeds probes with several"),
    ("baseline", ("epoch", "input_scale"), "no checkpoint is probed"),
)  # fmt: skip


def epoch_list(text: str) -> list[int]:
    return [] if text == "all" else int_list(text)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = job_parser(__doc__, excludes=EXCLUDES)
    parser.add_argument("--grid", action="store_true", help="probe all blocks x timesteps")
    parser.add_argument(
        "--timesteps", type=int_list, metavar="T,T", help="of the grid (default: the process's)"
    )
    parser.add_argument("--blocks", metavar="NAME,NAME", help="of the grid (default: all)")
    parser.add_argument("--timestep", type=int, help="of the one cell (default: the config's)")
    parser.add_argument("--blockname", help="of the one cell (default: the config's)")
    parser.add_argument(
        "--sigmas", type=float_list, metavar="S,S",
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
    parser.add_argument("--save_features", metavar="NPZ", help="also write features and labels")
    parser.add_argument(
        "--batch_size", type=int, default=512,
        help="images per forward where features are extracted; changes nothing but speed and "
        "memory (the heads' batch is linear.batch_size)",
    )  # fmt: skip
    add_output_dir(parser)
    args = parser.parse_args(argv)
    if not args.grid and (args.timesteps or args.blocks or len(args.sigmas or []) > 1):
        raise UserError("--timesteps, --blocks and several --sigmas are of the grid: add --grid")
    at_least(args, batch_size=1, epochs=0, seeds=0)
    if args.seeds and len(set(args.seeds)) < 2:
        raise UserError("--seeds: a standard deviation needs two that differ")
    if args.seeds and args.baseline == "pixels" and args.protocol != "paper":
        raise UserError(f"--seeds: on raw pixels, --protocol {args.protocol} draws nothing")
    return args


def probed_source(args, device) -> tuple[FeatureSource, Config, str, dict]:
    """What is probed (of --epochs the newest), its config, words for titles, facts for files."""
    if args.baseline is None:
        model = load_model(args, device)
        facts = {"checkpoint": str(model.path), "epoch": model.epoch}
        facts["input_scale"] = model.input_scale
        what = f"epoch {model.epoch}"
    else:
        config = pick_config(args)
        facts = {"checkpoint": None, "epoch": None}
        if args.baseline == "pixels":
            return pixel_source(), config, "raw pixels", facts
        model, what = untrained(config, device), "untrained network"
    return model_source(model, args.use_amp), model.config, what, facts


def cells_of(args, source: FeatureSource, config: Config) -> tuple[list[float], list[str]]:
    """The timesteps and blocks to probe. Raises UserError for those that are not there."""
    if args.grid:
        timesteps = args.timesteps or source.default_timesteps
        blocks = args.blocks.split(",") if args.blocks else source.block_names
    elif args.baseline == "pixels":
        timesteps, blocks = [args.timestep or 0], [args.blockname or "pixels"]
    else:
        t, block = one_cell(args, config)
        timesteps, blocks = [t], [block]
    if args.sigmas:
        timesteps = [source.timestep(sigma) for sigma in args.sigmas]
    timesteps, blocks = sorted(set(timesteps)), list(dict.fromkeys(blocks))
    source.check(timesteps, blocks)
    return timesteps, blocks


@job
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device = pick_device(args.device)
    source, config, what, facts = probed_source(args, device)
    cells = cells_of(args, source, config)
    train, test = (load_dataset(args, config, split, source.denoiser) for split in SPLITS)
    probe = Probe(
        args.protocol, train, test, *cells, bool(args.sigmas), config.linear, config.flip,
        device, args.batch_size, Path(config.save_dir),
    )  # fmt: skip
    cell = None if args.grid else probe.first_cell(source)
    facts |= {"fingerprint": source.fingerprint}
    if args.epochs is not None:
        mode, what, facts = epochs, cell.name if cell else "the grid's best cell", {}
        results = epochs.probe_epochs(probe, args.epochs, config, args.use_amp, args.input_scale)
    elif args.seeds:
        mode, results = seeds, seeds.probe_seeds(probe, source, args.seeds)
    else:
        mode, results = tables, probe(source, config.seed)

    about = {
        "dataset": config.dataset, "baseline": args.baseline, "grid": args.grid, **facts,
        **probe.facts(), "seed": None if args.seeds else config.seed, "use_amp": args.use_amp,
        "versions": versions(), "config": config.model_dump(mode="json"),
    }  # fmt: skip
    title = f"{probe.kind} probe: {train.name}, {what}, protocol {args.protocol}"
    stem = tables.file_stem(cell, args.protocol, args.baseline, mode.OVER)
    print(mode.summary(results, title, about))
    if distributed.is_main():
        paths = mode.write(results_folder(args, config) / stem, results, title, about)
        print("\nwrote " + ", ".join(map(str, paths)))
    if args.save_features:
        probe.save_features(source, config.seed, Path(args.save_features))
        print(f"wrote {args.save_features}")
    if args.baseline != "pixels" and probe.features_folder.is_dir():
        log.info(f"features are kept in {probe.features_folder}: a second probe reads them there")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
