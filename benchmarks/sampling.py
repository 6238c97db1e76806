"""Images per second of our samplers and of diffusers' pipelines, on the same network.

python -m benchmarks.sampling
python -m benchmarks.sampling --ckpt hf:google/ddpm-cifar10-32

Without --ckpt the network is UNet2DModel of the main network's size with random weights, and
predicts x0: then images of random weights are not clipped to black and white everywhere.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from arguments import JobParser, at_least, int_list
from benchmarks.memory import megabytes, peak_bytes
from benchmarks.record import add_output_dir, median_ratio, record_of, seconds_of, write_record
from benchmarks.training_loops import DIFFUSERS
from checkpoint import load_denoiser
from cli import job, one_process
from evaluation.tables import aligned
from model.denoiser import Denoiser
from model.diffusers_checkpoints import is_diffusers, read_plan
from model.hub import fetched
from sampling import SamplerSettings, noise_levels, sample, sampler_settings, solve
from support.errors import UserError
from support.files import check_writable
from utils import autocast, pick_device

SIDE = 32  # pixels of the random network's images
N_T = 1000
MEMORY_STEPS = 2  # the peak is reached in each step


@dataclass(frozen=True)
class Schedule:
    """A sampler of ours and the scheduler of diffusers that takes the same steps."""

    steps: int
    spacing: str
    clip: bool
    scheduler: str
    options: dict
    pipeline: str
    call: dict


SCHEDULES = {
    "ddim": Schedule(
        100, "leading", True, "DDIMScheduler",
        {"clip_sample": True, "set_alpha_to_one": True, "steps_offset": 0},
        "DDIMPipeline", {"use_clipped_model_output": True},
    ),
    "dpmpp_2m": Schedule(
        20, "trailing", False, "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "final_sigmas_type": "zero"},
        "DDPMPipeline", {},
    ),
}  # fmt: skip


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments. `memory_batches` is a list."""
    parser = JobParser(__doc__.splitlines()[0], ())
    parser.add_argument(
        "--ckpt", metavar="PATH", help="a UNet that diffusers saved: docs/diffusers.md"
    )
    parser.add_argument("--device", help="cuda, mps or cpu; default: cuda, else mps, else cpu")
    parser.add_argument("--use_amp", action="store_true", help="mixed precision, for both")
    parser.add_argument("--batch_size", "--n", type=int, default=16, help="images of a turn")
    parser.add_argument("--ddim_steps", type=int, default=SCHEDULES["ddim"].steps)
    parser.add_argument("--dpmpp_2m_steps", type=int, default=SCHEDULES["dpmpp_2m"].steps)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument(
        "--memory_batches", type=int_list, default=[1, 4, 16, 64], metavar="N,N",
        help="batch sizes of the table of memory (default: 1,4,16,64)",
    )  # fmt: skip
    add_output_dir(parser, "sampling")
    args = parser.parse_args(argv)
    at_least(args, batch_size=1, ddim_steps=1, dpmpp_2m_steps=2, rounds=1, memory_batches=1)
    one_process("benchmarks.sampling")
    return args


@job
def main(argv: list[str] | None = None) -> int:
    """Measures, writes sampling_<device>.json, and prints two tables."""
    args = parse_args(argv)
    if find_spec("diffusers") is None:
        raise UserError("no diffusers to compare with: pip install -r benchmarks/requirements.txt")
    check_writable([args.output_dir])
    device = pick_device(args.device)
    record = record_of("benchmarks.sampling", argv, device) | {
        "network": args.ckpt or "UNet2DModel, random weights", "batch_size": args.batch_size,
        "rounds": args.rounds, "use_amp": args.use_amp, "samplers": {}, "memory": [],
    }  # fmt: skip
    print(f"{record['network']} on {record['machine']['name']}", flush=True)
    with TemporaryDirectory() as folder:
        pair = Pair(args.ckpt or random_unet(Path(folder)), device, args.use_amp)
        for name in SCHEDULES:
            steps = vars(args)[f"{name}_steps"]
            record["samplers"][name] = pair.compare(name, steps, args.batch_size, args.rounds)
        record["memory"] = list(pair.memory(sorted(set(args.memory_batches))))
    path = write_record(args.output_dir, "sampling", record)
    print(f"{report(record)}\n\nwrote {path}")
    return 0


