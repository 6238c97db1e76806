"""Draws images from a trained denoiser: pngs/<i>.png, a grid, and samples.json."""

import argparse
import json
import math
import time
from pathlib import Path

import torch

import distributed
from checkpoint import TrainedModel, versions
from cli import job, job_parser, model_of
from errors import UserError
from evaluation.grids import load_png, save_image_grid, save_png
from files import write_json
from sampling import (
    SamplerSettings,
    add_sampler_arguments,
    default_samples_folder,
    sample,
    settings_of,
)
from utils import log, peak_memory_bytes, pick_device, progress

GRID_IMAGES = 100  # at most so many in grid.png


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = job_parser(__doc__)
    add_sampler_arguments(parser)
    parser.add_argument(
        "--n", "--num_samples", "--num_images", type=int, default=64, help="how many images"
    )
    parser.add_argument("--batch_size", type=int, default=128, help="changes no image")
    parser.add_argument("--output_dir", help="default: <save_dir>/EMAgenerated_ep<epoch>_<sampler>")
    return parser.parse_args(argv)


@job
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.n < 1 or args.batch_size < 1:
        raise UserError("--n and --batch_size must be at least 1")
    device = pick_device(args.device)
    model = model_of(args, device)
    settings = settings_of(args, model.denoiser)
    folder = default_samples_folder(model.config.save_dir, model.epoch, settings)
    folder = Path(args.output_dir or folder)
    description = describe(model, settings, args.use_amp)
    drawn_before = earlier_set(folder, description)
    missing = [i for i in range(args.n) if not png(folder, i).exists()]
    distributed.barrier()  # every rank has looked before one can write
    seconds = draw(model, settings, missing, args, folder, description)
    description |= {
        "n": max(args.n, drawn_before),
        "device": str(device),
        "drawn_in_last_call": len(missing),
        "seconds": round(seconds, 2),
        "images_per_s": round(len(missing) / seconds, 2) if missing else None,
        "peak_memory_mb": round(peak_memory_bytes(device) / 1e6),
        "versions": versions(),
    }
    if distributed.is_main():
        finish(folder, args.n, description)
    print(f"{args.n} images in {folder}/pngs, {len(missing)} of them drawn now ({seconds:.1f} s)")
    return 0


def finish(folder: Path, n: int, description: dict) -> None:
    """Writes samples.json and the grid of the set's first images."""
    write_json(folder / "samples.json", description)
    shown = [load_png(png(folder, i)) for i in range(min(n, GRID_IMAGES))]
    save_image_grid(folder / "grid.png", torch.stack(shown), math.ceil(math.sqrt(len(shown))))


def describe(model: TrainedModel, settings: SamplerSettings, use_amp: bool) -> dict:
    """Everything that decides what the images look like."""
    return {
        "checkpoint": str(model.path),
        "epoch": model.epoch,
        "weights": model.fingerprint(),
        "input_scale": model.input_scale,
        "dataset": model.config.dataset,
        "seed": model.config.seed,
        "sampler": settings.sampler,
        "steps": settings.steps,
        "eta": settings.eta,
        "spacing": settings.spacing,
        "clip": settings.clip,
        "use_amp": use_amp,
    }


def earlier_set(folder: Path, description: dict) -> int:
    """How many images an earlier call was to draw. Raises UserError if it drew others."""
    path = folder / "samples.json"
    if not path.exists():
        if any((folder / "pngs").glob("*.png")):
            raise UserError(
                f"{folder}/pngs holds images but no samples.json says what made them: "
                "move them away, or choose another --output_dir"
            )
        return 0
    earlier = json.loads(path.read_text(encoding="utf-8"))
    differences = [
        f"  {key}: {value}, not {earlier.get(key)}"
        for key, value in description.items()
        if key != "checkpoint" and earlier.get(key) != value
    ]
    if differences:
        raise UserError(
            f"{folder} holds images made in another way:\n"
            + "\n".join(differences)
            + "\nmove them away, or choose another --output_dir"
        )
    return earlier["n"]


def draw(model, settings, missing: list[int], args, folder: Path, description: dict) -> float:
    """Draws the missing images; samples.json is there before the first. Returns the seconds.

    Several processes divide the images among them.
    """
    if not missing:
        log.info("all %d images are there already", args.n)
        return 0.0
    if distributed.is_main():
        write_json(folder / "samples.json", {**description, "n": args.n})
    distributed.barrier()
    mine = [missing[i] for i in distributed.share(len(missing))]
    started = time.monotonic()
    shape = model.config.network.image_shape
    with progress(total=len(mine), shared=True, unit="image") as bar:
        for start in range(0, len(mine), args.batch_size):
            indices = mine[start : start + args.batch_size]
            images = sample(
                model.denoiser, settings, indices, model.config.seed, shape, args.use_amp
            )
            for i, image in zip(indices, images.cpu(), strict=True):
                save_png(png(folder, i), image)
            bar.update(len(indices))
    distributed.barrier()
    return time.monotonic() - started


def png(folder: Path, index: int) -> Path:
    return folder / "pngs" / f"{index}.png"


if __name__ == "__main__":
    raise SystemExit(main())
