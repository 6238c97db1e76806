"""Files of our own: written so that a kill leaves the old one or the new one, and read with care.

What is read back may be damaged, or of something else. `read_json` answers that with a UserError;
`load_array` and `load_json`, for what a job can do without, with a note and None.
"""

import contextlib
import hashlib
import json
import logging
import os
import pickle
import shutil
import struct
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from support.errors import UserError, reason_of

log = logging.getLogger("tiny-ddae")  # that of utils

# What NumPy's and PyTorch's readers were seen to raise for a file that is damaged, truncated, or
# of something else.
DAMAGED = (
    OSError, ValueError, LookupError, RuntimeError, EOFError, TypeError, AttributeError,
    SyntaxError, MemoryError, OverflowError, tokenize.TokenError, struct.error, zlib.error,
    zipfile.BadZipFile, pickle.UnpicklingError,
)  # fmt: skip


# --- writing


def check_writable(
    folders: Iterable[str | Path] = (), files: Iterable[str | Path | None] = ()
) -> None:
    """Raises UserError unless something can be written in all `folders` and to all `files`.

    Jobs ask before they begin to work. Of what is not there yet, the nearest folder above it is
    tried; nothing is left behind. None among the files stands for no file.
    """
    wanted = [(Path(folder), Path(folder)) for folder in folders]
    for path in (Path(file) for file in files if file is not None):
        if path.is_dir():
            raise UserError(f"{path}: a folder is there; name a file, such as {path / 'results'}")
        wanted.append((path, path.parent))
    for path, folder in wanted:
        try:
            reason = _refusal(folder)
        except (OSError, ValueError) as error:  # ValueError: a name with a null byte
            reason = reason_of(error)
        if reason is not None:
            raise UserError(f"{path}: nothing can be written there ({reason}): choose another")


def _refusal(folder: Path) -> str | None:
    """Why nothing can be written in `folder`, or None; it raises what the system does."""
    folder = Path(os.path.abspath(folder))
    for place in (folder, *folder.parents):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            place.lstat()
            break
    if not place.is_dir():
        return f"{place} is {'a link to nothing' if place.is_symlink() else 'no folder'}"
    with tempfile.TemporaryFile(dir=place):
        return None


@contextlib.contextmanager
def replacing(path: str | Path, flush: bool = True) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to, and renames it at the end.

    It also removes what earlier, killed processes left of their own attempts at `path`, and
    waits for the disk, so that the file survives a power cut; without `flush`, for files of
    which there are many, neither. Raises UserError if the disk is full or not writable; what was
    at `path` stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path, "what was there before is untouched. "):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if flush:
                remove_leftovers(path.parent, path.name)
            yield temporary
            if flush:
                _sync(temporary)
            os.replace(temporary, path)
            if flush and os.name == "posix":  # Windows cannot open a folder
                _sync(path.parent)
        finally:
            with contextlib.suppress(OSError):  # of the folder that could not be made
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: str | Path, kept: str = "") -> Iterator[None]:
    """Around what writes to `path`: the disk's refusal becomes a UserError. `kept`: a sentence on
    what is there."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: could not be written ({reason_of(error)}); {kept}"
            "Free some space, or write elsewhere, and run the same command again"
        ) from error


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes what killed processes left half-written in `folder`: .<name>.<pid>.tmp, of every
    name if None. Those of processes that live stay."""
    with os.scandir(folder) as entries:
        hidden = [entry.name for entry in entries if entry.name.startswith(".")]
    for found in hidden:
        of, _, pid = found[1:].removesuffix(".tmp").rpartition(".")
        if not found.endswith(".tmp") or not pid.isdecimal() or name not in (None, of):
            continue
        if int(pid) != os.getpid() and not _is_alive(int(pid)):
            _remove(folder / found)


def _is_alive(pid: int) -> bool:
    if os.name != "posix":  # on Windows the question would end the process
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):  # another process is as welcome to remove it
            path.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- arrays


def save_array(path: str | Path, array: np.ndarray | dict[str, np.ndarray]) -> None:
    """Writes one array as .npy, or {name: array} as .npz, atomically.

    Raises UserError if the disk is full or not writable.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        if isinstance(array, dict):
            np.savez(file, **array)
        else:
            np.save(file, array)


def load_array(
    path: str | Path, fits: Callable[..., bool]
) -> np.ndarray | dict[str, np.ndarray] | None:
    """What `save_array` kept at `path`: an array, memory-mapped and read-only, or {name: array}.

    None where nothing is; None too, with a note, where the file is damaged or `fits`, of what it
    holds, is false: it is of another time, or of other settings.
    """
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(found, np.ndarray):
            with found as arrays:
                found = dict(arrays)
        whole = fits(found)
    except FileNotFoundError:
        return None
    except DAMAGED:
        whole = False
    return found if whole else _left_aside(path)


def _left_aside(path: str | Path) -> None:
    log.warning("%s is damaged, or of something else, and is left aside", path)


# --- text and JSON


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, values: dict) -> None:
    """Writes `values` as indented JSON, atomically."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def read_json(
    path: str | Path, form: object = dict, advice: str = "delete it and run the command again"
) -> dict:
    """What `write_json` wrote. Raises UserError, with the advice, if it is not there, damaged, or
    not of `form`: see `has_form`."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: could not be read ({reason_of(error)})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON; {advice}") from None
    if not has_form(values, form):
        raise UserError(f"{path}: not what this program writes there; {advice}")
    return values


def load_json(path: str | Path, form: object = dict) -> dict | None:
    """Like `read_json` for what a job can do without: None where nothing is, and, with a note,
    where it is damaged or not of `form`."""
    if not os.path.lexists(path):
        return None
    try:
        return read_json(path, form)
    except UserError:
        return _left_aside(path)


def has_form(values: object, form: object) -> bool:
    """Whether `values`, read from JSON, are of `form`.

    A form is a type or a union of types; a list of one form, that of every entry; a tuple of
    forms, of which one fits; or a dict {name: form} of names that must be there, where the name
    `str` stands for every name.
    """
    if isinstance(form, tuple):
        return any(has_form(values, one) for one in form)
    if isinstance(form, list):
        return isinstance(values, list) and all(has_form(value, form[0]) for value in values)
    if not isinstance(form, dict):
        return isinstance(values, form)
    if not isinstance(values, dict):
        return False
    if str in form:
        return all(has_form(value, form[str]) for value in values.values())
    return all(name in values and has_form(values[name], form[name]) for name in form)


def short_hash(settings: object) -> str:
    """A name for settings of plain types: 12 hexadecimal digits."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