def random_unet(folder: Path) -> str:
    """A folder as `save_pretrained` writes it: diffusers' network of the main network's size."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    kinds = len(DIFFUSERS["block_out_channels"])
    unet = UNet2DModel(
        sample_size=SIDE, down_block_types=("DownBlock2D",) * kinds,
        up_block_types=("UpBlock2D",) * kinds, **DIFFUSERS,
    )  # fmt: skip
    schedule = DDPMScheduler(num_train_timesteps=N_T, prediction_type="sample")
    DDPMPipeline(unet, schedule).save_pretrained(folder)
    return str(folder)


class Pair:
    """A network of diffusers as our denoiser, and in diffusers' own pipelines."""

    def __init__(self, ckpt: str, device: torch.device, use_amp: bool):
        from diffusers import DiffusionPipeline

        self.device, self.use_amp = device, use_amp
        folder = fetched(ckpt)
        if not is_diffusers(folder) or "unet" not in (parts := read_plan(folder)[0]):
            raise UserError(
                f"--ckpt {ckpt}: not a UNet that diffusers saved, see docs/diffusers.md"
            )
        if "vae" in parts:
            raise UserError(f"--ckpt {ckpt}: of latents; one of pixels is compared here")
        model = load_denoiser(ckpt, device)
        self.denoiser: Denoiser = model.denoiser
        self.shape = tuple(model.config.network.image_shape)
        self.theirs = DiffusionPipeline.from_pretrained(folder).to(device)

    def compare(self, name: str, steps: int, batch_size: int, rounds: int) -> dict:
        """Images/s of both in turn, and how far their images, in 0..1, are apart."""
        settings, call = self.settings(name, steps), self.pipeline(name, steps)
        apart = (self.ours_of(settings, batch_size) - _pixels(call(batch_size))).abs()
        speeds = {"ours": [], "diffusers": []}
        for _ in range(rounds):
            seconds = seconds_of(lambda: self.ours(settings, batch_size), self.device)
            speeds["ours"].append(batch_size / seconds)
            seconds = seconds_of(lambda: call(batch_size), self.device)
            speeds["diffusers"].append(batch_size / seconds)
        return {
            "steps": steps, "images_per_s": speeds,
            "times_diffusers": median_ratio(speeds["ours"], speeds["diffusers"]),
            "largest_difference": apart.max().item(), "mean_difference": apart.mean().item(),
        }  # fmt: skip

    def memory(self, batch_sizes: list[int]) -> Iterator[dict]:
        """The peak of a few steps of DDIM, of both, in bytes."""
        settings, call = self.settings("ddim", MEMORY_STEPS), self.pipeline("ddim", MEMORY_STEPS)
        for n in batch_sizes:
            calls = {"ours": lambda n=n: self.ours(settings, n), "diffusers": lambda n=n: call(n)}
            yield {"batch_size": n} | {k: peak_bytes(c, self.device) for k, c in calls.items()}

    def settings(self, name: str, steps: int) -> SamplerSettings:
        """Of our sampler."""
        row = SCHEDULES[name]
        return sampler_settings(self.denoiser, name, steps, spacing=row.spacing, clip=row.clip)

    def pipeline(self, name: str, steps: int) -> Callable[[int], object]:
        """(number of images) -> what diffusers returns for them."""
        import diffusers

        row = SCHEDULES[name]
        options = {**row.options, "timestep_spacing": row.spacing}
        theirs = getattr(diffusers, row.scheduler).from_config(
            self.theirs.scheduler.config, **options
        )
        pipeline = getattr(diffusers, row.pipeline)(self.theirs.unet, theirs)
        pipeline.set_progress_bar_config(disable=True)

        def call(n: int) -> object:
            with autocast(self.device, self.use_amp):
                return pipeline(
                    batch_size=n, num_inference_steps=steps, generator=_seeded(),
                    output_type="np", **row.call,
                )  # fmt: skip

        return call

    def ours(self, settings: SamplerSettings, n: int) -> Tensor:
        """What sample.py draws: (N, C, H, W) uint8."""
        return sample(self.denoiser, settings, range(n), 0, self.shape, self.use_amp).cpu()

    def ours_of(self, settings: SamplerSettings, n: int) -> Tensor:
        """Our images in 0..1 from their starting noise, whose scale is x / sqrt(1 + sigma^2)."""
        sigma, shape = noise_levels(self.denoiser, settings)[0], (n, *self.shape)
        start = (1 + sigma**2) ** 0.5 / sigma * torch.randn(shape, generator=_seeded())
        x0 = solve(self.denoiser, settings, lambda: start.to(self.device), use_amp=self.use_amp)
        return (self.denoiser.decode(x0).float() / 2 + 0.5).clamp(0, 1).cpu()


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _pixels(output: object) -> Tensor:
    return torch.from_numpy(output.images).permute(0, 3, 1, 2)


def report(record: dict) -> str:
    """Both tables."""
    rows = [["sampler", "steps", "ours, images/s", "diffusers", "ratio", "largest difference"]]
    for name, row in record["samplers"].items():
        speeds = [f"{median(row['images_per_s'][who]):,.2f}" for who in ("ours", "diffusers")]
        ratio, apart = f"{row['times_diffusers']:.2f}", f"{row['largest_difference']:.1e}"
        rows.append([name, str(row["steps"]), *speeds, ratio, apart])
    memory = [["images at a time", "ours, MB", "diffusers, MB"]]
    for row in record["memory"]:
        memory.append([str(row["batch_size"]), *(megabytes(row[k]) for k in ("ours", "diffusers"))])
    return f"{aligned(rows)}\n\n{aligned(memory)}"


if __name__ == "__main__":
    raise SystemExit(main())
