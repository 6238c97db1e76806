"""How long each job takes to begin, as multiples of `import torch`.

python -m benchmarks.startup
python -m benchmarks.startup --jobs train,linear --rounds 5
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

import checkpoint
from arguments import JobParser, at_least, names_of
from benchmarks.record import ROOT, add_output_dir, median_ratio, record_of, write_record
from cli import job, one_process
from config import parse_config
from evaluation.tables import aligned
from support.errors import UserError
from support.files import check_writable

IMPORT_TORCH = ("-c", "import torch")
TINY = {  # a network of a second, on images that need no download
    "dataset": "digits", "flip": False, "n_epoch": 1,
    "network": {
        "image_shape": [1, 8, 8], "n_channels": 32, "ch_mults": [1, 2], "is_attn": [False, False],
    },
}  # fmt: skip
CELL = ["--timestep", "11", "--blockname", "out_2"]
NEEDED = {"noisy_classifier": ["--backbone", "wrn"], "fid": ["--n", "4"]}  # whatever it does
FIRST_WORK: dict[str, list[str] | None] = {  # what a job can do at once; None: no such thing
    "train": ["--dry_run"],
    "linear": ["--protocol", "cached", "--n_train", "20", *CELL],
    "visualize_features": ["--n", "20", *CELL],
    "sample": ["--n", "1", "--steps", "1"],
    "fid": None,  # its Inception network alone takes minutes
    "finetune": None,
    "noisy_classifier": None,
    "contrastive": ["--n", "20", "--blocks", "out_2"],
    "visualize_diffusion": ["--num_images", "1"],
    "reproduce": None,
    "export": [],
}
COLUMNS = {"help": "--help", "mistake": "misspelt key", "work": "first work"}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments. `jobs` is a list."""
    parser = JobParser(__doc__.splitlines()[0], ())
    parser.add_argument(
        "--jobs", type=names_of(FIRST_WORK), default=list(FIRST_WORK), metavar="NAME,NAME",
        help=f"which (default: all): {','.join(FIRST_WORK)}",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="turns of each command")
    add_output_dir(parser, "startup")
    args = parser.parse_args(argv)
    at_least(args, rounds=1)
    one_process("benchmarks.startup")
    return args


@job
def main(argv: list[str] | None = None) -> int:
    """Measures on the CPU, writes startup_<device>.json, and prints a table."""
    args = parse_args(argv)
    check_writable([args.output_dir])
    record = record_of("benchmarks.startup", argv, torch.device("cpu")) | {"rounds": args.rounds}
    with TemporaryDirectory() as folder:
        found = measure(commands(args.jobs, Path(folder)), args.rounds)
    record |= {"import_torch_s": found.pop("import torch"), "seconds": found}
    record["times_import_torch"] = {
        name: median_ratio(seconds, record["import_torch_s"]) for name, seconds in found.items()
    }
    path = write_record(args.output_dir, "startup", record)
    print(f"{report(record, args.jobs)}\n\nwrote {path}")
    return 0


def commands(jobs: Sequence[str], folder: Path) -> dict[str, tuple[list[str], int]]:
    """{"<job> help|mistake|work": (what python is given, the exit code that it ends with)}."""
    tiny, misspelt = folder / "tiny.yaml", folder / "misspelt.yaml"
    settings = TINY | {"save_dir": str(folder / "run")}
    tiny.write_text(json.dumps(settings))  # JSON is YAML
    misspelt.write_text("batchsize: 3\n")
    save_untrained(settings)
    found = {}
    for name in jobs:
        script, more = f"{name}.py", NEEDED.get(name, [])
        found[f"{name} help"] = ([script, "--help"], 0)
        found[f"{name} mistake"] = ([script, "--config", str(misspelt), *more], 2)
        work = FIRST_WORK[name]
        if work is not None:
            device = [] if name == "visualize_diffusion" else ["--device", "cpu"]
            found[f"{name} work"] = ([script, "--config", str(tiny), *device, *work], 0)
    return found


def save_untrained(settings: dict) -> None:
    """model_0.pth of a network that no step has changed, where the jobs look for it."""
    config = parse_config(settings)
    weights = checkpoint.untrained(config, torch.device("cpu")).denoiser.net.state_dict()
    state = {
        "config": config.model_dump(mode="json"), "net": weights, "ema": weights, "epoch": 0,
        "step": 0, "metrics": {}, "versions": checkpoint.versions(),
    }  # fmt: skip
    checkpoint.save(Path(config.save_dir) / "ckpts" / "model_0.pth", state)


def measure(commands: dict[str, tuple[list[str], int]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each command and of "import torch", in turn; one turn before is not counted."""
    commands = {"import torch": (list(IMPORT_TORCH), 0), **commands}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for i in range(rounds + 1):
        for name, (words, code) in commands.items():
            took = seconds_of_command(words, code)
            if i:  # the first turn reads files from the disk
                seconds[name].append(took)
    return seconds


def seconds_of_command(words: list[str], code: int = 0) -> float:
    """Of `python <words>` in the project's folder. Raises UserError if it ends otherwise."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    took = time.perf_counter() - started
    if done.returncode != code:
        last = "".join(done.stderr.strip().splitlines()[-1:])
        raise UserError(f"python {' '.join(words)} ended with {done.returncode}: {last}")
    return took


def report(record: dict, jobs: Sequence[str]) -> str:
    """A row for each job, a column for each way to begin."""
    rows = [["x import torch", *COLUMNS.values()]]
    for name in jobs:
        found = [record["times_import_torch"].get(f"{name} {column}") for column in COLUMNS]
        rows.append([name, *("-" if times is None else f"{times:.2f}" for times in found)])
    took = median(record["import_torch_s"])
    return f"{record['machine']['name']}: import torch takes {took:.2f} s\n{aligned(rows)}"


if __name__ == "__main__":
    raise SystemExit(main())
