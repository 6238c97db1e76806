"""Atomic saving and checked loading; the only place that rebuilds a model from disk.

A checkpoint is a dict of tensors and plain types, read with `weights_only=True`:
    config, net and ema (state dicts of the network), epoch (that of the last step), step,
    metrics, versions, data (what it was trained on, see `evaluation.data_record`; old ones have
    none); `latest.pth` also holds `resume`, what training needs to go on.
Beside them stands a checksum of all of it, checked when a file is read that has one.
`load_denoiser` also reads those of other projects and released weights: see
`foreign_checkpoints` and `released`.
"""

import contextlib
import hashlib
import pickle
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from config import Config, config_differences, parse_config
from config.identity import beside_weights, may_differ
from model.denoiser import Denoiser
from model.diffusers_checkpoints import config_of_pipeline, is_diffusers, read_pipeline
from model.foreign_checkpoints import adopted, is_foreign
from model.hub import fetched
from model.input_scale import INPUT_SCALES, RescaledDenoiser
from model.models import build_denoiser, first_misfit
from model.released import is_released, read_released
from support.checksum import checksum
from support.errors import UserError, reason_of
from support.files import DAMAGED, has_form, replacing
from utils import is_out_of_memory, seed_everything

DATA = {  # of `evaluation.data_record`
    "dataset": str, "images": int, "shape": [int], "classes": [str], "labels": str, "pixels": str,
}  # fmt: skip
PARTS = {  # of a checkpoint, and their types, or forms: see `has_form`
    "config": dict, "net": dict, "ema": dict, "epoch": int, "step": int, "metrics": dict,
    "versions": {str: str}, "resume": dict, "data": DATA,
}  # fmt: skip
RESUME = {"optimizer": dict, "scaler": dict, "window": dict, "use_amp": bool}
ABOUT = ("config", "step", "metrics", "versions", "data")
CHECKSUM = "checksum"  # beside the parts
FIT_ANEW = "delete it to fit from the start"
BEGIN_AGAIN = (
    "add --restart to begin anew, and --set load_epoch=<epoch> to begin from a model_<epoch>.pth"
)


@dataclass(frozen=True)
class TrainedModel:
    """A denoiser in eval mode on its device, and where it came from."""

    denoiser: Denoiser
    config: Config
    epoch: int
    path: Path
    input_scale: str | None = None  # of model/input_scale.py
    about: dict = field(default_factory=dict)  # those of ABOUT in the file

    @property
    def stage(self) -> str:
        """For titles: how far it is trained, or its name, where no run of ours trained it."""
        if self.epoch >= 0:
            return f"epoch {self.epoch}"
        return self.path.name or "untrained network"

    def fingerprint(self) -> str:
        """A short hash of all that decides the outputs: equal only for equal models."""
        return self.fingerprint_with(self.denoiser.net.state_dict())

    def fingerprint_with(self, weights: dict[str, Tensor]) -> str:
        """That of the same model with these weights."""
        return fingerprint(weights, (self.input_scale or "") + beside_weights(self.config))


