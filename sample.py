"""Draws images from a trained denoiser: pngs/<i>.png, a grid, and samples.json."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from arguments import Exclusion, at_least
from checkpoint import TrainedModel, versions
from cli import add_sampler_arguments, chosen_sampler, job, job_parser, load_dataset, load_model
from evaluation.data_record import note_other_data
from evaluation.samples.grids import load_png, save_image_grid, save_png
from evaluation.samples.neighbours import save_neighbours
from evaluation.samples.sample_sets import (
    describe,
    earlier_set,
    finish,
    missing_images,
    png,
    remove_damaged,
)
from evaluation.samples.trajectories import save_trajectory, slerp
from sampling import (
    SamplerSettings,
    default_samples_folder,
    finite_pixels,
    labels_of,
    sample_in_batches,
    solve,
)
from support import distributed
from support.errors import UserError
from support.files import check_writable, write_json
from utils import ImageNoise, log, peak_memory_bytes, pick_device

EXCLUDES = (
    Exclusion(
        "interpolate", ("n", "show_intermediate", "save_x0", "neighbours"), "it draws one strip"
    ),
)
OF_A_CALL = ("drawn_in_last_call", "seconds", "images_per_s", "ms_per_image", "peak_memory_mb")
SHOWN = 8  # images of --show_intermediate, --save_x0 and --neighbours


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = job_parser(__doc__, compiles=True, excludes=EXCLUDES)
    add_sampler_arguments(parser)
    parser.add_argument(
        "--n", "--num_samples", "--num_images", type=int, default=64, help="how many images"
    )
    parser.add_argument("--batch_size", type=int, default=128, help="changes no image")
    parser.add_argument("--output_dir", help="default: <save_dir>/EMAgenerated_ep<epoch>_<sampler>")
    more = parser.add_argument_group("more pictures")
    more.add_argument(
        "--show_intermediate", action="store_true",
        help="also draw how the first images come out of the noise: trajectory.png, intermediate/",
    )  # fmt: skip
    more.add_argument(
        "--save_x0", action="store_true", help="also the clean images predicted on the way"
    )
    more.add_argument(
        "--neighbours", action="store_true",
        help="also show the training images that are nearest to the first images",
    )  # fmt: skip
    more.add_argument(
        "--interpolate", type=int, nargs=2, metavar=("A", "B"),
        help="instead of a set, one strip of images between those with the indices A and B",
    )  # fmt: skip
    more.add_argument(
        "--interp_steps", type=int, metavar="N", help="images in it, with both ends (default: 10)"
    )
    args = parser.parse_args(argv)
    if args.interp_steps is not None and args.interpolate is None:
        raise UserError("--interp_steps: of --interpolate A B, which is not given")
    at_least(args, n=1, batch_size=1, interpolate=0, interp_steps=2)
    return args


@job
def main(argv: list[str] | None = None) -> int:
    """Draws the images that are missing, and writes the grid, samples.json and more pictures."""
    args = parse_args(argv)
    device = pick_device(args.device)
    model = load_model(args, device)
    settings = chosen_sampler(args, model.denoiser)
    folder = default_samples_folder(model.config.save_dir, model.epoch, settings)
    folder = Path(args.output_dir or folder)
    check_writable([folder, folder / "pngs", folder / "intermediate"])
    description = describe(model, settings, args.use_amp)
    if args.interpolate:
        alike = {key: value for key, value in description.items() if key != "classes"}
        earlier_set(folder, alike)
        interpolate(model, settings, args, folder)
        return 0
    earlier = earlier_set(folder, description)
    if distributed.is_main():
        remove_damaged(folder)
    distributed.barrier()
    missing = missing_images(folder, args.n)
    distributed.barrier()  # every rank has looked before one can write
    description = earlier | description
    if missing:
        for of_earlier_call in OF_A_CALL:
            description.pop(of_earlier_call, None)
        description |= {"device": str(device), "versions": versions()}
    seconds = draw(model, settings, missing, args, folder, description)
    if missing:
        figures = (
            len(missing), round(seconds, 2), round(len(missing) / seconds, 2),
            round(1000 * seconds / len(missing), 2), round(peak_memory_bytes(device) / 1e6),
        )  # fmt: skip
        description |= dict(zip(OF_A_CALL, figures, strict=True))
    if distributed.is_main():
        finish(folder, description, settings, model)
    more_pictures(folder, args, model, settings)
    print(f"{args.n} images in {folder}/pngs, {len(missing)} of them drawn now ({seconds:.1f} s)")
    return 0


def more_pictures(
    folder: Path, args: argparse.Namespace, model: TrainedModel, settings: SamplerSettings
) -> None:
    """The pictures that were asked for beside the set."""
    if distributed.is_main() and (args.show_intermediate or args.save_x0):
        indices = list(range(min(args.n, SHOWN)))
        save_trajectory(folder, model, settings, indices, args.use_amp, args.save_x0)
    if args.neighbours:
        samples = torch.stack([load_png(png(folder, i)) for i in range(min(args.n, SHOWN))])
        train = load_dataset(args, model.config, "train")
        note_other_data(model, train)
        save_neighbours(folder / "neighbours.png", samples, train, model, args.use_amp)


def interpolate(
    model: TrainedModel, settings: SamplerSettings, args: argparse.Namespace, folder: Path
) -> None:
    """One strip of images, between two starting noises on their great circle."""
    if not settings.deterministic:
        raise UserError(f"--interpolate needs a deterministic sampler, not {settings.tag()}")
    if settings.guidance and len(settings.classes or ()) != 1:
        raise UserError("--interpolate: name the one class of both ends, as in --classes 3")
    config, device = model.config, model.denoiser.device
    ends = ImageNoise(config.seed, args.interpolate, config.network.image_shape, device).draw()
    steps = args.interp_steps or 10
    noise = slerp(*ends, torch.linspace(0, 1, steps, device=device))
    images = []
    for part in noise.split(args.batch_size):
        y = labels_of(model.denoiser, settings, args.interpolate[:1] * len(part))
        x0 = solve(model.denoiser, settings, lambda part=part: part, y, args.use_amp)
        images.append(finite_pixels(model.denoiser.decode(x0)))
    path = folder / "interpolation_{}_{}.png".format(*args.interpolate)
    if distributed.is_main():
        save_image_grid(path, torch.cat(images), steps)
    print(f"wrote {path}")


def draw(
    model: TrainedModel,
    settings: SamplerSettings,
    missing: Sequence[int],
    args: argparse.Namespace,
    folder: Path,
    description: dict,
) -> float:
    """Draws the missing images; samples.json is there before the first. Returns the seconds.

    Several processes divide the images among them.
    """
    if not missing:
        log.info("all %d images are there already", args.n)
        return 0.0
    if distributed.is_main():
        write_json(folder / "samples.json", {**description, "n": args.n})
    distributed.barrier()
    share = distributed.share(len(missing))
    mine = missing[share.start : share.stop]
    started = time.monotonic()
    for indices, images in sample_in_batches(model, settings, mine, args.use_amp, args.batch_size):
        for i, image in zip(indices, images, strict=True):
            save_png(png(folder, i), image, flush=False)
    distributed.barrier()
    return time.monotonic() - started


if __name__ == "__main__":
    raise SystemExit(main())
