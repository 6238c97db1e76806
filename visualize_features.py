"""t-SNE of one cell's features: a picture of what the linear probe measures."""

import argparse
from pathlib import Path

import numpy as np

from arguments import Exclusion, at_least
from checkpoint import TrainedModel
from cli import add_output_dir, job, job_parser, load_dataset, load_model, results_folder
from evaluation.plots import scatter, subject
from evaluation.probe.features import Extractor, model_source
from evaluation.probe.grid_files import best_cell, find_grid
from evaluation.probe.probe import PROTOCOLS
from support import distributed
from support.errors import UserError
from support.files import check_writable, save_array
from utils import log, permutation, pick_device

MIN_IMAGES = 10
EXCLUDES = (
    Exclusion("protocol", ("timestep", "blockname"), "it names the grid whose best cell is shown"),
)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments. Raises UserError for a timestep without a block, and for the reverse."""
    parser = job_parser(__doc__, excludes=EXCLUDES)
    parser.add_argument(
        "--timestep", type=int,
        help="default, without --blockname: the best cell of this checkpoint's grid, in the output "
        "folder or the run's",
    )  # fmt: skip
    parser.add_argument("--blockname", help="such as out_2; given together with --timestep")
    parser.add_argument(
        "--protocol", choices=PROTOCOLS,
        help="of that grid (default: the first of these of which there is one)",
    )  # fmt: skip
    parser.add_argument("--n", "--num_images", type=int, default=2000, help="how many test images")
    parser.add_argument("--batch_size", type=int, default=512, help="changes no feature")
    add_output_dir(parser)
    args = parser.parse_args(argv)
    if (args.timestep is None) != (args.blockname is None):
        raise UserError("give both --timestep and --blockname, or neither")
    at_least(args, n=MIN_IMAGES, batch_size=1)
    return args


def chosen_cell(args: argparse.Namespace, model: TrainedModel) -> tuple[float, str]:
    """(t, block) of the command line, else of the model's grid. Raises UserError without either."""
    if args.blockname is not None:
        return args.timestep, args.blockname
    beside = find_grid(results_folder(args, model.config), model, args.protocol)
    path, result = beside or best_cell(Path(model.config.save_dir), model, args.protocol)
    log.info(f"{result.cell.name}: the best cell of {path}")
    return result.cell.parts[0]


@job
def main(argv: list[str] | None = None) -> int:
    """Writes the picture, and its points as .npz."""
    args = parse_args(argv)
    device = pick_device(args.device)
    model = load_model(args, device)
    seed, save_dir = model.config.seed, Path(model.config.save_dir)
    t, block = chosen_cell(args, model)
    source = model_source(model, args.use_amp)
    source.check([t], [block])
    check_writable([results_folder(args, model.config), save_dir / "features"])
    test = load_dataset(args, model.config, "test", model)
    if len(test) < 2:
        raise UserError(f"{test.name} test: one image; t-SNE shows where several lie")
    extractor = Extractor(source, device, seed, args.batch_size, save_dir / "features")
    features = extractor(test, [t], [block])[t, block]
    if not distributed.is_main():
        return 0

    index = np.sort(permutation(len(test), seed, "t-SNE")[: args.n])
    log.info(f"t-SNE of {len(index):,} images")
    points = embed(features[index], seed)
    stem = results_folder(args, model.config) / f"tsne_ep{model.epoch}_t{t}_{block}"
    what = subject(test.name, model.config.model_type)
    title = f"t-SNE of {len(index):,} test images: {what}, {block}, t={t}, {model.stage}"
    scatter(Path(f"{stem}.png"), points, test.labels[index], test.class_names, title)
    arrays = {
        "points": points, "labels": test.labels[index], "index": index,
        "classes": test.class_names,
    }  # fmt: skip
    save_array(Path(f"{stem}.npz"), arrays)
    print(f"wrote {stem}.png and {stem}.npz")
    return 0


def embed(features: np.ndarray, seed: int) -> np.ndarray:
    """(N, C) -> (N, 2)."""
    from sklearn.manifold import TSNE  # slow to import: only for those who get here

    perplexity = min(30, (len(features) - 1) / 3)
    tsne = TSNE(init="pca", perplexity=perplexity, random_state=seed % 2**32)  # more is refused
    return tsne.fit_transform(np.array(features))


if __name__ == "__main__":
    raise SystemExit(main())
