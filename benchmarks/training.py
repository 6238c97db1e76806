"""Images per second of a whole training step: ours, the usual loop, and two other projects'.

python -m benchmarks.training --config config/DDPM_ddpm.yaml --compile
"""

import argparse
import traceback
from importlib.util import find_spec
from statistics import median

import torch

from arguments import at_least, names_of
from benchmarks.device_rate import device_rates
from benchmarks.memory import megabytes, peak_bytes
from benchmarks.record import (
    add_output_dir,
    free,
    images_for,
    median_ratio,
    record_of,
    seconds_of,
    write_record,
)
from benchmarks.training_loops import DDPMPytorch, Diffusers, Loop, Ours, Usual
from cli import config_path, job, job_parser, one_process, pick_config
from config import Config
from datasets import Dataset
from evaluation.tables import aligned
from support.allocator import give_back_freed_memory, keep_freed_memory
from support.files import check_writable
from training.cost import gflops_of
from utils import amp_dtype, log, pick_device

LOOPS = {"ours": Ours, "usual": Usual, "diffusers": Diffusers, "ddpm_pytorch": DDPMPytorch}
COMPILED = "ours --compile"
NEEDS = {
    "diffusers": ["diffusers"],
    "ddpm_pytorch": ["denoising_diffusion_pytorch", "accelerate", "einops"],
}
INSTALL = "pip install -r benchmarks/requirements.txt"
PRECISIONS = {"float32": False, "amp": True}  # and whether that is --use_amp
STEPS = {"cuda": 50, "mps": 20, "cpu": 10}  # of a turn
WARM_UP = {"cuda": 20, "mps": 5, "cpu": 2}  # steps; with --compile, some of them compile
SYNTHETIC = 20_000  # images, where the dataset is not there


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments. `loops` and `precisions` are lists."""
    parser = job_parser(__doc__.splitlines()[0], checkpoint=False, amp=False, compiles=True)
    parser.set_defaults(config="config/DDPM_ddpm.yaml")
    parser.add_argument(
        "--loops", type=names_of(LOOPS), default=list(LOOPS), metavar="NAME,NAME",
        help=f"which (default: all): {','.join(LOOPS)}; --compile adds ours compiled",
    )  # fmt: skip
    parser.add_argument(
        "--precisions", type=names_of(PRECISIONS), default=list(PRECISIONS),
        metavar="NAME,NAME", help="float32,amp (default: both); amp is --use_amp",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="turns of each loop")
    parser.add_argument(
        "--steps", type=int, help="of a turn (default: 10 on a CPU, 50 on a CUDA device)"
    )
    add_output_dir(parser, "training")
    args = parser.parse_args(argv)
    at_least(args, rounds=1, steps=1)
    one_process("benchmarks.training")
    return args


@job
def main(argv: list[str] | None = None) -> int:
    """Measures, writes training_<device>.json, and prints it as a table."""
    args = parse_args(argv)
    check_writable([args.output_dir])
    config, device = pick_config(args), pick_device(args.device)
    train, images = images_for(config, args.data_dir, SYNTHETIC)
    names = list(args.loops)
    if args.compile:
        names.insert(names.index("ours") + 1 if "ours" in names else 0, COMPILED)
    steps = args.steps or STEPS[device.type]
    record = record_of("benchmarks.training", argv, device) | {
        "config": str(config_path(args)), "images": images, "batch_size": config.batch_size,
        "rounds": args.rounds, "steps_of_a_turn": steps, "precisions": {},
    }  # fmt: skip
    print(f"{record['config']} on {record['machine']['name']}, {images}", flush=True)
    path = None
    for precision in args.precisions:
        use_amp = PRECISIONS[precision]
        if use_amp and amp_dtype(device) is None:
            print(f"\n{precision}: this device has none", flush=True)
            continue
        found = measure(config, train, device, use_amp, names, args.rounds, steps)
        record["precisions"][precision] = found
        path = write_record(
            args.output_dir, "training", record, (args.loops, LOOPS), (args.precisions, PRECISIONS)
        )
        print("\n" + report(found), flush=True)
    print(f"\nwrote {path}" if path else "\nnothing was measured")
    return 0


def missing(name: str) -> str | None:
    """What a loop needs that is not there, and how to install it."""
    lack = [package for package in NEEDS.get(name, []) if find_spec(package) is None]
    return f"no {', '.join(lack)}: {INSTALL}" if lack else None


def built(
    names: list[str], config: Config, train: Dataset, device: torch.device, use_amp: bool
) -> tuple[dict[str, Loop], dict[str, dict], dict[str, str]]:
    """(the loops, what is known of each, why others cannot be measured here)."""
    loops, rows, failed = {}, {}, {}
    for name in names:
        if why := missing(name):
            failed[name] = why
            continue
        try:
            loops[name], rows[name] = build(name, config, train, device, use_amp)
        except Exception as error:
            if name not in NEEDS:  # ours to mend; versions of other projects are not ours to choose
                raise
            log.warning("%s", traceback.format_exc())
            first = str(error).strip().partition("\n")[0]
            failed[name] = f"{type(error).__name__}: {first}"
    return loops, rows, failed


def build(
    name: str, config: Config, train: Dataset, device: torch.device, use_amp: bool
) -> tuple[Loop, dict]:
    """The loop, warm, and what does not change from turn to turn."""
    made, facts = [], {}

    def warm() -> None:
        if name == COMPILED:
            loop = Ours(config, train, device, use_amp, compiles=True)
        else:
            loop = LOOPS[name](config, train, device, use_amp)
        made.append(loop)
        as_its_own(loop)
        facts["first_step_s"] = seconds_of(lambda: loop.steps(1), device)
        seconds_of(lambda: loop.steps(WARM_UP[device.type]), device)
        if isinstance(loop, Ours):
            seconds_of(loop.forward_backward, device, 2)

    facts["peak_bytes"] = peak_bytes(warm, device)
    loop = made[0]
    facts["parameters"] = sum(p.numel() for p in loop.net.parameters())
    with torch.no_grad():
        facts["gflops_forward"] = gflops_of(loop.forward_one)
    return loop, facts


def as_its_own(loop: Loop) -> None:
    """Lets the C library treat freed memory as it does in a program that has this loop alone."""
    (keep_freed_memory if isinstance(loop, Ours) else give_back_freed_memory)()


def measure(
    config: Config,
    train: Dataset,
    device: torch.device,
    use_amp: bool,
    names: list[str],
    rounds: int,
    steps: int,
) -> dict:
    """Every loop in turn, `rounds` times `steps` steps.

    {"dtype", "rates": TFLOP/s of the device, "loops": {name: facts and the images/s of each
    round}, "failed": {name: why}}; of ours also the seconds of forward and backward alone.
    """
    dtype = amp_dtype(device) if use_amp else torch.float32
    rates = device_rates(device, dtype)
    loops, rows, failed = built(names, config, train, device, use_amp)
    for _ in range(rounds):
        for name, loop in loops.items():
            as_its_own(loop)
            seconds = seconds_of(lambda loop=loop: loop.steps(steps), device)
            speed = steps * loop.images_per_step / seconds
            rows[name].setdefault("images_per_s", []).append(speed)
            if isinstance(loop, Ours):
                alone = seconds_of(loop.forward_backward, device, steps) / steps
                rows[name].setdefault("forward_backward_s", []).append(alone)
                rows[name].setdefault("step_s", []).append(seconds / steps)
    for loop in loops.values():
        loop.close()
    loops.clear()
    free(device)
    found = {
        "dtype": str(dtype).removeprefix("torch."), "rates": rates, "loops": rows,
        "failed": failed,
    }  # fmt: skip
    return found | {"summary": {name: summary(name, found) for name in rows}}


def summary(name: str, found: dict) -> dict:
    """Medians over the rounds; a step's FLOPs are taken as three times the forward's."""
    row, usual = found["loops"][name], found["loops"].get("usual")
    speed = median(row["images_per_s"])
    tflops = 3 * row["gflops_forward"] * speed / 1000
    convolutions = max(r for name, r in found["rates"].items() if name.startswith("conv"))
    values = {
        "images_per_s": speed,
        "images_per_s_per_gflop": speed / row["gflops_forward"],
        "tflops": tflops,
        "share_of_convolutions": tflops / convolutions,
        "share_of_matrix_products": tflops / found["rates"]["matmul"],
    }
    if usual:
        values["times_usual"] = median_ratio(row["images_per_s"], usual["images_per_s"])
    if "step_s" in row:
        part = median_ratio(row["forward_backward_s"], row["step_s"])
        values["beside_forward_and_backward"] = 1 - part
    return values


def report(found: dict) -> str:
    """The table of one precision."""
    rates = ", ".join(f"{name} {rate:.3g}" for name, rate in found["rates"].items())
    rows = [[
        found["dtype"], "images/s", "x usual", "parameters", "GFLOP", "img/s/GFLOP", "of conv rate",
        "not fwd+bwd", "peak MB", "first step s",
    ]]  # fmt: skip
    for name, row in found["loops"].items():
        values = found["summary"][name]
        ratio, rest = values.get("times_usual"), values.get("beside_forward_and_backward")
        rows.append([
            name, f"{values['images_per_s']:,.1f}", "-" if ratio is None else f"{ratio:.2f}",
            f"{row['parameters']:,}", f"{row['gflops_forward']:.2f}",
            f"{values['images_per_s_per_gflop']:,.1f}",
            f"{100 * values['share_of_convolutions']:.1f} %",
            "-" if rest is None else f"{100 * rest:.1f} %",
            megabytes(row["peak_bytes"]), f"{row['first_step_s']:.1f}",
        ])  # fmt: skip
    lines = [
        aligned(rows),
        *(f"{name}: not measured: {why}" for name, why in found["failed"].items()),
    ]
    return "\n".join([*lines, f"the device's own rates, TFLOP/s: {rates}"])


if __name__ == "__main__":
    raise SystemExit(main())
