"""Linear probe: how well a linear classifier reads the classes from frozen features."""

import argparse
import time
from pathlib import Path

from checkpoint import TrainedModel, versions
from cli import config_of, dataset_of, job, job_parser, model_of
from config import Config
from errors import UserError
from evaluation.features import (
    Extractor,
    FeatureSource,
    network_source,
    pixel_source,
    save_features,
)
from evaluation.probe import CellResult, holdout, probe_cached, probe_paper
from evaluation.tables import file_stem, summary, write_grid, write_record
from model.models import build_denoiser
from utils import log, pick_device, seed_everything


def int_list(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = job_parser(__doc__)
    parser.add_argument("--grid", action="store_true", help="probe all blocks x timesteps")
    parser.add_argument(
        "--timesteps", type=int_list, metavar="T,T", help="of the grid (default: the process's)"
    )
    parser.add_argument("--blocks", metavar="NAME,NAME", help="of the grid (default: all)")
    parser.add_argument("--timestep", type=int, help="of the one cell (default: the config's)")
    parser.add_argument("--blockname", help="of the one cell (default: the config's)")
    parser.add_argument(
        "--protocol", choices=["paper", "cached"], default="paper",
        help="paper: Adam on augmented images, as the reference; cached: each image's features "
        "once, heads at their optimum, in a fraction of the time",
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
    parser.add_argument("--output_dir", help="where the results go (default: the run's save_dir)")
    args = parser.parse_args(argv)
    if args.grid and (args.timestep or args.blockname):
        raise UserError("--grid takes --timesteps and --blocks, not --timestep and --blockname")
    if not args.grid and (args.timesteps or args.blocks):
        raise UserError("--timesteps and --blocks are of the grid: add --grid")
    if args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size}: give at least 1")
    return args


def source_of(args, device) -> tuple[FeatureSource, Config, TrainedModel | None, str]:
    """What is probed, its config, its checkpoint if it is one, and words for titles."""
    if args.baseline is None:
        trained = model_of(args, device)
        source = network_source(trained.denoiser, trained.fingerprint(), args.use_amp)
        return source, trained.config, trained, f"epoch {trained.epoch}"
    config = config_of(args) if args.config or not args.ckpt else model_of(args, device).config
    if args.baseline == "pixels":
        return pixel_source(), config, None, "raw pixels"
    seed_everything(config.seed, "init")
    denoiser = build_denoiser(config).to(device).eval().requires_grad_(False)
    untrained = TrainedModel(denoiser, config, epoch=-1, path=Path())
    source = network_source(denoiser, untrained.fingerprint(), args.use_amp)
    return source, config, None, "untrained network"


def cells_of(args, source: FeatureSource, config: Config) -> tuple[list[int], list[str]]:
    """The timesteps and blocks to probe. Raises UserError for those that are not there."""
    if args.grid:
        timesteps = args.timesteps or source.default_timesteps
        blocks = args.blocks.split(",") if args.blocks else source.block_names
    elif args.baseline == "pixels":
        timesteps, blocks = [args.timestep or 0], [args.blockname or "pixels"]
    else:
        timesteps = [config.linear.timestep if args.timestep is None else args.timestep]
        blocks = [args.blockname or config.linear.blockname]
    timesteps, blocks = sorted(set(timesteps)), list(dict.fromkeys(blocks))
    source.check(timesteps, blocks)
    return timesteps, blocks


def save_results(folder, args, config, trained, title, results: list[CellResult], facts: dict):
    """Writes the files of the grid or of the one cell. Returns their paths."""
    record = {
        "dataset": config.dataset,
        "checkpoint": None if trained is None else str(trained.path),
        "epoch": None if trained is None else trained.epoch,
        "baseline": args.baseline,
        "protocol": args.protocol,
        "seed": config.seed,
        "use_amp": args.use_amp,
        **facts,
        "versions": versions(),
        "config": config.model_dump(mode="json"),
    }
    stem = file_stem(None if args.grid else results[0], args.protocol, args.baseline)
    if args.grid:
        return write_grid(folder, stem, results, record, title)
    path = folder / f"{stem}.json"
    write_record(path, results, record)
    return [path]


@job
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device = pick_device(args.device)
    source, config, trained, what = source_of(args, device)
    timesteps, blocks = cells_of(args, source, config)
    train, test = (dataset_of(args, config, split) for split in ("train", "test"))
    save_dir = Path(config.save_dir)
    kept = None if args.baseline == "pixels" else save_dir / "features"
    extractor = Extractor(source, device, config.seed, args.batch_size, kept)

    start = time.perf_counter()
    if args.protocol == "cached":
        results = probe_cached(extractor, train, test, timesteps, blocks)
    else:
        results = probe_paper(
            extractor, train, test, timesteps, blocks, config.linear, config.flip, save_dir
        )
    seconds = time.perf_counter() - start

    n_held = int(holdout(train.labels).sum())
    title = f"linear probe: {train.name}, {what}, protocol {args.protocol}"
    facts = {
        "fingerprint": source.fingerprint,
        "n_train": len(train), "n_validation": n_held, "n_test": len(test),
        "device": device.type, "seconds": seconds, "images_per_s": extractor.images_per_s,
    }  # fmt: skip
    folder = Path(args.output_dir or save_dir)
    print(summary(results, title, n_held, len(test)))
    paths = save_results(folder, args, config, trained, title, results, facts)
    print("\nwrote " + ", ".join(str(path) for path in paths))
    if args.save_features:
        path = Path(args.save_features)
        features = [extractor(dataset, timesteps, blocks) for dataset in (train, test)]
        save_features(path, [train, test], features)
        print(f"wrote {path}")
    if kept and kept.is_dir():
        log.info(f"features are kept in {kept}: a second probe of this model reads them there")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
