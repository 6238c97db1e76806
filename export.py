"""Writes a model's EMA weights in the layout of the Hugging Face Hub, with a model card."""

import argparse
from pathlib import Path

from checkpoint import TrainedModel
from cli import job, job_parser, load_model, one_process
from evaluation.model_card import write_card
from model.released import (
    DESCRIPTION,
    DTYPES,
    WEIGHTS,
    read_description,
    rounded,
    write_released,
)
from support.errors import UserError
from support.files import check_writable
from utils import pick_device


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = job_parser(__doc__, amp=False)
    parser.add_argument("--output_dir", metavar="DIR", help="default: <save_dir>/export_ep<epoch>")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float16", help="of the weights")
    parser.add_argument(
        "--results", metavar="DIR",
        help="where the grids of linear.py and the samples for the card are (default: the folder "
        "of the run)",
    )  # fmt: skip
    return parser.parse_args(argv)


@job
def main(argv: list[str] | None = None) -> int:
    """Writes the weights, their description and the model card."""
    args = parse_args(argv)
    one_process("export.py")
    model = load_model(args, pick_device(args.device))
    if model.config.net_type == "diffusers":
        raise UserError(f"{model.path}: diffusers wrote it, and its folder is what can be shared")
    folder = Path(args.output_dir or f"{model.config.save_dir}/export_ep{model.epoch}")
    check_writable([folder])
    refuse_other_contents(folder)
    results = Path(args.results) if args.results else run_folder(model)
    if not results.is_dir():
        if args.results:
            raise UserError(f"--results {results}: no such folder")
        print(f"{results}: no such folder, so the card has no probes and samples: see --results")
    weights = model.denoiser.net.state_dict()
    about = {
        **model.about,
        "config": {
            **model.about["config"],
            "linear": model.config.linear.model_dump(mode="json"),  # whose cell the card shows
        },
        "epoch": model.epoch,
        "input_scale": model.input_scale,
        "fingerprint": model.fingerprint(),
        "rounded_fingerprint": model.fingerprint_with(
            {name: w.float() for name, w in rounded(weights, args.dtype).items()}
        ),
    }
    released = write_released(folder, weights, about, args.dtype)
    paths, protocols = write_card(folder, model, released, results)
    print(f"wrote {folder / WEIGHTS}: {released['bytes'] / 1e6:.1f} MB, {args.dtype}")
    print(f"      {folder / DESCRIPTION}: SHA-256 {released['sha256']}")
    probes = f"probes by {', '.join(protocols)}" if protocols else "no probe of these weights"
    print(f"      {paths[0]}: the model card, {probes}")
    for path in paths[1:]:
        print(f"      {path}")
    print(f"\ntry  python sample.py --ckpt {folder} --n 16")
    print(f"     python linear.py --ckpt {folder} --grid --protocol cached")
    return 0


def run_folder(model: TrainedModel) -> Path:
    """The folder that holds ckpts/<the checkpoint>, else the config's save_dir."""
    above = model.path.parent
    return above.parent if above.name == "ckpts" else Path(model.config.save_dir)


def refuse_other_contents(folder: Path) -> None:
    """Raises UserError where the files would replace others than those of an earlier export."""
    if (folder / DESCRIPTION).exists():
        read_description(folder)
        return
    for name in (WEIGHTS, "README.md", "samples.png"):
        if (folder / name).exists():
            raise UserError(
                f"{folder / name}: there already, and of no earlier export: choose another "
                "--output_dir"
            )


if __name__ == "__main__":
    raise SystemExit(main())
