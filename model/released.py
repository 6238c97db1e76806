"""Released weights: a folder with model.safetensors and config.json, as on the Hugging Face Hub.

model.safetensors holds the EMA weights alone, by their names in the network. config.json holds
what a checkpoint says beside them, the dtype, and the SHA-256 of model.safetensors, which is
checked when it is read.
"""

import hashlib
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from support.errors import UserError, reason_of
from support.files import read_json, replacing, write_json

WEIGHTS, DESCRIPTION = "model.safetensors", "config.json"
FORMAT, FORMAT_VERSION = "tiny-ddae", 1
DTYPES = {"float16": torch.float16, "float32": torch.float32}
REQUIRED = {"config": dict, "epoch": int, "sha256": str}  # of config.json, with their types


def is_released(path: str | Path) -> bool:
    """Whether `path` is a folder or a .safetensors file, so not a checkpoint."""
    return str(path).endswith(".safetensors") or Path(path).is_dir()


def rounded(weights: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """`weights` on the CPU in one of DTYPES. Raises UserError if one is too large for it."""
    result = {k: v.detach().to("cpu", DTYPES[dtype]).contiguous() for k, v in weights.items()}
    for name, tensor in result.items():
        if not tensor.isfinite().all():
            raise UserError(f"{name} is too large for {dtype}: take --dtype float32")
    return result


def write_released(folder: Path, weights: dict[str, Tensor], about: dict, dtype: str) -> dict:
    """Writes both files: `weights` in `dtype`, one of DTYPES, and `about` (plain types, with
    config and epoch). Returns what config.json holds.

    Raises UserError if the folder cannot be written, or if a weight is too large for `dtype`.
    """
    data = safetensors.torch.save(rounded(weights, dtype), metadata={"format": "pt"})
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **about,
        "dtype": dtype,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    write_json(folder / DESCRIPTION, description)  # first: it tells a release from other files
    with replacing(folder / WEIGHTS) as temporary:
        temporary.write_bytes(data)
    return description


def read_released(path: str | Path) -> dict:
    """The release at `path` (see `is_released`) as if it were a checkpoint of this project: with
    config, epoch, and its weights as net and ema, on the CPU.

    Raises UserError if it is not there, damaged, or of something else.
    """
    folder = Path(path)
    file = folder / WEIGHTS
    if folder.suffix == ".safetensors" and not folder.is_dir():
        folder, file = folder.parent, folder
    if not file.exists() and not (folder / DESCRIPTION).exists():
        raise UserError(_nothing_in(folder, file))
    description = read_description(folder)
    data = _bytes_of(file)
    if hashlib.sha256(data).hexdigest() != description["sha256"]:
        raise UserError(
            f"{file}: damaged, or of another export: its SHA-256 is not that in "
            f"{folder / DESCRIPTION}; fetch or export both again"
        )
    try:
        weights = safetensors.torch.load(data)
    except (SafetensorError, LookupError, ValueError, TypeError) as error:
        raise UserError(f"{file}: not a file of safetensors ({error})") from None
    return {**description, "net": weights, "ema": weights}


def read_description(folder: Path) -> dict:
    """The config.json of a release. Raises UserError if it is missing or of something else."""
    path = folder / DESCRIPTION
    if not path.exists():
        raise UserError(_no_file(path))
    again = "fetch or export it again"
    found = read_json(path, advice=again)
    if found.get("format") != FORMAT:
        raise UserError(f"{path}: of something else than an export of this project")
    if found.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: of format version {found.get('format_version')}, this reads "
            f"{FORMAT_VERSION}: update this repository"
        )
    return read_json(path, REQUIRED, again)


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(_no_file(path)) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)})") from None


def _no_file(path: Path) -> str:
    return f"{path}: no such file; a release is a folder with both {WEIGHTS} and {DESCRIPTION}"


def _nothing_in(folder: Path, file: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder"
    checkpoints = sorted(folder.glob("ckpts/*.pth")) or sorted(folder.glob("*.pth"))
    there = f"a file, such as --ckpt {checkpoints[-1]}" if checkpoints else "a folder of export.py"
    return f"{folder}: no {file.name} and no {DESCRIPTION} in it: give {there}"
