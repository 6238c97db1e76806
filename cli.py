"""What every job's command line shares: its arguments, and how a user's mistake is answered."""

import argparse
import functools
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import torch

from arguments import Exclusion, JobParser, int_from, int_list
from checkpoint import TrainedModel, find, load_denoiser, untrained
from config import Config, load_config
from datasets import SPLITS, Dataset, canonical_name, read_dataset, stratified
from evaluation.data_record import note_other_data
from evaluation.encoded import encoded
from model.denoiser import Denoiser
from model.input_scale import INPUT_SCALES
from model.samplers import SAMPLERS, SPACINGS
from sampling import SamplerSettings, sampler_settings
from support import distributed
from support.allocator import keep_freed_memory
from support.errors import Stopped, UserError
from support.streams import lasting_output
from utils import compile_network, is_out_of_memory, setup_logging

OUT_OF_MEMORY = (
    "the GPU ran out of memory: lower batch_size (--set batch_size=..., --batch_size in "
    "sampling and probing), add --use_amp, or use --device cpu"
)
OUT_OF_HOST_MEMORY = (
    "not enough memory: lower batch_size (--set batch_size=..., --batch_size in sampling and "
    "probing), or choose a smaller network"
)


def job(main: Callable[[list[str] | None], int]) -> Callable[..., int]:
    """Decorates a job's `main(argv=None)`: a UserError ends it with its message and exit code 2.

    Of several processes only rank 0 prints. An error that all of them meet is printed once. Any
    other exception ends its process with a traceback, and torchrun then ends the others. The job
    goes on if its output is closed: see `support.streams`.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        with lasting_output():
            return ended(argv)

    def ended(argv: list[str] | None) -> int:
        distributed.start()
        setup_logging()
        keep_freed_memory()
        try:
            with distributed.only_main_prints():
                result = main(argv)
        except UserError as error:
            message, code = f"error: {error}", 2
        except torch.OutOfMemoryError:
            message, code = f"error: {OUT_OF_MEMORY}", 2
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            message, code = f"error: {OUT_OF_HOST_MEMORY}", 2
        except Stopped as stop:
            message, code = str(stop), 128 + stop.signal
        except KeyboardInterrupt:
            message, code = "interrupted; what was finished is kept", 128 + signal.SIGINT
        else:
            distributed.stop()  # not after an error: it may wait for a rank that has failed
            return result
        if distributed.is_first_to_say(message):
            print(message, file=sys.stderr)
        raise SystemExit(code)

    return wrapped


ALWAYS_EXCLUDED = (
    Exclusion("config", ("dataset",), "either names a config"),
    Exclusion("ckpt", ("epoch",), "either names the checkpoint"),
)


def job_parser(
    description: str,
    checkpoint: bool = True,
    device: bool = True,
    amp: bool = True,
    compiles: bool = False,
    excludes: Collection[Exclusion] = (),
) -> argparse.ArgumentParser:
    """A parser with the arguments that every job takes.

    checkpoint: the job reads a trained model, and takes --epoch and --ckpt.
    device: the job computes with a network, and takes --device and, with `amp`, --use_amp.
    compiles: the job takes --compile.
    """
    parser = JobParser(description, (*ALWAYS_EXCLUDED, *excludes))
    parser.add_argument(
        "--config", metavar="YAML", help="the experiment, such as config/DDPM_ddpm.yaml"
    )
    parser.add_argument(
        "--dataset", metavar="NAME", help="instead of --config: the one in config/ for this dataset"
    )
    if checkpoint:
        parser.add_argument(
            "--epoch", type=int_from(-1), default=-1,
            help="which model_<epoch>.pth; -1 is the newest",
        )  # fmt: skip
        parser.add_argument(
            "--ckpt", "--checkpoint", metavar="PATH",
            help="a checkpoint, instead of --epoch, or what export.py wrote: a folder, a "
            ".safetensors, hf:owner/name; one of FutureXiang/ddae or the public tiny-ddae needs "
            "--config too",
        )  # fmt: skip
        parser.add_argument(
            "--input_scale", choices=list(INPUT_SCALES),
            help="what a foreign checkpoint was trained on, if not [-1, 1]; tiny-ddae: [-3, 1]",
        )  # fmt: skip
    parser.add_argument("--data_dir", default="data", help="where the datasets are")
    parser.add_argument(
        "--skip_bad_images", action="store_true", help="leave out images that cannot be read"
    )
    if device:
        parser.add_argument("--device", help="cuda, mps or cpu; default: cuda, else mps, else cpu")
    if device and amp:
        parser.add_argument("--use_amp", action="store_true", help="mixed precision (bf16 or fp16)")
    if compiles:
        parser.add_argument(
            "--compile", action="store_true",
            help="torch.compile the network: minutes at the start, then faster on a GPU",
        )  # fmt: skip
    parser.add_argument("--seed", type=int, help="overrides the config's seed")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="overrides a value of the config, as in linear.timestep=21; may be repeated",
    )  # fmt: skip
    return parser


def add_output_dir(parser: argparse.ArgumentParser) -> None:
    """Adds --output_dir; `results_folder` reads it."""
    parser.add_argument("--output_dir", help="where the results go (default: the run's save_dir)")


def results_folder(args: argparse.Namespace, config: Config) -> Path:
    """Where the results go: --output_dir, else the run's folder."""
    return Path(args.output_dir or config.save_dir)


