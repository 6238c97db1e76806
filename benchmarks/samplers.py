"""Every sampler at the same numbers of evaluations of D: time, and distance to the exact images.

python -m benchmarks.samplers --config config/DDPM_ddpm.yaml --epoch 59
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from arguments import at_least, int_list
from benchmarks.sampler_errors import (
    REFERENCE,
    REFERENCE_SPACING,
    Bench,
    FidScore,
    clock_of,
    rms,
    settings_within,
)
from benchmarks.sampler_report import Rows, write_sampler_tables
from checkpoint import TrainedModel, versions
from cli import (
    add_output_dir,
    job,
    job_parser,
    load_dataset,
    load_model,
    one_process,
    results_folder,
)
from evaluation.fid.inception import find_weights
from evaluation.plots import subject
from evaluation.tables import find_or_add_row
from model.samplers import SAMPLERS, SPACINGS
from sampling import SamplerSettings
from support.errors import UserError
from support.files import check_writable, read_json, write_json
from utils import pick_device, progress, redirect_to_bar

FID_IMAGES = 5000


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; --evaluations sorted, each once."""
    parser = job_parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--evaluations", type=int_list, default=[5, 10, 20, 50, 100], metavar="E,E",
        help="of D per image, at most (default: 5,10,20,50,100); a sampler that takes two a step "
        "and one in the last makes it an odd number",
    )  # fmt: skip
    parser.add_argument(
        "--n", "--num_samples", "--num_images", type=int, default=16, help="how many images"
    )
    parser.add_argument("--batch_size", type=int, default=128, help="images at a time")
    parser.add_argument(
        "--spacing", choices=list(SPACINGS), default=REFERENCE_SPACING,
        help="of all samplers' noise levels; karras and log_snr have the ends of the exact "
        "solution at any number of steps, with the others the ends are part of the error",
    )  # fmt: skip
    parser.add_argument(
        "--clip", action="store_true",
        help="clip D to [-1, 1] for all, as sample.py does unless told otherwise",
    )  # fmt: skip
    parser.add_argument(
        "--reference_steps", type=int, default=1000,
        help="of Heun's method for the exact images; halved to see their own error",
    )  # fmt: skip
    parser.add_argument(
        "--fid", type=int, nargs="?", const=FID_IMAGES, metavar="N",
        help=f"also FID, of N images ({FID_IMAGES:,} without N) for each sampler and number",
    )  # fmt: skip
    parser.add_argument(
        "--inception", metavar="PATH", help="pytorch-fid's weights; left out: downloaded once"
    )
    add_output_dir(parser)
    args = parser.parse_args(argv)
    args.evaluations = sorted(set(args.evaluations))
    at_least(args, n=1, batch_size=1, evaluations=1, fid=2, reference_steps=2)
    if args.inception is not None and args.fid is None:
        raise UserError("--inception is for FID: give --fid too")
    one_process("benchmarks.samplers")
    return args


@job
def main(argv: list[str] | None = None) -> int:
    """Writes samplers.json, samplers.md and samplers.png, and prints the tables."""
    args = parse_args(argv)
    device = pick_device(args.device)
    model = load_model(args, device)
    folder = results_folder(args, model.config)
    check_writable([folder])
    table = {  # all of it before anything is drawn: what cannot be is said now
        (sampler, most): settings_within(model.denoiser, sampler, most, args.spacing, args.clip)
        for sampler in SAMPLERS
        for most in args.evaluations
    }
    fid = None if args.fid is None else fid_score(args, model)
    bench = Bench(model, args.n, min(args.batch_size, args.n), args.use_amp)
    exact, halved = (
        bench.exact(args.reference_steps // part, args.clip, folder) for part in (1, 2)
    )
    about = {
        "dataset": model.config.dataset, "epoch": model.epoch, "weights": model.fingerprint(),
        "seed": model.config.seed, "n": args.n, "batch_size": bench.batch_size,
        "spacing": args.spacing, "clip": args.clip, "reference_steps": args.reference_steps,
        "use_amp": args.use_amp, "machine": machine(device), "clock": clock_of(device),
    }  # fmt: skip
    reference = {
        "sampler": REFERENCE, "steps": args.reference_steps, "spacing": REFERENCE_SPACING,
        "distance_to_half_the_steps": rms(exact - halved),
    }  # fmt: skip
    path = folder / "samplers.json"
    record = {
        "rows": read_json(path, {"rows": [dict]})["rows"] if path.exists() else [],
        "checkpoint": str(model.path), "input_scale": model.input_scale, "reference": reference,
        "config": model.config.model_dump(mode="json"),
    }  # fmt: skip
    rows = fill(path, record, table, about, lambda settings: bench.measure(settings, exact), fid)
    title = ", ".join([
        subject(model.config.dataset, model.config.model_type), model.stage,
        f"{args.n:,} images",
        f"spacing {args.spacing}", *(["D clipped"] if args.clip else []),
        *(["--use_amp"] if args.use_amp else []), machine(device),
    ])  # fmt: skip
    written = write_sampler_tables(
        folder, rows, title, clock_of(device), reference, fid is not None
    )
    print("\nwrote " + ", ".join(map(str, [path, *written])))
    return 0


def fid_score(args: argparse.Namespace, model: TrainedModel) -> FidScore:
    """Raises UserError if the weights cannot be had."""
    weights = find_weights(args.inception)
    train = load_dataset(args, model.config, "train")
    return FidScore(
        Bench(model, args.fid, args.batch_size, args.use_amp), train, weights, args.data_dir
    )


def machine(device: torch.device) -> str:
    """What the seconds depend on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def fill(
    path: Path,
    record: dict,
    table: dict[tuple[str, int], SamplerSettings],
    about: dict,
    measure: Callable[[SamplerSettings], dict],
    fid: FidScore | None,
) -> Rows:
    """The row of every place in the table: one in `record` that is `about` the same, or a new one.

    `path` is written after each measurement, so that a call after a kill goes on there.
    """
    rows = {}
    with progress(table.items(), desc="samplers", unit="row") as bar, redirect_to_bar():
        for place, settings in bar:
            of_place = about | {"sampler": place[0], "steps": settings.steps}
            row = find_or_add_row(record["rows"], of_place, {})
            if "error" not in row:
                row |= measure(settings) | {"versions": versions()}
                write_json(path, record)
            if fid is not None and not fid.facts.items() <= row.get("fid", {}).items():
                row["fid"] = fid(settings)
                write_json(path, record)
            rows[place] = row
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
