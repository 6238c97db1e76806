"""Recognition of noisy images at every noise level: by a network of its own, or frozen features.

--backbone wrn trains a WideResNet that is told the noise level, from scratch, on noisy images;
--backbone ddae a two-layer MLP on the features of one block of a checkpoint. Either is scored on
test at 20 timesteps of DDPM (VP), or at the 18 of EDM (VE). Run once with each: whichever ends
last shows both. Stopped, the same command goes on. Batch norm sees one process's part of a batch
on CPUs, the whole batch on GPUs, so on CPUs the wrn depends a little on how many there are.
"""

import argparse
import time
from dataclasses import asdict

from torch import nn

from arguments import Exclusion
from cli import (
    add_output_dir,
    job,
    job_parser,
    load_datasets,
    load_model,
    one_cell,
    pick_config,
    results_folder,
)
from config import Config
from datasets import Dataset, stratified_subset
from evaluation.classifiers.noisy import (
    RECIPES,
    Backbone,
    mlp_on_features,
    noise_drawer,
    score,
    wide_resnet,
    with_process,
)
from evaluation.classifiers.noisy_report import write_accuracies
from evaluation.classifiers.supervised import Recipe, SupervisedTraining, training_batches
from model.models import PROCESSES, process_of
from support import distributed
from support.files import check_writable, short_hash
from utils import pick_device

FROM_SCRATCH = "it is trained from scratch"
EXCLUDES = (
    Exclusion("backbone", ("ckpt", "epoch", "input_scale", "blockname"), FROM_SCRATCH, when="wrn"),
    Exclusion("backbone", ("depth", "width"), "they are of wrn", when="ddae"),
)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; what is left out is the recipe's."""
    parser = job_parser(__doc__, excludes=EXCLUDES)
    add = parser.add_argument
    add("--backbone", choices=list(RECIPES), required=True, help="wrn needs no checkpoint")
    add("--mode", choices=list(PROCESSES), help="whose noise levels; default: the config's process")
    add("--blockname", help="of ddae; default: the config's linear.blockname")
    add("--depth", type=int, default=28, help="of wrn: 6 n + 4")
    add("--width", type=int, default=10, help="of wrn: times 16, 32 and 64 channels")
    wrn, ddae = RECIPES["wrn"], RECIPES["ddae"]
    add("--epochs", type=int, help=f"default: {wrn.epochs} for wrn, {ddae.epochs} for ddae")
    add("--batch_size", type=int, help=f"global; default: {wrn.batch_size}")
    add("--lr", type=float, help=f"default: {wrn.lr:g} (SGD) for wrn, {ddae.lr:g} (Adam) for ddae")
    add(
        "--warm_epochs", type=float,
        help=f"of rising rate; default: {wrn.warm_epochs} for wrn, {ddae.warm_epochs} for ddae",
    )  # fmt: skip
    add("--n_train", type=int, metavar="N", help="train on N images, the classes in proportion")
    add("--n_test", type=int, metavar="N", help="score N test images, the classes in proportion")
    add_output_dir(parser)
    return parser.parse_args(argv)


def decided_by(
    args: argparse.Namespace, config: Config, train: Dataset, backbone: Backbone, recipe: Recipe
) -> dict:
    """The settings that decide the trained classifier: runs that differ in one share no state."""
    return {
        "backbone": args.backbone,
        **backbone.settings,
        "mode": config.model_type,
        "diffusion": config.diffusion.model_dump(mode="json"),
        "dataset": train.name,
        "n_train": len(train),
        "train_fingerprint": train.fingerprint(),
        "recipe": asdict(recipe),
        "flip": config.flip,
        "seed": config.seed,
        "use_amp": args.use_amp,
    }


@job
def main(argv: list[str] | None = None) -> int:
    """Trains the classifier, scores it at every noise level, and writes .json and .png."""
    args = parse_args(argv)
    recipe = RECIPES[args.backbone].changed_by(vars(args))
    device = pick_device(args.device)
    model = load_model(args, device) if args.backbone == "ddae" else None
    config = with_process(pick_config(args) if model is None else model.config, args.mode)
    folder = results_folder(args, config)
    check_writable([folder])
    seed, process = config.seed, process_of(config).to(device)
    train, test = load_datasets(args, config, model)
    scored = range(len(test))
    if args.n_test is not None:
        scored = stratified_subset(test.labels, args.n_test, seed, "--n_test")
    if model is None:
        backbone = wide_resnet(process, train, args.depth, args.width, seed)
    else:
        _, block = one_cell(args, config)
        backbone = mlp_on_features(model, process, train, block, args.use_amp)
    classifier = backbone.classifier.to(device)
    if device.type == "cuda" and distributed.world_size() > 1:
        classifier = nn.SyncBatchNorm.convert_sync_batchnorm(classifier)
    settings = decided_by(args, config, train, backbone, recipe)
    run = SupervisedTraining(
        classifier, classifier.optimizer(recipe),
        noise_drawer(process, seed, device, as_trained=args.backbone == "wrn"),
        training_batches(train, recipe, device, seed, config.flip), recipe,
        folder / f"noisy_state_{short_hash(settings)}.pth", use_amp=args.use_amp,
    )  # fmt: skip
    history = run.run()
    start = time.perf_counter()
    each = len(distributed.share(recipe.batch_size))  # as many as are trained on
    levels = score(classifier, process, test, scored, device, seed, each, args.use_amp)
    record = {
        "name": backbone.name,
        "checkpoint": None if model is None else str(model.path),
        "epoch": None if model is None else model.epoch,
        **settings,
        "n_test": len(scored),
        "test_fingerprint": test.fingerprint(),
        "parameters_trained": sum(p.numel() for p in classifier.parameters()),
        "levels": [asdict(level) for level in levels],
        "history": history,
        "input_scale": model and model.input_scale,
        **run.made_by,
        "seconds_training": run.seconds,
        "seconds_scoring": time.perf_counter() - start,
    }
    write_accuracies(folder, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
