"""Scores samples against the training images: FID, and KID with --kid.

python fid.py --config config/DDPM_ddpm.yaml --samples ddae_output/.../pngs
python fid.py --config config/DDPM_ddpm.yaml --n 5000 --steps 50
"""

import argparse
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from arguments import Exclusion, at_least
from checkpoint import TrainedModel, versions
from cli import (
    add_sampler_arguments,
    chosen_sampler,
    job,
    job_parser,
    load_dataset,
    load_model,
    pick_config,
    sampler_arguments_given,
)
from datasets import Dataset
from evaluation.data_record import note_other_data
from evaluation.fid.frechet import (
    SUBSET_SIZE,
    fit_gaussian,
    frechet_distance,
    kernel_distance,
    reference_statistics,
    score_name,
    statistics_path,
)
from evaluation.fid.image_sets import (
    export_images,
    read_images,
    refuse_contents,
    score_file,
)
from evaluation.fid.inception import (
    N_FEATURES,
    WEIGHTS_SHA256,
    find_weights,
    inception_features,
    load_inception,
    weights_fingerprint,
)
from evaluation.samples.sample_sets import describe, refuse_others
from sampling import SamplerSettings, draw_all
from support import distributed
from support.errors import UserError
from support.files import check_writable, load_json, write_json
from utils import log, pick_device

