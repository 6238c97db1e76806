"""Pre-trains a denoiser without labels, as a YAML config describes."""

import argparse
import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
from cli import job, job_parser, load_datasets, pick_config
from config import Config, idle_settings
from config.identity import may_differ_at_start
from datasets import Dataset
from evaluation.data_record import refuse_other_data
from model.DDPM import alpha
from model.denoiser import Denoiser
from support import distributed
from support.errors import UserError
from support.files import check_writable, writing
from training.cost import measure_cost
from training.run import Run, folders_of, kept_in
from training.start import starting_weights
from training.trainer import Trainer, check_settings
from utils import log, pick_device

FREE_KEYS = {  # may differ where a run goes on
    "n_epoch", "n_step", "sample_every", "save_every", "n_sample", "save_model", "load_epoch",
    "save_dir", "linear",
}  # fmt: skip
SHORTHANDS = {"epochs": "n_epoch", "batch_size": "batch_size", "lr": "lrate",
              "timesteps": "diffusion.n_T", "sample_every": "sample_every",
              "save_every": "save_every"}  # fmt: skip


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; the shorthands are among the overrides of the config."""
    parser = job_parser(__doc__, checkpoint=False, compiles=True)
    parser.add_argument("--restart", action="store_true", help="start anew over an earlier run")
    parser.add_argument(
        "--allow_changed_data", action="store_true",
        help="go on though the dataset is no longer what the run began with",
    )  # fmt: skip
    parser.add_argument(
        "--dry_run", action="store_true", help="print size, memory and expected time, train nothing"
    )
    group = parser.add_argument_group("shorthands, each the same as its --set")
    for name, key in SHORTHANDS.items():
        group.add_argument(f"--{name}", metavar="VALUE", help=f"--set {key}=VALUE")
    group.add_argument("--output_dir", metavar="VALUE", help="--set save_dir=VALUE")
    args = parser.parse_args(argv)
    short = [(key, getattr(args, name)) for name, key in SHORTHANDS.items()]
    args.overrides += [f"{key}={value}" for key, value in short if value is not None]
    if args.output_dir is not None:
        args.overrides.append(f"save_dir={json.dumps(args.output_dir)}")  # text, whatever it holds
    return args


@job
def main(argv: list[str] | None = None) -> int:
    """The job."""
    args = parse_args(argv)
    config = pick_config(args)
    if args.epochs and config.n_step:
        raise UserError(f"--epochs: this run ends by steps, n_step is {config.n_step}")
    if not args.dry_run:
        check_writable(folders_of(config.save_dir))
    device = pick_device(args.device)
    check_settings(config)
    kept = kept_in(config.save_dir)
    if args.dry_run:
        beginning(config, kept.path, restart=True)  # refuses what a new run would
        print_cost(prepared(args, config, device)[0])
        return 0
    if distributed.world_size() > 1:  # FutureXiang/ddae takes both per process
        log.info(
            "batch_size %d and lrate %g are global: each of the %d processes takes %d images",
            config.batch_size, config.lrate, distributed.world_size(),
            config.batch_size // distributed.world_size(),
        )  # fmt: skip
    with kept.alone():
        start = beginning(config, kept.path, args.restart)  # refuses before the data are read
        run = Run(*prepared(args, config, device))
        position(run, start, args.restart, args.allow_changed_data)
        if args.restart:
            run.kept.goes_on = "the same command without --restart goes on from there"
        if run.trainer.step >= run.trainer.total_steps:
            log.info("nothing to do: %s is at the last step already", kept.path)
            return 0
        run.run()
    log.info("done: checkpoints, pictures and metrics are in %s", config.save_dir)
    return 0


def prepared(
    args: argparse.Namespace, config: Config, device: torch.device
) -> tuple[Trainer, Dataset]:
    """What trains, at the start, and the test images."""
    train, test = load_datasets(args, config)
    trainer = Trainer(config, train, device, args.use_amp, args.compile)
    note_what_is_left(trainer.denoiser)
    return trainer, test


def note_what_is_left(process: Denoiser) -> None:
    """Says so where the last noise level leaves more than 1 % of the image's variance."""
    _, high = process.sigma_range
    signal = alpha(torch.tensor(high)).item() ** 2
    if signal > 0.01:
        log.warning(
            "the last noise level leaves %.0f %% of the image's variance, but samplers start from "
            "pure noise: %s", 100 * signal, process.more_noise,
        )  # fmt: skip


@dataclass(frozen=True)
class Start:
    """What a run begins with: one of these, or random weights."""

    latest: dict | None = None  # the state of latest.pth, from which it goes on
    model: dict | None = None  # that of the model_<epoch>.pth of `load_epoch`
    weights: dict[str, Tensor] | None = None  # those of `start_from`


