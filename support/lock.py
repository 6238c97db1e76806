"""One process at a time: a lock that ends with its process, however that ends."""

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from support.errors import UserError
from support.files import writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

log = logging.getLogger("tiny-ddae")  # that of utils

CANNOT = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}  # some network drives
_held: dict[Path, int] = {}  # the locks of this process, and their open files


@contextlib.contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Holds the lock `path`, a file that is made for it and removed after it.

    The system holds it for the process and frees it when that ends: a kill leaves at most the
    file, which says nothing. In a process that has it already, nothing happens. Raises UserError
    while another process has it; `what` names, in the message, what that writes. Where the system
    has no such locks, a note says so.
    """
    path = Path(os.path.abspath(path))
    if path in _held:
        yield
        return
    if fcntl is None:
        log.info("note: without file locks here, nothing stops a second run in %s", path.parent)
        yield
        return
    _held[path] = _taken(path, what)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone
            path.unlink()
        os.close(_held.pop(path))


def _taken(path: Path, what: str) -> int:
    """The open file, locked. Raises UserError while another process has it."""
    while True:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 200).decode(errors="replace") or "unknown"
            os.close(descriptor)
            raise UserError(
                f"{what}: another process ({owner}) is writing it: wait until that has ended, stop "
                "it, or write elsewhere"
            ) from None
        except OSError as error:
            if error.errno not in CANNOT:
                raise
            log.info("note: %s has no file locks: nothing stops a second run there", path.parent)
        if _is_still(path, descriptor):
            with contextlib.suppress(OSError):  # a full disk: only the words are missing
                os.truncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode())
            return descriptor
        os.close(descriptor)  # who had it has removed the file meanwhile


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
