"""Writing files so that a kill at any moment leaves the old one or the new one, never a half."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from support.errors import UserError


@contextlib.contextmanager
def replacing(path: str | Path, flush: bool = True) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to, and renames it at the end.

    `flush` also waits for the disk, so that the file survives a power cut.
    Raises UserError if the disk is full or not writable; what was at `path` stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if flush:
            _sync(temporary)
        os.replace(temporary, path)
        if flush and os.name == "posix":  # Windows cannot open a folder
            _sync(path.parent)
    except OSError as error:
        raise UserError(
            f"{path}: could not be written ({error.strerror or error}); what was there before is "
            "untouched. Free some space, or write elsewhere, and run the same command again"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # of the folder that could not be made
            temporary.unlink(missing_ok=True)


def write_json(path: str | Path, values: dict) -> None:
    """Writes `values` as indented JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> dict:
    """What `write_json` wrote. Raises UserError if it is damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: not valid JSON; delete it and run the command again") from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def short_hash(settings: object) -> str:
    """A name for settings of plain types: 12 hexadecimal digits."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