def beginning(config: Config, latest: Path, restart: bool) -> Start:
    """Where the run of `latest` stopped, or `load_epoch`, or the start, which `start_from` may give
    its weights.

    Raises UserError if what is there is of another config.
    """
    state = checkpoint.load_latest(latest) if latest.exists() and not restart else None
    if state is not None and config.load_epoch in (-1, state["config"].get("load_epoch")):
        free, advice = may_change(config)
        free = free | idle_settings(config)
        checkpoint.refuse_other_config(latest, state, config, free, advice)
        return Start(latest=state)
    if config.load_epoch >= 0:
        path = checkpoint.find(config.save_dir, config.load_epoch)
        state = checkpoint.load(path)
        advice = "it cannot start this network"
        checkpoint.refuse_other_config(path, state, config, may_differ_at_start(config), advice)
        return Start(model=state)
    return Start(weights=starting_weights(config) if config.start_from is not None else None)


def position(run: Run, start: Start, restart: bool, allow_changed_data: bool = False) -> None:
    """Puts the run where it begins, and where it begins anew, the checkpoints of another aside.

    Raises UserError if what is there is of other data, unless allowed, or if nothing is left to
    train after `load_epoch`.
    """
    config, trainer, latest = run.config, run.trainer, run.kept.path
    if start.latest is not None:
        refuse_other_data(latest, start.latest.get("data"), trainer.data, allow_changed_data)
        with checkpoint.taking_over(latest, checkpoint.BEGIN_AGAIN):
            run.resume(start.latest)
        log.info("going on from step %d of %d in %s", trainer.step, trainer.total_steps, latest)
        return
    if start.model is not None:
        path = checkpoint.find(config.save_dir, config.load_epoch)
        refuse_other_data(path, start.model.get("data"), trainer.data, allowed=True)
        with checkpoint.taking_over(path, checkpoint.BEGIN_AGAIN):
            run.begin_after_epoch(start.model)
        if trainer.step >= trainer.total_steps:
            raise UserError(
                f"{path}: nothing is left to train after it, as the run ends at step "
                f"{trainer.total_steps}: raise {length_of(config)}"
            )
        log.info("starting from the weights of %s, with a new optimizer", path)
    elif start.weights is not None:
        trainer.begin_with_weights(start.weights)
        log.info("beginning with the weights of %s", config.start_from)
    distributed.barrier()  # every rank has read what is there
    anew = restart or start.model is not None or holds_another_run(run)
    if anew and distributed.is_main():
        retire(latest.parent, config.load_epoch)


def holds_another_run(run: Run) -> bool:
    """Whether there are other epochs than the one that this run, killed before its first
    latest.pth, may have left."""
    last = (run.trainer.total_steps - 1) // run.trainer.batches.steps_per_epoch
    first = min(run.config.save_every - 1, last)
    return not {first} >= {*checkpoint.saved_epochs(run.save_dir)}


def length_of(config: Config) -> str:
    """The key that ends the run."""
    return "n_step" if config.n_step else "n_epoch"


def may_change(config: Config) -> tuple[set[str], str]:
    """The keys that may differ from those that a run began with, and advice where others do."""
    advice = "put these back, choose another save_dir, or start anew with --restart"
    if config.lr_decay == "none":
        return FREE_KEYS, advice
    length = length_of(config)
    decides = f"with lr_decay {config.lr_decay}, {length} decides the rate of every step"
    return FREE_KEYS - {"n_step", length}, f"{decides}: {advice}"


def retire(folder: Path, epoch: int) -> None:
    """Moves the checkpoints of an earlier run aside, so that none is taken for the new run's: all
    (-1), or those after this `epoch`, which the new run begins with. With them goes a copy of the
    earlier run's log. Where `folder` is a link to another disk, they stay on that."""
    metrics = folder.with_name("metrics.jsonl")
    earlier = {f"model_{e}.pth" for e in checkpoint.saved_epochs(folder.parent) if e <= epoch}
    folder = folder.resolve()
    others = [path for path in sorted(folder.glob("*.pth")) if path.name not in earlier]
    if others:
        numbers = itertools.count(1)
        free = next(p for n in numbers if not (p := folder.with_name(f"ckpts_before_{n}")).exists())
        with writing(free):
            free.mkdir()
            if metrics.exists():
                shutil.copy(metrics, free)
            for path in others:
                path.rename(free / path.name)
        log.info("%d earlier checkpoints are now in %s", len(others), free)


def print_cost(trainer: Trainer) -> None:
    """What --dry_run says."""
    cost = measure_cost(trainer)
    print(f"parameters        {cost.parameters:,}")
    print(f"GFLOPs per image  {cost.gflops_forward:.2f} forward, about 3 times that to train")
    print(f"peak memory       {cost.peak_memory_mb:,.0f} MB on {trainer.device}")
    print(f"speed             {cost.images_per_s:,.0f} images/s, measured on a few steps")
    epochs = cost.total_steps / trainer.batches.steps_per_epoch
    print(f"steps             {cost.total_steps:,} in {epochs:.4g} epochs")
    print(f"time expected     {cost.hours:.2f} h, without test losses and samples")


if __name__ == "__main__":
    raise SystemExit(main())
