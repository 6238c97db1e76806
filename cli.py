"""What every job's command line shares: its arguments, and how a user's mistake is answered."""

import argparse
import functools
import signal
import sys
from pathlib import Path

import torch

from checkpoint import TrainedModel, find, load_denoiser
from config import Config, load_config
from datasets import Dataset, load_dataset
from errors import UserError
from utils import setup_logging

OUT_OF_MEMORY = (
    "the GPU ran out of memory: lower batch_size (--set batch_size=..., --batch_size in "
    "sampling and probing), add --use_amp, or use --device cpu"
)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default only where it says something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default in (None, False, []) or "default" in action.help
        return action.help if silent else super()._get_help_string(action)


def job(main):
    """Decorates a job's `main(argv=None)`: a UserError ends it with its message and exit code 2."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None):
        setup_logging()
        try:
            return main(argv)
        except UserError as error:
            message = str(error)
        except torch.OutOfMemoryError:
            message = OUT_OF_MEMORY
        except KeyboardInterrupt:
            print("interrupted; what was finished is kept", file=sys.stderr)
            raise SystemExit(128 + signal.SIGINT) from None
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)

    return wrapped


def job_parser(description: str, checkpoint: bool = True) -> argparse.ArgumentParser:
    """A parser with the arguments that every job takes.

    `checkpoint` adds --epoch and --ckpt: the job reads a trained model.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    parser.add_argument(
        "--config", metavar="YAML", help="the experiment, such as config/DDPM_ddpm.yaml"
    )
    if checkpoint:
        parser.add_argument(
            "--epoch", type=int, default=-1, help="which model_<epoch>.pth; -1 is the newest"
        )
        parser.add_argument(
            "--ckpt", "--checkpoint", metavar="PATH", help="a checkpoint, instead of --epoch"
        )
    parser.add_argument("--data_dir", default="data", help="where the datasets are")
    parser.add_argument(
        "--skip_bad_images", action="store_true", help="leave out images that cannot be read"
    )
    parser.add_argument("--device", help="cuda, mps or cpu; default: cuda, else mps, else cpu")
    parser.add_argument("--use_amp", action="store_true", help="mixed precision (bf16 or fp16)")
    parser.add_argument("--seed", type=int, help="overrides the config's seed")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="overrides a value of the config, as in linear.timestep=21; may be repeated",
    )  # fmt: skip
    return parser


def overrides_of(args: argparse.Namespace) -> list[str]:
    """The --set values of the command line, and --seed as one of them."""
    return args.overrides + ([f"seed={args.seed}"] if args.seed is not None else [])


def config_of(args: argparse.Namespace) -> Config:
    """The config that the command line names. Raises UserError."""
    if args.config is None:
        raise UserError("no config: give --config config/DDPM_ddpm.yaml, or another one")
    return load_config(args.config, overrides_of(args))


def dataset_of(args: argparse.Namespace, config: Config, split: str) -> Dataset:
    """The "train" or "test" split of the config's dataset, from --data_dir. Raises UserError."""
    return load_dataset(config, args.data_dir, split, args.skip_bad_images)


def model_of(args: argparse.Namespace, device: torch.device) -> TrainedModel:
    """The trained model that the command line names, by --ckpt or by --config and --epoch.

    Raises UserError.
    """
    if args.ckpt is None:
        config = config_of(args)
        return load_denoiser(find(config.save_dir, args.epoch), device, config)
    config = None if args.config is None else config_of(args)
    return load_denoiser(Path(args.ckpt), device, config, overrides_of(args))
