"""t-SNE of one cell's features: a picture of what the linear probe measures."""

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.manifold import TSNE

import distributed
from cli import dataset_of, job, job_parser, model_of
from errors import UserError
from evaluation.features import Extractor, network_source
from evaluation.plots import scatter
from evaluation.tables import best_cell_of_last_grid
from files import replacing
from utils import generator, log, pick_device

MIN_IMAGES = 10


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = job_parser(__doc__)
    parser.add_argument(
        "--timestep", type=int, help="default, without --blockname: the last grid's best cell"
    )
    parser.add_argument("--blockname", help="such as out_2; given together with --timestep")
    parser.add_argument("--n", "--num_images", type=int, default=2000, help="how many test images")
    parser.add_argument("--batch_size", type=int, default=512, help="changes no feature")
    parser.add_argument("--output_dir", help="default: the run's save_dir")
    args = parser.parse_args(argv)
    if (args.timestep is None) != (args.blockname is None):
        raise UserError("give both --timestep and --blockname, or neither")
    if args.n < MIN_IMAGES or args.batch_size < 1:
        raise UserError(f"--n must be at least {MIN_IMAGES} and --batch_size at least 1")
    return args


@job
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device = pick_device(args.device)
    model = model_of(args, device)
    seed, save_dir = model.config.seed, Path(model.config.save_dir)
    folder = Path(args.output_dir or save_dir)
    if args.blockname is None:
        t, block, grid = best_cell_of_last_grid(folder)
        log.info(f"{block} at t={t}: the best cell of {grid}")
    else:
        t, block = args.timestep, args.blockname
    source = network_source(model.denoiser, model.fingerprint(), args.use_amp)
    source.check([t], [block])
    test = dataset_of(args, model.config, "test")
    extractor = Extractor(source, device, seed, args.batch_size, save_dir / "features")
    features = extractor(test, [t], [block])[t, block]
    if not distributed.is_main():
        return 0

    order = torch.randperm(len(test), generator=generator("cpu", seed, "t-SNE")).numpy()
    index = np.sort(order[: args.n])
    log.info(f"t-SNE of {len(index):,} images")
    points = embed(features[index], seed)
    stem = folder / f"tsne_ep{model.epoch}_t{t}_{block}"
    title = f"t-SNE of {len(index):,} {test.name} test images: {block}, t={t}, epoch {model.epoch}"
    scatter(stem.with_suffix(".png"), points, test.labels[index], test.class_names, title)
    with replacing(stem.with_suffix(".npz")) as temporary, open(temporary, "wb") as file:
        np.savez(
            file, points=points, labels=test.labels[index], index=index, classes=test.class_names
        )
    print(f"wrote {stem}.png and {stem}.npz")
    return 0


def embed(features: np.ndarray, seed: int) -> np.ndarray:
    """(N, C) -> (N, 2)."""
    perplexity = min(30, (len(features) - 1) / 3)
    tsne = TSNE(init="pca", perplexity=perplexity, random_state=seed)
    return tsne.fit_transform(np.array(features))


if __name__ == "__main__":
    raise SystemExit(main())
