"""Runs the whole chain for one config and writes a report: train, probe, look, sample, score.

Without --config and --dataset it is that of digits, which takes minutes on a CPU.
Each job is a process of its own; run again, the chain goes on where it stopped.
"""

import argparse
import codecs
import contextlib
import multiprocessing
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from io import BufferedReader
from pathlib import Path
from types import FrameType

import checkpoint
from arguments import at_least
from cli import (
    config_path,
    job,
    job_parser,
    job_words,
    load_datasets,
    one_process,
    overrides_and_seed,
    pick_config,
)
from config import Config
from evaluation.fid.inception import find_weights
from evaluation.probe.grid_files import best_cell
from evaluation.run_report import command_line, write_report
from sampling import default_samples_folder, sampler_settings
from support.errors import UserError
from support.files import check_writable, read_json, write_json
from support.resumable import stopping_signals
from training.cost import Cost, measure_cost
from training.trainer import Trainer
from utils import log, pick_device, setup_logging

LONG_SECONDS = 3600  # what is expected to take longer is announced
MAY_BE_LEFT_OUT = ("fid",)  # needs weights that cannot always be had
RESTS_ON = {"fid": "samples"}  # drawn again, or more of them, they are scored again
STEP = {"command": list, "seconds": int | float, "left_out": str | None}  # why it has no result
RECORD = {"weights": str | None, "steps": {str: STEP}}  # of reproduce.json
PROBED = ("grid of an untrained network", "grid", "probe of raw pixels", "t-SNE")
DECIDES = {"linear": PROBED, "data": (*PROBED, "fid")}  # steps, by what they depend on
SHORTENED_BY = {
    "train": "--set n_epoch=...",
    "grid": "--protocol cached",
    "grid of an untrained network": "--protocol cached",
    "samples": "--n ...",
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; without a config the dataset is digits."""
    parser = job_parser(__doc__, checkpoint=False, compiles=True)
    parser.add_argument(
        "--protocol", choices=["paper", "cached"], default="paper", help="of the linear probe"
    )
    parser.add_argument(
        "--n", type=int, default=256, help="samples; 5000 or more for a FID to compare"
    )
    parser.add_argument("--inception", metavar="PATH", help="the Inception weights, for the FID")
    args = parser.parse_args(argv)
    if args.config is None and args.dataset is None:
        args.dataset = "digits"
    at_least(args, n=1)
    if args.inception is not None:
        find_weights(args.inception)
    return args


@job
def main(argv: list[str] | None = None) -> int:
    """Runs what has not been run, and writes the report."""
    args = parse_args(argv)
    one_process("reproduce.py")
    config = pick_config(args)
    if not config.save_model:
        raise UserError("save_model: False keeps no checkpoint to probe: set it to True")
    check_writable([config.save_dir])
    record_path = Path(config.save_dir) / "reproduce.json"
    record = read_record(record_path)
    steps = record["steps"]
    if "train" not in steps or steps["train"]["left_out"]:
        announce_long_work(args, config)
    train = [*python("train.py"), *common_arguments(args)]
    train += ["--compile"] if args.compile else []

    def keep() -> None:
        write_json(record_path, record)

    run("train", train, steps, keep)
    model = checkpoint.load_denoiser(checkpoint.find(config.save_dir), config=config)
    if record["weights"] != model.fingerprint():  # later steps of another training do not count
        record = {"weights": model.fingerprint(), "steps": {"train": steps["train"]}}
        steps = record["steps"]
    data = [dataset.fingerprint() for dataset in load_datasets(args, config)]
    for what, now in (("linear", config.linear.model_dump()), ("data", data)):
        for name in DECIDES[what] if record.get(what, now) != now else ():
            steps.pop(name, None)
        record[what] = now
    samples = default_samples_folder(config.save_dir, model.epoch, sampler_settings(model.denoiser))
    for name, command in later_steps(args, model, samples):
        if steps.get(name, {}).get("command") == command and not steps[name]["left_out"]:
            log.info("%s: done before", name)
            continue
        for later in [later for later, on in RESTS_ON.items() if on == name]:
            steps.pop(later, None)
        keep()
        run(name, command, steps, keep)
    print(f"the report is {write_report(model, steps, args.protocol, samples)}")
    return 0


def common_arguments(args: argparse.Namespace) -> list[str]:
    """What every job of the chain is given."""
    return job_words(args, str(config_path(args)), overrides_and_seed(args))


def later_steps(
    args: argparse.Namespace, model: checkpoint.TrainedModel, samples: Path
) -> Iterator[tuple[str, list[str]]]:
    """The commands after training, in order, each on the newest checkpoint.

    That of t-SNE names the best cell of the grid, which has run when it is asked for.
    """
    shared = common_arguments(args)
    newest = [*shared, "--epoch", str(model.epoch)]
    grid = [*python("linear.py"), "--grid", "--protocol", args.protocol]
    compiles = ["--compile"] if args.compile else []
    # before the grid, whose tables stand beside it
    yield "grid of an untrained network", [*grid, *shared, *compiles, "--baseline", "random"]
    yield "grid", [*grid, *newest, *compiles]
    yield "probe of raw pixels", [*grid, *shared, "--baseline", "pixels"]
    _, best = best_cell(Path(model.config.save_dir), model, args.protocol)
    ((t, block),) = best.cell.parts
    cell = ["--timestep", str(t), "--blockname", block]
    yield "t-SNE", [*python("visualize_features.py"), *newest, *cell]
    yield "samples", [*python("sample.py"), *newest, *compiles, "--n", str(args.n)]
    inception = ["--inception", args.inception] if args.inception else []
    yield "fid", [*python("fid.py"), *shared, "--samples", str(samples / "pngs"), *inception]


def python(script: str) -> list[str]:
    """The start of a command that runs this script of ours."""
    return [sys.executable, str(Path(__file__).resolve().parent / script)]


def read_record(path: Path) -> dict:
    """What reproduce.json says of an earlier call; empty without it."""
    if not path.exists():
        return {"weights": None, "steps": {}}
    return read_json(path, RECORD)


def run(name: str, command: list[str], steps: dict[str, dict], keep: Callable[[], None]) -> None:
    """Runs one job, passing its messages on, puts what is said of it into `steps`, and has that
    kept. The seconds are those of all calls: of training, and of another step since its command
    is the same.

    Raises UserError if it failed and may not be left out, SystemExit if it was interrupted.
    """
    earlier = steps.get(name)
    goes_on = earlier and (name == "train" or earlier["command"] == command)
    log.info("\n=== %s: %s", name, command_line(command))
    started = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    with forwarding_signals(process):
        messages = pass_on(process.stderr)
        code = process.wait()
    seconds = time.monotonic() - started + (earlier["seconds"] if goes_on else 0)
    stopped = code in {c for number in stopping_signals() for c in (128 + number, -number)}
    last_line = messages.strip().rpartition("\n")[2]
    reason = messages.rpartition("error: ")[2].strip() if "error: " in messages else last_line
    why = None if code == 0 else "interrupted" if stopped else reason
    steps[name] = {"command": command, "seconds": round(seconds, 1), "left_out": why}
    keep()
    if stopped:
        raise SystemExit(code if code > 0 else 128 - code)
    if code and not (code == 2 and name in MAY_BE_LEFT_OUT):
        raise UserError(f"{name} failed (exit code {code}): {reason}")


def pass_on(stream: BufferedReader) -> str:
    """Copies a job's standard error to ours as it comes. Returns the last 4096 characters of it."""
    decoder, end = codecs.getincrementaldecoder("utf-8")("replace"), ""
    while chunk := stream.read1(4096):
        text = decoder.decode(chunk)
        sys.stderr.write(text)
        sys.stderr.flush()
        end = (end + text)[-4096:]
    return end


@contextlib.contextmanager
def forwarding_signals(process: subprocess.Popen) -> Iterator[None]:
    """Lets the job end in its own way: what stops us stops it, and we wait for it."""

    def pass_to_job(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:  # which the terminal sends to the job itself
            process.send_signal(number)

    before = {number: signal.signal(number, pass_to_job) for number in stopping_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- how long it will take


def announce_long_work(args: argparse.Namespace, config: Config) -> None:
    """Says what is expected to take over an hour, from a few steps measured in a process of their
    own, so that they leave no memory taken."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        cost, images = pool.submit(measure, args, config).result()
    for name, seconds in expected_seconds(args, config, cost, images).items():
        if seconds > LONG_SECONDS:
            taken = f"--protocol {args.protocol}" == SHORTENED_BY[name]
            advice = "" if taken else f"; {SHORTENED_BY[name]} shortens it"
            log.info("%s: about %.1f h expected%s", name, seconds / 3600, advice)


def measure(args: argparse.Namespace, config: Config) -> tuple[Cost, int]:
    """The cost of training, and the number of all images."""
    setup_logging()
    train, test = load_datasets(args, config)
    trainer = Trainer(config, train, pick_device(args.device), args.use_amp, args.compile)
    return measure_cost(trainer), len(train) + len(test)


def expected_seconds(
    args: argparse.Namespace, config: Config, cost: Cost, images: int
) -> dict[str, float]:
    """Rough: a forward pass is a third of a training step."""
    forwards_per_s = 3 * cost.images_per_s
    passes = config.linear.n_epoch if args.protocol == "paper" else 1
    grid = passes * images * cost.probe_timesteps / forwards_per_s
    return {
        "train": cost.hours * 3600,
        "grid": grid,
        "grid of an untrained network": grid,
        "samples": args.n * cost.evaluations_per_sample / forwards_per_s,
    }


if __name__ == "__main__":
    raise SystemExit(main())