def one_cell(args: argparse.Namespace, config: Config) -> tuple[int, str]:
    """(timestep, block): --timestep and --blockname, else those of the config's `linear`."""
    t, block = (vars(args).get(name) for name in ("timestep", "blockname"))
    return config.linear.timestep if t is None else t, block or config.linear.blockname


def one_process(name: str) -> None:
    """Raises UserError under torchrun."""
    if distributed.world_size() > 1:
        raise UserError(f"{name} is one process: start it with python, not torchrun")


def add_sampler_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --sampler and its settings; `chosen_sampler` reads them."""
    group = parser.add_argument_group("sampler")
    group.add_argument(
        "--sampler", "--mode", type=str.lower, choices=list(SAMPLERS),
        help="default: the process's own, ddim for DDPM and heun for EDM",
    )  # fmt: skip
    group.add_argument(
        "--steps", type=int, help="default: the process's own (100 for DDPM, 18 for EDM); ddpm: all"
    )
    group.add_argument(
        "--eta", type=float,
        help="noise, from 0 (default, deterministic) to 1: ancestral for ddim, full churn for heun",
    )  # fmt: skip
    group.add_argument(
        "--spacing", choices=list(SPACINGS),
        help="of the noise levels; default: the process's own, leading for DDPM, karras for EDM",
    )  # fmt: skip
    group.add_argument(
        "--sigma_max", type=float, metavar="S",
        help="noise level to start at, with --spacing trailing, karras or log_snr; default: the "
        "process's highest, which networks that trained little on it cannot denoise",
    )  # fmt: skip
    group.add_argument("--no_clip", action="store_true", help="do not clip x0 to [-1, 1]")
    group.add_argument(
        "--guidance", type=float, metavar="W",
        help="of a class-conditional network: 0 ignores the class, 1 (default) follows it, more "
        "exaggerates it",
    )  # fmt: skip
    group.add_argument(
        "--classes", type=int_list, metavar="C,C",
        help="of a class-conditional network: image i is of the (i mod k)-th of these k (default: "
        "all)",
    )  # fmt: skip


def sampler_arguments_given(args: argparse.Namespace) -> list[str]:
    """The options of `add_sampler_arguments` that were typed, such as ["--sampler", "--steps"]."""
    names = ("sampler", "steps", "eta", "spacing", "sigma_max", "guidance", "classes")
    given = [f"--{name}" for name in names if getattr(args, name) is not None]
    return given + (["--no_clip"] if args.no_clip else [])


def chosen_sampler(args: argparse.Namespace, denoiser: Denoiser) -> SamplerSettings:
    """The settings that the arguments of `add_sampler_arguments` name.

    Raises UserError for what the sampler or the network cannot do.
    """
    return sampler_settings(
        denoiser, args.sampler, args.steps, args.eta, args.spacing, args.sigma_max,
        not args.no_clip, args.guidance, args.classes,
    )  # fmt: skip


def overrides_and_seed(args: argparse.Namespace) -> list[str]:
    """The --set values of the command line, and --seed as one of them."""
    return args.overrides + ([f"seed={args.seed}"] if args.seed is not None else [])


def set_options(settings: Iterable[str]) -> list[str]:
    """These key=value as words of a command, each after a --set."""
    return [word for setting in settings for word in ("--set", setting)]


def job_words(args: argparse.Namespace, config: str, settings: Iterable[str]) -> list[str]:
    """The words that hand on to another job what this one was given: the config, data, device,
    precision, what to do about bad images, and `settings`, as after --set."""
    words = ["--config", config, "--data_dir", args.data_dir]
    words += ["--device", args.device] if args.device else []
    words += [f"--{name}" for name in ("use_amp", "skip_bad_images") if vars(args).get(name)]
    return words + set_options(settings)


def config_path(args: argparse.Namespace) -> Path:
    """The YAML that the command line names. Raises UserError if it names none."""
    if args.dataset:
        return find_config(args.dataset)
    if args.config is None:
        raise UserError("no config: give --config config/DDPM_ddpm.yaml, or another one")
    return Path(args.config)


def pick_config(args: argparse.Namespace) -> Config:
    """The config that the command line names, or the one inside --ckpt."""
    if vars(args).get("ckpt") is not None:
        return _loaded(args, torch.device("cpu")).config
    return load_config(config_path(args), overrides_and_seed(args))


def find_config(dataset: str) -> Path:
    """The first file in config/ that is for this dataset. Raises UserError if there is none."""
    name = canonical_name(dataset)
    folder = Path(os.path.relpath(Path(__file__).parent / "config"))
    for path in sorted(folder.glob("*.yaml")):
        if load_config(path).dataset == name:
            return path
    raise UserError(f"--dataset {dataset}: no config for it in {folder}: give --config")


def load_dataset(
    args: argparse.Namespace, config: Config, split: str, model: TrainedModel | None = None
) -> Dataset:
    """The "train" or "test" split of the config's dataset, from --data_dir; with a model, its
    images as that sees them, see `encoded`, and a note if it was trained on others."""
    with distributed.main_first():  # it downloads, and keeps what it has decoded
        dataset = read_dataset(config, args.data_dir, split, args.skip_bad_images)
    if model is None:
        return dataset
    note_other_data(model, dataset)
    return encoded(dataset, model.denoiser, Path(config.save_dir) / "features")


def load_datasets(
    args: argparse.Namespace, config: Config, model: TrainedModel | None = None
) -> tuple[Dataset, Dataset]:
    """Train, or with --n_train so many images of it, the classes in proportion, and test: see
    `load_dataset`."""
    train, test = (load_dataset(args, config, split, model) for split in SPLITS)
    return stratified(train, vars(args).get("n_train"), config.seed), test


def load_model(args: argparse.Namespace, device: torch.device) -> TrainedModel:
    """The trained model that the command line names, by --ckpt or by --config and --epoch."""
    return _compiled(_loaded(args, device), args, device)


def _loaded(args: argparse.Namespace, device: torch.device) -> TrainedModel:
    if args.ckpt is None:
        config = pick_config(args)
        path = find(config.save_dir, args.epoch)
    else:
        named = args.config or args.dataset
        config = load_config(config_path(args), overrides_and_seed(args)) if named else None
        path = args.ckpt
    return load_denoiser(path, device, config, overrides_and_seed(args), args.input_scale)


def load_untrained(args: argparse.Namespace, device: torch.device) -> TrainedModel:
    """The model that the command line names, by --ckpt or by --config, with random weights."""
    return _compiled(untrained(pick_config(args), device, args.ckpt), args, device)


def _compiled(model: TrainedModel, args: argparse.Namespace, device: torch.device) -> TrainedModel:
    if vars(args).get("compile"):
        compile_network(model.denoiser.net, device)
    return model
