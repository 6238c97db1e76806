"""Fine-tunes the network up to one block, with a linear head, from a checkpoint or from scratch.

All of train, or the --n_train images of it, is learned from, with random crops, flips if the
config has them, and new noise of the timestep in every batch; AdamW, linear warm-up, cosine to 0.
Nothing is selected on test: the result is the last epoch's. Run once with and once without
--scratch: whichever ends last shows both.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from arguments import Exclusion
from checkpoint import TrainedModel
from cli import (
    add_output_dir,
    job,
    job_parser,
    load_datasets,
    load_model,
    load_untrained,
    one_cell,
    results_folder,
)
from datasets import Dataset
from evaluation.classifiers.finetuning import (
    COMPARED,
    RECIPE,
    RECORD,
    Classifier,
    fine_tuning,
    side_by_side,
    start_name,
)
from evaluation.classifiers.supervised import Recipe, comparable
from evaluation.plots import curves, subject
from evaluation.probe.features import model_source
from evaluation.tables import wilson_interval
from support import distributed
from support.files import check_writable, short_hash, write_json
from utils import pick_device

EXCLUDES = (Exclusion("scratch", ("epoch", "input_scale"), "no checkpoint is fine-tuned"),)
ARCHITECTURE = ("model_type", "net_type", "diffusion", "network", "flip")  # and how it is fed


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = job_parser(__doc__, excludes=EXCLUDES)
    parser.add_argument(
        "--scratch", action="store_true",
        help="start from untrained weights of the same architecture instead of a checkpoint",
    )  # fmt: skip
    parser.add_argument("--timestep", type=int, help="default: the config's linear.timestep")
    parser.add_argument("--blockname", help="default: the config's linear.blockname")
    parser.add_argument("--epochs", type=int, default=RECIPE.epochs, help="of fine-tuning")
    parser.add_argument("--batch_size", type=int, default=RECIPE.batch_size, help="global")
    parser.add_argument("--lr", type=float, default=RECIPE.lr, help="AdamW's highest rate")
    parser.add_argument(
        "--warm_epochs", type=float, default=RECIPE.warm_epochs, help="of rising rate"
    )
    parser.add_argument(
        "--weight_decay", type=float, default=RECIPE.weight_decay,
        help="of matrices and kernels, not of biases and norms",
    )  # fmt: skip
    parser.add_argument(
        "--n_train", type=int, metavar="N",
        help="learn from N training images only, the classes in their proportions (default: all)",
    )  # fmt: skip
    add_output_dir(parser)
    return parser.parse_args(argv)


def deciding_settings(
    args: argparse.Namespace, recipe: Recipe, model: TrainedModel, train: Dataset, test: Dataset
) -> dict:
    """What decides the result. Raises UserError for a timestep or block that is not there."""
    config = model.config
    source = model_source(model, args.use_amp)
    t, block = one_cell(args, config)
    source.check([t], [block])
    values = config.model_dump(mode="json")
    return {
        "fingerprint": source.fingerprint,
        "dataset": train.name,
        "images": {"train": train.fingerprint(), "test": test.fingerprint()},
        "timestep": t,
        "blockname": block,
        "recipe": asdict(recipe),
        "seed": config.seed,
        "use_amp": args.use_amp,
        "architecture": {key: values[key] for key in ARCHITECTURE},
    }


def write_result(folder: Path, stem: str, record: dict) -> None:
    """Writes <stem>.json, or <stem>_scratch.json, and <stem>.png, and prints a table; the other
    start is in both if its file is there."""
    paths = {True: folder / f"{stem}_scratch.json", False: folder / f"{stem}.json"}
    scratch, plot = record["scratch"], folder / f"{stem}.png"
    if distributed.is_main():
        write_json(paths[scratch], record)
    other = comparable(paths[not scratch], record, COMPARED, RECORD)
    records = [record] if other is None else [other, record] if scratch else [record, other]
    what = subject(record["dataset"], record["architecture"]["model_type"])
    title = (
        f"fine-tuning: {what}, {record['blockname']} at t={record['timestep']}, "
        f"{record['n_train']:,} training images"
    )
    lines = {
        start_name(r): [100 * epoch["test_accuracy"] for epoch in r["history"]] for r in records
    }
    epochs = [epoch["epoch"] for epoch in record["history"]]
    if distributed.is_main():
        curves(plot, epochs, lines, title, "epoch of fine-tuning", "test accuracy in %")
    print(f"{title}, {len(epochs)} epochs, {record['n_test']:,} test images\n")
    print(f"{side_by_side(records)}\n\nwrote {paths[scratch]} and {plot}")


@job
def main(argv: list[str] | None = None) -> int:
    """Trains the classifier, and writes its accuracies as .json and .png."""
    args = parse_args(argv)
    recipe = RECIPE.changed_by(vars(args))
    device = pick_device(args.device)
    model = load_untrained(args, device) if args.scratch else load_model(args, device)
    config = model.config
    folder = results_folder(args, config)
    check_writable([folder])
    train, test = load_datasets(args, config, model)
    settings = deciding_settings(args, recipe, model, train, test)
    t, block = settings["timestep"], settings["blockname"]
    classifier = Classifier(model.denoiser, t, block, train, config.seed)
    run = fine_tuning(
        classifier, train, test, recipe,
        folder / f"finetune_state_{short_hash(settings)}.pth",
        seed=config.seed, flip=config.flip, use_amp=args.use_amp,
    )  # fmt: skip
    history = run.run()
    accuracy = history[-1]["test_accuracy"]
    record = {
        "scratch": args.scratch,
        "checkpoint": None if args.scratch else str(model.path),
        "epoch": None if args.scratch else model.epoch,
        **settings,
        "n_train": len(train),
        "n_test": len(test),
        "parameters_trained": sum(w.numel() for w in classifier.trained_parameters()),
        "history": history,
        "test_accuracy": accuracy,
        "test_interval": wilson_interval(accuracy, len(test)),
        "input_scale": model.input_scale,
        **run.made_by,
        "seconds": run.seconds,
    }
    stem = f"finetune_{block}_t{t}" + (f"_n{args.n_train}" if args.n_train else "")
    write_result(folder, stem, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
