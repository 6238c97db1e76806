"""What differs between the folders of two runs that should have done the same."""

import csv
import json
import math
import re
from pathlib import Path

import torch

from support.files import DAMAGED

MEASURED = re.compile(  # of the machine, and of how often a job was called: not of the run
    "seconds.*|.*_per_s|ms_per_image|peak_memory_mb|versions|drawn_in_last_call|checksum"
)  # the checksum is of all in a checkpoint, seconds too
NOT_COMPARED = {"tensorboard", "runs"}  # folders of event files, named by the time they began
TIME = re.compile(r"\d[\d.,]* (s|min|h)\b")


def half_written(folder: Path) -> list[str]:
    """The files and folders that are being written in `folder`, or were when a kill came."""
    return [str(path.relative_to(folder)) for path in folder.rglob(".*.tmp")]


def differences(expected: Path, found: Path) -> list[str]:
    """One line for each file that is missing, of nothing expected, or not the same.

    Tensors, arrays and pictures have to be the same bit for bit, JSON and CSV in all but what was
    measured of the machine, texts in all but times.
    """
    theirs, ours = files_of(expected), files_of(found)
    lines = [f"missing: {name}" for name in sorted(theirs - ours)]
    lines += [f"left behind: {name}" for name in sorted(ours - theirs)]
    for name in sorted(theirs & ours):
        lines += [f"{name}: {what}" for what in _differs(expected / name, found / name)]
    return lines


def files_of(folder: Path) -> set[str]:
    """The names of what is compared."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in paths if not NOT_COMPARED & {*path.parts}}


def _differs(expected: Path, found: Path) -> list[str]:
    """In what; empty if they are the same."""
    read = READERS.get(expected.suffix, Path.read_bytes)
    try:
        pair = read(expected), read(found)
    except DAMAGED as error:
        return [f"cannot be read ({type(error).__name__}: {error})"]
    return [] if same(*pair) else ["differs"]


def same(a: object, b: object) -> bool:
    """Whether two values that were read from files are equal, in all but what is MEASURED."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        names, others = (
            {name for name in values if not MEASURED.fullmatch(str(name))} for values in (a, b)
        )
        return names == others and all(same(a[name], b[name]) for name in names)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and _bits(a) == _bits(b)
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    return a == b


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


# --- readers: what of a file counts


def _checkpoint(path: Path) -> object:
    return torch.load(path, map_location="cpu", weights_only=True)


def _json(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8"))


def _json_lines(path: Path) -> list:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _table(path: Path) -> list:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _text(path: Path) -> str:
    return TIME.sub("TIME", path.read_text(encoding="utf-8"))


READERS = {
    ".pth": _checkpoint, ".json": _json, ".jsonl": _json_lines, ".csv": _table, ".md": _text,
    ".txt": _text,
}  # fmt: skip
