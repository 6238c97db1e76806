"""All that only a GPU can show, in minutes: one command, one table, one file to send.

python -m benchmarks.gpu
python -m benchmarks.gpu --stages compile,speed
python -m benchmarks.gpu --full        # then trains, probes and samples
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from arguments import int_from, names_of
from benchmarks.gpu_stages import STAGES
from benchmarks.record import ROOT, add_output_dir, images_for, record_of, write_record
from cli import (
    config_path,
    job,
    job_parser,
    job_words,
    one_process,
    overrides_and_seed,
    pick_config,
    set_options,
)
from config import Config
from support.errors import UserError
from support.files import check_writable, read_json
from utils import pick_device

SUMMARY = {"status": str, "lines": [str], "figures": dict, "seconds": float}

ROOMY = 32e9  # bytes of free GPU memory that hold all stages at once that are not timed
FULL_LIMIT_S = 6 * 3600  # of each job of --full


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments. `stages` is a list."""
    parser = job_parser(__doc__.splitlines()[0], checkpoint=False, amp=False)
    parser.set_defaults(config="config/DDPM_ddpm.yaml")
    parser.add_argument(
        "--stages", type=names_of(STAGES), default=list(STAGES), metavar="NAME,NAME",
        help=f"which (default: all): {','.join(STAGES)}",
    )  # fmt: skip
    parser.add_argument(
        "--tiny", action="store_true",
        help="a rehearsal: a small network, few steps; always so on a CPU",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=int_from(1), default=10, help="after which no stage goes on"
    )
    parser.add_argument(
        "--full", action="store_true",
        help="then train.py --use_amp --compile to its end, the grid of probes, and samples",
    )  # fmt: skip
    add_output_dir(parser, "gpu")
    args = parser.parse_args(argv)
    one_process("benchmarks.gpu")
    return args


class Running:
    """A stage in a process group of its own, which its limit or `stop` ends as a whole."""

    def __init__(self, name: str, words: list[str], limit_s: float, folder: Path):
        self.name, self.limit_s = name, limit_s
        self.out, self.log = folder / f"{name}.json", folder / f"{name}.log"
        self.started = time.monotonic()
        command = [sys.executable, "-m", "benchmarks.gpu_stages", name, *words]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*command, "--out", str(self.out)], cwd=ROOT, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def result(self) -> dict:
        """Waits for it: {"status", "lines", "figures", "seconds"}, and its log where it failed."""
        left = self.started + self.limit_s - time.monotonic()
        try:
            code = self.process.wait(max(left, 0.1))
        except subprocess.TimeoutExpired:
            code = None
        self.stop()
        if code == 0 and self.out.exists():
            return read_json(self.out, SUMMARY)
        text = self.log.read_text(encoding="utf-8", errors="replace").strip()
        words = text.splitlines()[-1] if text else "it said nothing"
        what = f"ended with {code}" if code is not None else f"not done in {self.limit_s:.0f} s"
        failed = {"status": "failed", "lines": [f"{what}: {words}"], "figures": {}}
        seconds = round(time.monotonic() - self.started, 1)
        return failed | {"log": text[-4000:], "seconds": seconds}

    def stop(self) -> None:
        """Ends what is left of it."""
        if os.name != "posix":
            self.process.kill()
        else:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                return
        self.process.wait()


@job
def main(argv: list[str] | None = None) -> int:
    """Runs the stages, prints a line of each, and writes gpu_<device>.json after each, with the
    stages in its name where they are not all."""
    args = parse_args(argv)
    check_writable([args.output_dir])
    config, device = pick_config(args), pick_device(args.device)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the stages too
    tiny = args.tiny or device.type == "cpu"
    record = record_of("benchmarks.gpu", argv, device)
    record |= {"rehearsal": tiny, "images": images_for(config, args.data_dir, 1)[1], "stages": {}}
    if tiny:
        record["images"] = "synthetic images, small: a rehearsal, whose speed says nothing"
    machine = record["machine"]
    print(f"{machine['name']}, torch {record['versions']['torch']}, {record['images']}", flush=True)
    started = time.monotonic()
    words = ["--device", str(device), "--data_dir", str(Path(args.data_dir).resolve())]
    words += ["--config", str(config_path(args).resolve()), *(["--tiny"] if tiny else [])]
    words += set_options(overrides_and_seed(args))
    for name, found in results(together(args.stages, device), words, started + 60 * args.minutes):
        record["stages"][name] = found
        record["total_s"] = round(time.monotonic() - started, 1)
        stem = "gpu_rehearsal" if tiny else "gpu"
        path = write_record(args.output_dir, stem, record, (args.stages, STAGES))
        first, *more = found["lines"]
        line = f"{name:10} {found['status']:8} {found['seconds']:6.1f} s  {first}"
        print("\n".join([line, *(" " * 30 + text for text in more)]), flush=True)
    print(f"\n{record['total_s']:.0f} s; wrote {path}: a pull request with it is welcome")
    if args.full:
        full(args, config)
    return int(any(found["status"] == "failed" for found in record["stages"].values()))


def together(names: list[str], device: torch.device) -> list[list[str]]:
    """The stages in the groups that run at once: all that are not timed, and each other alone.

    On a small card that of memory is alone too, so that it finds the memory free.
    """
    roomy = device.type != "cuda" or torch.cuda.mem_get_info(device)[0] > ROOMY
    alone = [n for n in STAGES if STAGES[n].timed or (n == "memory" and not roomy)]
    group = [name for name in STAGES if name in names and name not in alone]
    return [*([group] if group else []), *([name] for name in alone if name in names)]


def results(groups: list[list[str]], words: list[str], until: float) -> Iterator[tuple[str, dict]]:
    """(name, what was found) of every stage of every group, in their order.

    `until`: no stage goes on after it, in seconds of time.monotonic().
    """
    running: list[Running] = []
    with TemporaryDirectory() as folder:
        try:
            for group in groups:
                limits = [min(STAGES[n].limit_s, max(until - time.monotonic(), 1)) for n in group]
                pairs = zip(group, limits, strict=True)
                running = [Running(name, words, limit, Path(folder)) for name, limit in pairs]
                for stage in running:
                    yield stage.name, stage.result()
        finally:
            for stage in running:
                stage.stop()


def full(args: argparse.Namespace, config: Config) -> None:
    """The run itself, its grid and samples. Raises UserError if one of them fails."""
    shared = [*job_words(args, str(config_path(args)), overrides_and_seed(args)), "--use_amp"]
    for command in (
        ["train.py", *shared, "--compile"], ["linear.py", *shared, "--grid"],
        ["sample.py", *shared, "--n", "64"],
    ):  # fmt: skip
        text = f"python {' '.join(command)}"
        print(f"\n{text}", flush=True)
        started = time.monotonic()
        try:
            done = subprocess.run([sys.executable, *command], timeout=FULL_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise UserError(f"{text}: not done in {FULL_LIMIT_S / 3600:.0f} hours") from None
        if done.returncode:
            raise UserError(f"{text} ended with {done.returncode}")
        print(f"{text}: {time.monotonic() - started:.0f} s", flush=True)
    print(f"the results are in {config.save_dir}")


if __name__ == "__main__":
    raise SystemExit(main())