EXCLUDES = (
    Exclusion("samples", ("n", "epoch", "input_scale", "compile"), "the images are there already"),
)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments. Raises UserError if they name no images, or too few."""
    about = "Scores samples against all training images: FID, and KID with --kid."
    parser = job_parser(about, compiles=True, excludes=EXCLUDES)
    parser.add_argument("--samples", metavar="PATH", help="a folder of images, or an .npz of uint8")
    parser.add_argument(
        "--n", "--num_samples", "--num_images", type=int, metavar="N",
        help="instead of --samples: draw N images from the trained model and score those; they are "
        "not kept: sample.py and --samples give the same score, and a killed call goes on",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time")
    parser.add_argument(
        "--inception", metavar="PATH", help="pytorch-fid's weights; left out: downloaded once"
    )
    parser.add_argument("--kid", action="store_true", help="KID too (100 subsets of 1,000 images)")
    parser.add_argument(
        "--export_reference", metavar="DIR", help="write the training images as PNGs to DIR"
    )
    parser.add_argument(
        "--output_dir", help="where the score goes (default: beside the samples, else save_dir)"
    )
    add_sampler_arguments(parser)
    args = parser.parse_args(argv)
    if args.n is None and (given := sampler_arguments_given(args)):
        raise UserError(f"without --n nothing is drawn: leave out {', '.join(given)}")
    if args.samples is None and args.n is None and args.export_reference is None:
        raise UserError("nothing to score: give --samples FOLDER, or --n 5000 to draw images")
    if args.n is not None and args.n < 2:
        raise UserError(f"--n {args.n}: FID needs at least 2 images, and is steady from 5,000")
    at_least(args, batch_size=1)
    return args


@job
def main(argv: list[str] | None = None) -> int:
    """Writes the scores as .json and prints them. --export_reference writes training images."""
    args = parse_args(argv)
    device = pick_device(args.device)
    model = None if args.n is None else load_model(args, device)
    config = model.config if model else pick_config(args)
    settings = model and chosen_sampler(args, model.denoiser)
    path = score_path(args, model, settings)
    origin = {"samples": str(args.samples)}
    if model is not None:
        origin = describe(model, settings, args.use_amp)
        if "weights" in (earlier := load_json(path) or {}):  # older scores do not say it
            refuse_others(f"{path} holds the score of images", earlier, origin)
    check_writable([args.export_reference] if args.export_reference else [], [path])
    if args.export_reference is not None:
        refuse_contents(args.export_reference)
    images = None if args.samples is None else read_images(args.samples)
    if images is not None and len(images) < 2:
        raise UserError(f"{args.samples}: 1 image; FID needs at least 2, and is steady from 5,000")
    train = load_dataset(args, config, "train")
    if model is not None:
        note_other_data(model, train)
    if args.export_reference is not None:
        if distributed.is_main():
            export_images(train.images, args.export_reference)
        print(f"{len(train):,} images of {train.name} train written to {args.export_reference}")
    if path is None:
        return 0
    with distributed.main_first():  # it downloads them
        weights = find_weights(args.inception)
    inception = load_inception(weights, device)
    started = time.perf_counter()
    if images is None:
        images = draw_all(model, settings, args.n, args.use_amp, args.batch_size)
    warn(images, train, args.kid)
    scores = score(images, train, inception, weights, args, config.seed)
    about = {
        **origin, "device": str(device), "versions": versions(),
        "seconds": time.perf_counter() - started,
    }  # fmt: skip
    write_scores(scores | about, path)
    return 0


def score_path(
    args: argparse.Namespace, model: TrainedModel | None, settings: SamplerSettings | None
) -> Path | None:
    """Where the scores go; None if nothing is scored."""
    if args.samples is not None:
        return score_file(args.samples, args.output_dir)
    if args.n is None:
        return None
    drawn = f"ep{model.epoch}_{settings.tag()}_n{args.n}"
    return Path(args.output_dir or model.config.save_dir) / f"fid_{drawn}.json"


def warn(images: np.ndarray, train: Dataset, kid: bool) -> None:
    """Says what makes a score incomparable, though it can be computed."""
    fewest = min(len(images), len(train))
    if fewest < N_FEATURES:
        log.warning(
            f"{fewest:,} images are fewer than the {N_FEATURES:,} features, so their covariance is "
            "rank-deficient: compare this FID only with others of as many images"
        )
    if kid and fewest <= SUBSET_SIZE:
        log.warning(
            f"every subset of KID has all {fewest:,} images: its standard deviation says little "
            f"of them; give more than {SUBSET_SIZE:,}"
        )
    ours, theirs = (f"{a.shape[2]}x{a.shape[3]}" for a in (images, train.images))
    if ours != theirs:
        log.warning(f"the samples are {ours} and {train.name} is {theirs}: FID compares that too")


def score(
    images: np.ndarray, train: Dataset, inception: torch.nn.Module, weights: Path,
    args: argparse.Namespace, seed: int,
) -> dict:  # fmt: skip
    """FID, and KID where asked for, with what they were measured on."""
    fingerprint = weights_fingerprint(weights)
    if fingerprint != WEIGHTS_SHA256:
        log.warning(f"{weights} is not the published file: the score compares only with its own")

    def features(pixels: np.ndarray, title: str) -> np.ndarray:
        return inception_features(inception, pixels, args.batch_size, title)

    cache = statistics_path(args.data_dir, train, fingerprint)
    reference, reference_features = reference_statistics(
        cache, lambda: features(train.images, "reference"), args.kid
    )
    sampled = features(images, "samples")
    scores = {
        "name": score_name(len(images)),
        "fid": frechet_distance(fit_gaussian(sampled), reference),
        "images": len(images),
        "reference": {"dataset": train.name, "split": train.split, "images": len(train)},
        "inception": {"path": str(weights), "sha256": fingerprint},
    }
    if args.kid:
        kid = kernel_distance(sampled, reference_features, seed)
        scores["kid"] = {**asdict(kid), "seed": seed}
    return scores


def write_scores(scores: dict, path: Path) -> None:
    """Writes the scores to `path` and prints them."""
    if distributed.is_main():
        write_json(path, scores)
    reference = scores["reference"]
    print(
        f"{scores['name']}: {scores['fid']:.3f}, {scores['images']:,} images against all "
        f"{reference['images']:,} of {reference['dataset']} {reference['split']}"
    )
    if "kid" in scores:
        kid = scores["kid"]
        print(
            f"KID: {kid['mean']:.5f} +- {kid['std']:.5f}, mean and standard deviation over "
            f"{kid['subsets']} subsets of {kid['subset_size']:,} images"
        )
    print(f"written to {path}")


if __name__ == "__main__":
    raise SystemExit(main())
