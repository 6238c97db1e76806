"""Pre-trains a denoiser without labels, as a YAML config describes."""

import argparse
import itertools
import json
from pathlib import Path

import torch

import checkpoint
from cli import job, job_parser, load_dataset, pick_config
from config import Config
from config.identity import may_differ
from evaluation.data_record import refuse_other_data
from model.DDPM import alpha
from model.denoiser import Denoiser
from support import distributed
from support.errors import UserError
from support.files import check_writable
from training.cost import measure_cost
from training.run import Run, folders_of
from training.start import starting_weights
from training.trainer import Trainer
from utils import log, pick_device

FREE_KEYS = {"n_epoch", "n_step", "sample_every", "save_every", "n_sample", "save_model",
             "load_epoch", "save_dir", "linear"}  # fmt: skip


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
    train, test = (load_dataset(args, config, split) for split in ("train", "test"))
    trainer = Trainer(config, train, device, args.use_amp, args.compile)
    note_what_is_left(trainer.denoiser)
    if args.dry_run:
        print_cost(trainer)
        return 0
    if distributed.world_size() > 1:  # FutureXiang/ddae takes both per process
        log.info(
            "batch_size %d and lrate %g are global: each of the %d processes takes %d images",
            config.batch_size, config.lrate, distributed.world_size(),
            config.batch_size // distributed.world_size(),
        )  # fmt: skip
    run = Run(trainer, test)
    with run.kept.alone():
        position(run, args.restart, args.allow_changed_data)
        if trainer.step >= trainer.total_steps:
            log.info("nothing to do: %s is at the last step already", run.kept.path)
            return 0
        run.run()
    log.info("done: checkpoints, pictures and metrics are in %s", config.save_dir)
    return 0


def note_what_is_left(process: Denoiser) -> None:
    """Says so where the last noise level leaves more than 1 % of the image's variance."""
    _, high = process.sigma_range
    signal = alpha(torch.tensor(high)).item() ** 2
    if signal > 0.01:
        log.warning(
            "the last noise level leaves %.0f %% of the image's variance, but samplers start from "
            "pure noise: %s", 100 * signal, process.more_noise,
        )  # fmt: skip


def position(run: Run, restart: bool, allow_changed_data: bool = False) -> None:
    """Puts the run where it stopped, or at `load_epoch`, or at the start, which `start_from` may
    give its weights.

    Raises UserError if what is there is of another config, or, unless allowed, of other data.
    """
    config, latest = run.config, run.kept.path
    state = checkpoint.load_latest(latest) if latest.exists() and not restart else None
    if state is not None and config.load_epoch in (-1, state["config"].get("load_epoch")):
        free, advice = may_change(config)
        checkpoint.refuse_other_config(latest, state, config, free, advice)
        refuse_other_data(latest, state.get("data"), run.trainer.data, allow_changed_data)
        with checkpoint.taking_over(latest, checkpoint.BEGIN_AGAIN):
            run.resume(state)
        log.info(
            "going on from step %d of %d in %s", state["step"], run.trainer.total_steps, latest
        )
        return
    if config.load_epoch >= 0:
        start = checkpoint.find(config.save_dir, config.load_epoch)
        state = checkpoint.load(start)
        checkpoint.refuse_other_config(
            start, state, config, may_differ(config), "it cannot start this network"
        )
        refuse_other_data(start, state.get("data"), run.trainer.data, allowed=True)
        with checkpoint.taking_over(start, checkpoint.BEGIN_AGAIN):
            run.trainer.start_from({**state, "step": first_step(state, run.trainer)})
        log.info("starting from the weights of %s, with a new optimizer", start)
    elif config.start_from is not None:
        run.trainer.begin_with(starting_weights(config))
        log.info("beginning with the weights of %s", config.start_from)
    distributed.barrier()  # every rank has read what is there
    if (restart or config.load_epoch >= 0) and distributed.is_main():
        retire(latest.parent, config.load_epoch)


def first_step(state: dict, trainer: Trainer) -> int:
    """The step that follows the one of `state`; if a step takes more or fewer images now, the
    first of the next epoch."""
    images = state["config"]["batch_size"] * state["config"]["accumulate"]
    if images == trainer.images_per_step:
        return state["step"]
    return (state["epoch"] + 1) * trainer.batches.steps_per_epoch


def may_change(config: Config) -> tuple[set[str], str]:
    """The keys that may differ from those that a run began with, and advice where others do."""
    advice = "put these back, choose another save_dir, or start anew with --restart"
    if config.lr_decay == "none":
        return FREE_KEYS, advice
    length = "n_step" if config.n_step else "n_epoch"
    decides = f"with lr_decay {config.lr_decay}, {length} decides the rate of every step"
    return FREE_KEYS - {"n_step", length}, f"{decides}: {advice}"


def retire(folder: Path, epoch: int) -> None:
    """Moves the checkpoints of an earlier run aside, so that none is taken for the new run's: all
    (-1), or those after this `epoch`, which the new run begins with."""
    earlier = {f"model_{e}.pth" for e in checkpoint.saved_epochs(folder.parent) if e <= epoch}
    others = [path for path in sorted(folder.glob("*.pth")) if path.name not in earlier]
    if others:
        numbers = itertools.count(1)
        free = next(p for n in numbers if not (p := folder.with_name(f"ckpts_before_{n}")).exists())
        free.mkdir()
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