def fingerprint(weights: dict[str, Tensor], beside: str = "") -> str:
    """16 hexadecimal digits, equal only for equal weights in equal order and what is beside."""
    digest = hashlib.sha256(beside.encode())
    for name, tensor in weights.items():
        digest.update(name.encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """The versions of the libraries that decide the numbers, for checkpoints and results, and
    "tiny-ddae", the commit of this code, where git knows it."""
    libraries = {name: version(name) for name in ("torch", "torchvision", "ema-pytorch")}
    return libraries | ({"tiny-ddae": commit()} if commit() else {})


@cache
def commit() -> str | None:
    """The commit of the code that runs, with "-dirty" where files were changed since."""
    command = ["git", "--git-dir", ".git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):  # no git, or a copy without its history
        return None
    return result.stdout.strip()


def save(path: Path, state: dict) -> None:
    """Writes `state` and its checksum beside `path`, flushes, then renames: all or nothing.

    The checksum takes 0.2 s of 0.6 for the 94 MB of the main network's latest.pth, on one core.
    Raises UserError if the disk is full or not writable; what was at `path` stays.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save({**state, CHECKSUM: checksum(state)}, file)
        except RuntimeError as error:  # torch wraps what the disk said
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load(path: Path) -> dict:
    """Reads a checkpoint onto the CPU. Raises UserError if it is missing, damaged or foreign."""
    return _ours(_read(path), path)


def load_latest(path: Path) -> dict:
    """`load` of a latest.pth. Raises UserError also if it lacks what training needs to go on."""
    found = _read(path, f": {BEGIN_AGAIN}")
    try:
        state = _ours(found, path)
    except UserError as error:
        raise UserError(f"{error}: {BEGIN_AGAIN}") from None
    resume = state.get("resume", {})
    for name, kind in RESUME.items():
        if not isinstance(resume.get(name), kind):
            raise UserError(
                f"{path}: training cannot go on from it, as it holds no {name}: {BEGIN_AGAIN}"
            )
    return state


def _ours(state: object, path: Path) -> dict:
    """`state` if this project wrote it and its parts fit together, its config with every default
    that it leaves out. Raises UserError if not."""
    if is_foreign(state):
        raise UserError(
            f"{path}: of another project: the jobs that evaluate a model read it, with --ckpt and "
            "--config, but training cannot start from it"
        )
    if not isinstance(state, dict) or not {"config", "ema", "net", "epoch"} <= set(state):
        raise UserError(f"{path}: not a checkpoint of this project (it has no config and weights)")
    for name, form in PARTS.items():
        if name in state and not has_form(state[name], form):
            kind = form if isinstance(form, type) else dict
            found = type(state[name]).__name__
            what = "of another form" if found == "dict" else f"a {found}, not a {kind.__name__}"
            raise UserError(f"{path}: damaged: its {name} is {what}")
    config = parse_config(state["config"], source=str(path))
    for part in ("net", "ema"):
        if found := first_misfit(state[part], config):
            raise UserError(f"{path}: its weights do not fit its own config ({part}: {found})")
    return {**state, "config": config.model_dump(mode="json")}


def _read(path: Path, advice: str = "") -> object:
    """What a file holds, on the CPU. Raises UserError if it is missing, dangerous, or damaged, then
    with the advice."""
    try:
        return _open(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint. {_those_in(path.parent)}") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: refused: it is not a plain checkpoint and could run code when read{advice}"
        ) from None
    except DAMAGED as error:
        damaged = f"damaged or truncated checkpoint ({reason_of(error)}){advice}"
        raise _unread(path, error, damaged) from None


def _unread(path: Path, error: Exception, damaged: str) -> UserError:
    """That a file is `damaged`, where its contents are what an error of reading is about; one of
    the disk or of memory may be gone the next time."""
    if isinstance(error, OSError) or is_out_of_memory(error):
        return UserError(f"{path}: could not be read now ({reason_of(error)}): try again")
    return UserError(f"{path}: {damaged}")


def _open(path: Path) -> object:
    """What a file holds, on the CPU, without its checksum. Raises ValueError if that is another,
    and what torch.load raises."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(state, dict) and CHECKSUM in state and state.pop(CHECKSUM) != checksum(state):
        raise ValueError("its contents have changed since it was saved: another checksum")
    return state


def load_state(path: Path) -> dict | None:
    """The state of an unfinished fit; None if there is none. Raises UserError if it is damaged."""
    try:
        return _open(path)
    except FileNotFoundError:
        return None
    except DAMAGED as error:
        raise _unread(path, error, f"damaged ({reason_of(error)}); {FIT_ANEW}") from None


@contextlib.contextmanager
def taking_over(path: Path, advice: str) -> Iterator[None]:
    """Around what goes on from the parts of a checkpoint: those that are missing or of another
    kind, as in a file without a checksum, become a UserError with the advice."""
    try:
        yield
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{path}: damaged: what is needed to go on is not in it ({reason_of(error)}): {advice}"
        ) from None


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
    path: str | Path, state: dict, config: Config, ignore: set[str], advice: str
) -> None:
    """Raises UserError with the differences if the checkpoint `state`, read from `path`, was
    trained with another config; `ignore` names the keys that may differ, as `config_differences`
    takes them."""
    inside = parse_config(state["config"], source=str(path))
    differences = config_differences(config, inside, ignore)
    if differences:
        lines = "\n  ".join(differences)
        raise UserError(f"{path} is of a run with another config:\n  {lines}\n{advice}")


