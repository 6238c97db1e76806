"""Images per second of training and of feature extraction, with and without mixed precision.

python -m benchmarks.throughput --config config/DDPM_ddpm.yaml
"""

import argparse
import time

import torch

from arguments import at_least
from cli import config_path, job, job_parser, load_dataset, pick_config
from datasets import Batches
from evaluation.probe.features import network_source
from model.denoiser import Denoiser
from training.cost import measure_cost
from training.trainer import Trainer
from utils import amp_dtype, autocast, pick_device

BATCHES = 4  # timed, after one to warm up


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = job_parser(__doc__.splitlines()[0], checkpoint=False, amp=False)
    parser.add_argument("--batch_size", type=int, default=64, help="of feature extraction")
    args = parser.parse_args(argv)
    at_least(args, batch_size=1)
    return args


@job
def main(argv: list[str] | None = None) -> int:
    """Prints a table of images per second."""
    args = parse_args(argv)
    config, device = pick_config(args), pick_device(args.device)
    train = load_dataset(args, config, "train")
    args.batch_size = min(args.batch_size, len(train))
    rows = {}
    for use_amp in (False, True) if amp_dtype(device) else (False,):
        trainer = Trainer(config, train, device, use_amp)
        denoiser = trainer.ema_denoiser
        network_source(denoiser, "", use_amp).check([], [config.linear.blockname])
        rows["training", use_amp] = measure_cost(trainer).images_per_s
        for block in (config.linear.blockname, denoiser.block_names[-1]):
            images = Batches(train.images, train.labels, args.batch_size, device)
            rows[f"features up to {block}", use_amp] = extraction(denoiser, images, block, use_amp)
    print(table(rows, args, device))
    return 0


@torch.no_grad()
def extraction(denoiser: Denoiser, batches: Batches, block: str, use_amp: bool) -> float:
    """Images per second through `Denoiser.features` up to `block`."""
    for step in range(BATCHES + 1):
        x0, _ = batches[step]
        with autocast(batches.device, use_amp):
            features = denoiser.features(x0, 1, torch.randn_like(x0), [block])
        float(features[block][0, 0])  # waits for the device
        if step == 0:
            started = time.monotonic()
    return BATCHES * batches.batch_size / (time.monotonic() - started)


def table(rows: dict, args: argparse.Namespace, device: torch.device) -> str:
    """Images per second as text: a row for each measurement, with and without --use_amp."""
    lines = [
        f"{config_path(args)} on {device}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}",
        f"{'images/s':24}  {'float32':>8}  {'--use_amp':>9}  ratio",
    ]
    for name in dict.fromkeys(name for name, _ in rows):
        plain, amp = rows[name, False], rows.get((name, True))
        with_amp = "        -      -" if amp is None else f"{amp:9.1f}  {amp / plain:5.2f}"
        lines.append(f"{name:24}  {plain:8.1f}  {with_amp}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
