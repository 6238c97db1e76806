"""Atomic saving and checked loading; the only place that rebuilds a model from disk.

A checkpoint is a dict of tensors and plain types, read with `weights_only=True`:
    config, net and ema (state dicts of the network), epoch (that of the last step), step,
    metrics, versions; `latest.pth` also holds `resume`, what training needs to go on.
`load_denoiser` also reads those of other projects: see `foreign_checkpoints`.
"""

import hashlib
import pickle
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from config import Config, config_differences, parse_config
from model.denoiser import Denoiser
from model.foreign_checkpoints import adopted, is_foreign
from model.input_scale import INPUT_SCALES, RescaledDenoiser
from model.models import build_denoiser
from support.errors import UserError
from support.files import DAMAGED, replacing
from utils import seed_everything

MODEL_KEYS = (
    "model_type",
    "net_type",
    "diffusion",
    "network",
    "cond_drop_prob",
)  # what decides the weights' meaning


@dataclass(frozen=True)
class TrainedModel:
    """A denoiser in eval mode on its device, and where it came from."""

    denoiser: Denoiser
    config: Config
    epoch: int
    path: Path
    input_scale: str | None = None  # of model/input_scale.py

    def fingerprint(self) -> str:
        """A short hash of the weights and of what they are fed: equal only for equal models."""
        digest = hashlib.sha256((self.input_scale or "").encode())
        for name, tensor in self.denoiser.net.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """The versions of the libraries that decide the numbers, for checkpoints and results."""
    return {name: version(name) for name in ("torch", "torchvision", "ema-pytorch")}


def save(path: Path, state: dict) -> None:
    """Writes `state` beside `path`, flushes it to the disk, then renames: all or nothing.

    Raises UserError if the disk is full or not writable; what was at `path` stays.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch wraps what the disk said
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load(path: Path) -> dict:
    """Reads a checkpoint onto the CPU. Raises UserError if it is missing, damaged or foreign."""
    return _ours(_read(path), path)


def _ours(state: object, path: Path) -> dict:
    """`state` if this project wrote it. Raises UserError if not."""
    if is_foreign(state):
        raise UserError(
            f"{path}: of another project: the jobs that evaluate a model read it, with --ckpt and "
            "--config, but training cannot start from it"
        )
    if not isinstance(state, dict) or not {"config", "ema", "net", "epoch"} <= set(state):
        raise UserError(f"{path}: not a checkpoint of this project (it has no config and weights)")
    return state


def _read(path: Path) -> object:
    """What a file holds, on the CPU. Raises UserError if it is missing, damaged or dangerous."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint. {_those_in(path.parent)}") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: refused: it is not a plain checkpoint and could run code when read"
        ) from None
    except DAMAGED as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: damaged or truncated checkpoint ({reason})") from None


def load_state(path: Path) -> dict | None:
    """The state of an unfinished fit; None if there is none. Raises UserError if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except DAMAGED:
        raise UserError(f"{path}: damaged; delete it to fit from the start") from None


def find(save_dir: str | Path, epoch: int = -1) -> Path:
    """The path of model_<epoch>.pth; -1 is the newest. Raises UserError that lists those there."""
    folder = Path(save_dir) / "ckpts"
    if epoch >= 0:
        path = folder / f"model_{epoch}.pth"
        if not path.is_file():
            raise UserError(f"{path}: no such checkpoint. {_those_in(folder)}")
        return path
    epochs = saved_epochs(save_dir)
    if not epochs:
        raise UserError(f"no model_<epoch>.pth in {folder}. {_those_in(folder)}")
    return folder / f"model_{epochs[-1]}.pth"


def saved_epochs(save_dir: str | Path) -> list[int]:
    """The epochs of the model_<epoch>.pth in a run's folder, ascending."""
    paths = (Path(save_dir) / "ckpts").glob("model_*.pth")
    matches = (re.fullmatch(r"model_(\d+)\.pth", path.name) for path in paths)
    return sorted(int(match[1]) for match in matches if match)


def refuse_other_config(
    path: Path, state: dict, config: Config, ignore: set[str], advice: str
) -> None:
    """Raises UserError with the differences if the checkpoint `state`, read from `path`, was
    trained with another config; `ignore` names the top-level keys that may differ."""
    inside = parse_config(state["config"], source=str(path))
    differences = config_differences(config, inside, ignore)
    if differences:
        lines = "\n  ".join(differences)
        raise UserError(f"{path} is of a run with another config:\n  {lines}\n{advice}")


def load_denoiser(
    path: Path,
    device: torch.device,
    config: Config | None = None,
    overrides: list[str] = (),
    input_scale: str | None = None,
) -> TrainedModel:
    """The EMA denoiser of a checkpoint. Without `config` the one inside it holds, overridden.

    `input_scale`, a row of INPUT_SCALES, is for foreign checkpoints. Raises UserError if `config`
    describes another network or process than the checkpoint.
    """
    state = _read(path)
    if is_foreign(state):
        state = adopted(state, path, config, input_scale)
    elif input_scale:
        raise UserError(f"--input_scale {input_scale}: {path} was trained here, on [-1, 1]")
    state = _ours(state, path)
    if config is None:
        config = parse_config(state["config"], overrides, source=str(path))
    refuse_other_config(
        path, state, config, set(Config.model_fields) - set(MODEL_KEYS),
        "use the config it was trained with, or --ckpt alone",
    )  # fmt: skip
    denoiser = build_denoiser(config)
    try:
        denoiser.net.load_state_dict(state["ema"])
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{path}: its weights do not fit its own config ({reason})") from None
    if input_scale:
        denoiser = RescaledDenoiser(denoiser, *INPUT_SCALES[input_scale])
    denoiser.to(device).eval().requires_grad_(False)
    return TrainedModel(denoiser, config, int(state["epoch"]), Path(path), input_scale)


def untrained(config: Config, device: torch.device) -> TrainedModel:
    """The model with the weights that training begins with, called epoch -1."""
    seed_everything(config.seed, "init")
    denoiser = build_denoiser(config).to(device).eval().requires_grad_(False)
    return TrainedModel(denoiser, config, epoch=-1, path=Path())


def _those_in(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*.pth"))
    return f"There are: {', '.join(names)}" if names else f"{folder} holds none: run train.py first"