def load_denoiser(
    path: str | Path,
    device: torch.device | str = "cpu",
    config: Config | None = None,
    overrides: list[str] = (),
    input_scale: str | None = None,
) -> TrainedModel:
    """The EMA denoiser of a checkpoint, or of a folder or file that export.py wrote, or that
    hf:owner/name holds. Without `config` the one inside it holds, overridden.

    `input_scale`, a row of INPUT_SCALES, is for foreign checkpoints. Raises UserError if there is
    no such file, if it is damaged or of something else, if `config` describes another network or
    process, or if a weight is not finite.
    """
    where = fetched(path)
    if is_diffusers(where):
        return _of_pipeline(where, Path(path), device, config, overrides, input_scale)
    state = read_released(where) if is_released(where) else _read(where)
    if is_foreign(state):
        state = adopted(state, Path(path), config, input_scale)
    state = _ours(state, Path(path))
    inside = state.get("input_scale")
    if inside not in (None, *INPUT_SCALES):
        raise UserError(f"{path}: damaged: its input_scale is {inside}")
    if input_scale not in (None, inside):
        raise UserError(f"--input_scale {input_scale}: {path} was trained here, on [-1, 1]")
    if config is None:
        config = parse_config(state["config"], overrides, source=str(path))
    advice = "use the config it was trained with, or --ckpt alone"
    refuse_other_config(path, state, config, may_differ(config), advice)
    for name, weight in state["ema"].items():
        if not weight.isfinite().all():
            raise UserError(
                f"{path}: its {name} is not finite (NaN or infinite): the training had failed "
                "before it was saved; take an earlier checkpoint"
            )
    denoiser = build_denoiser(config)
    denoiser.net.load_state_dict(state["ema"])
    if inside:
        denoiser = RescaledDenoiser(denoiser, *INPUT_SCALES[inside])
    denoiser.to(device).eval().requires_grad_(False)
    about = {key: state[key] for key in ABOUT if key in state}
    return TrainedModel(denoiser, config, state["epoch"], Path(path), inside, about)


def _of_pipeline(
    folder: Path,
    path: Path,
    device: torch.device | str,
    config: Config | None,
    overrides: list[str],
    input_scale: str | None,
) -> TrainedModel:
    """The model of a folder of diffusers, called epoch -1; `path` is its name. Raises UserError."""
    if input_scale:
        raise UserError(f"--input_scale {input_scale}: {path} was trained on [-1, 1]")
    net, facts = read_pipeline(folder)
    config = config_of_pipeline(facts, path, config, overrides)
    denoiser = build_denoiser(config, net).to(device).eval().requires_grad_(False)
    return TrainedModel(denoiser, config, -1, path)


def untrained(config: Config, device: torch.device, path: str | Path | None = None) -> TrainedModel:
    """The model with the random weights of the config's seed, called epoch -1.

    `path` is that of the checkpoint which the config comes from. A folder of diffusers needs it,
    since it alone says what the network is; a VAE in it keeps its weights, which make the images.
    Raises UserError if it cannot be read.
    """
    where, net = path and fetched(path), None
    if where and is_diffusers(where):
        net, _ = read_pipeline(where)
    seed_everything(config.seed, "init")
    if net:
        net.renew()
    denoiser = build_denoiser(config, net).to(device).eval().requires_grad_(False)
    return TrainedModel(denoiser, config, epoch=-1, path=Path())


def _those_in(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*.pth"))
    if not names:
        return f"{folder} holds none: run train.py first"
    return f"There are: {', '.join(names)}; --ckpt takes any of them"
