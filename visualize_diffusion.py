"""Shows the forward process: clean images turning to noise, and its signal and noise over t."""

import argparse
from pathlib import Path

import torch

from arguments import int_list
from cli import job, job_parser, load_dataset, pick_config
from config import Config
from datasets import to_model_range
from evaluation.plots import forward_process
from model.DDPM import alpha
from model.denoiser import Denoiser
from model.models import process_of
from support.errors import UserError
from support.files import check_writable
from utils import generator

PANELS = 8  # noise levels shown by default
CURVE_POINTS = 500


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = job_parser(__doc__, checkpoint=False, device=False)
    parser.add_argument("--num_images", "--n", type=int, default=6, help="rows of images")
    parser.add_argument(
        "--timesteps", type=int_list, metavar="T,T",
        help="columns, 0 being the clean image (default: 8 spread over all)",
    )  # fmt: skip
    parser.add_argument("--save_path", help="default: <save_dir>/forward_process.png")
    return parser.parse_args(argv)


@job
def main(argv: list[str] | None = None) -> int:
    """Writes forward_process.png."""
    args = parse_args(argv)
    config = pick_config(args)
    process = process_of(config)
    timesteps = timesteps_of(args, process)
    path = Path(args.save_path or Path(config.save_dir) / "forward_process.png")
    check_writable(files=[path])
    test = load_dataset(args, config, "test")
    if not 1 <= args.num_images <= len(test):
        raise UserError(f"--num_images {args.num_images}: give 1 to {len(test)}")
    spread = [i * len(test) // args.num_images for i in range(args.num_images)]  # over the classes
    x0 = to_model_range(torch.from_numpy(test.images[spread]))
    t = torch.linspace(1, process.n_T, CURVE_POINTS)
    sigma = process.sigma(t)
    forward_process(
        path, noisy(process, x0, timesteps, config.seed), timesteps,
        t.numpy(), alpha(sigma).numpy(), (alpha(sigma) * sigma).numpy(),
        f"forward process: {test.name}, {describe(config)}",
    )  # fmt: skip
    print(f"wrote {path}")
    return 0


def timesteps_of(args: argparse.Namespace, process: Denoiser) -> list[int]:
    """The columns. Raises UserError for a timestep that the process does not have."""
    if args.timesteps is None:
        return sorted({round(i * process.n_T / (PANELS - 1)) for i in range(PANELS)})
    for t in args.timesteps:
        if not 0 <= t <= process.n_T:
            raise UserError(f"--timesteps {t}: give 0 (clean) to {process.n_T} (almost pure noise)")
    return args.timesteps


def noisy(process: Denoiser, x0: torch.Tensor, timesteps: list[int], seed: int) -> torch.Tensor:
    """(N, T, C, H, W): alpha (x0 + sigma n), with one noise for all timesteps of an image and
    alpha = 1 / sqrt(1 + sigma^2); t = 0 is the image itself."""
    noise = torch.randn(x0.shape, generator=generator("cpu", seed, "forward process"))
    columns = []
    for t in timesteps:
        sigma = process.sigma(torch.tensor([t])) if t else torch.zeros(1)
        columns.append(alpha(sigma) * (x0 + sigma * noise))
    return torch.stack(columns, dim=1)


def describe(config: Config) -> str:
    """The process and its schedule, for the title."""
    schedule = getattr(config.diffusion, "schedule", None)
    return f"{config.model_type}, {schedule} schedule" if schedule else config.model_type


if __name__ == "__main__":
    raise SystemExit(main())
