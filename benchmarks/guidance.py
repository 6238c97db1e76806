"""How often guided samples are of the class asked for, by a classifier trained on real images.

python sample.py --ckpt output_fashion_mnist/ckpts/model_4.pth --guidance 3 --n 1000  # and 0, 1
python -m benchmarks.guidance --config config/fashion_mnist.yaml FOLDER FOLDER FOLDER
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from arguments import at_least
from benchmarks.guidance_judge import (
    DEPTH,
    RECIPE,
    WIDTH,
    SampleSet,
    agreement,
    answers,
    read_set,
    trained_judge,
    variation,
    write_guidance_tables,
)
from checkpoint import versions
from cli import (
    add_output_dir,
    job,
    job_parser,
    load_datasets,
    one_process,
    pick_config,
    results_folder,
)
from support.errors import UserError
from support.files import check_writable, write_json
from utils import pick_device


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = job_parser(__doc__.splitlines()[0], checkpoint=False)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER",
        help="that sample.py wrote, with pngs/ and samples.json in it",
    )  # fmt: skip
    parser.add_argument(
        "--epochs", type=int, default=RECIPE.epochs, help="of the classifier, on real images"
    )
    add_output_dir(parser)
    args = parser.parse_args(argv)
    at_least(args, epochs=1)
    one_process("benchmarks.guidance")
    return args


@job
def main(argv: list[str] | None = None) -> int:
    """Writes guidance.json, guidance.md and guidance.png."""
    args = parse_args(argv)
    config, device = pick_config(args), pick_device(args.device)
    folder = results_folder(args, config)
    check_writable([folder])
    train, test = load_datasets(args, config)
    sets = [read_set(path, config.dataset) for path in args.folders]
    for found in sets:
        refuse_other_classes(found, train.class_names)
        refuse_other(sets[0], found)
    recipe = replace(RECIPE, epochs=args.epochs)
    judge = trained_judge(train, recipe, folder, device, config.seed, config.flip, args.use_amp)

    real = test.take(np.isin(test.labels, sets[0].record["classes"]))

    def row(name: str, images: np.ndarray, labels: np.ndarray) -> dict:
        found = agreement(answers(judge, images, device, args.use_amp), labels)
        return {"name": name, "n": len(labels), "variation": variation(images, labels)} | found

    record = {
        "dataset": config.dataset,
        "judge": f"WRN-{DEPTH}-{WIDTH}, {args.epochs} epochs on {len(train):,} images",
        "train_fingerprint": train.fingerprint(),
        "seed": config.seed,
        "use_amp": args.use_amp,
        "real": row("real test images", real.images, real.labels),
        "sets": [
            row(found.name, found.images, found.labels)
            | {"folder": str(found.folder), "samples": found.record}
            for found in sets
        ],
        "versions": versions(),
    }
    write_json(folder / "guidance.json", record)
    print(write_guidance_tables(folder, record, sets, train.class_names))
    print("\nwrote " + ", ".join(str(folder / f"guidance.{end}") for end in ("json", "md", "png")))
    return 0


def refuse_other_classes(found: SampleSet, class_names: list[str]) -> None:
    """Raises UserError if the network's classes had other names: the labels would have moved."""
    names = found.record.get("class_names", class_names)
    if names != class_names:
        raise UserError(
            f"{found.folder}: its classes are {', '.join(names)}, but those of the data are now "
            f"{', '.join(class_names)}: put the data back, or train anew"
        )


def refuse_other(first: SampleSet, other: SampleSet) -> None:
    """Raises UserError if something else than the guidance tells these sets apart."""
    keys = ("weights", "classes", "sampler", "steps", "eta", "spacing", "sigma_max", "clip", "seed")
    different = [key for key in keys if first.record.get(key) != other.record.get(key)]
    if different:
        raise UserError(
            f"{other.folder} differs from {first.folder} in {', '.join(different)}: draw both "
            "alike but for --guidance"
        )


if __name__ == "__main__":
    raise SystemExit(main())
