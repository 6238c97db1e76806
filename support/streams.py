"""Standard output and error that outlive their readers."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

GONE = {errno.EPIPE, errno.EIO, errno.EBADF}  # a pipe's reader, a terminal, a closed descriptor


class Lasting:
    """A stream that drops what nobody can read any more, so that no work ends at a `print`.

    A character that the stream's encoding lacks is written as "?". A full disk still raises
    OSError.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        """Writes `text`, or drops it if the reader has gone. Returns its length."""
        with self._dropped_if_gone():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes, or drops what waits if the reader has gone."""
        with self._dropped_if_gone():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _dropped_if_gone(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in GONE:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # also for what the exit still flushes
            os.close(nowhere)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Makes `sys.stdout` and `sys.stderr` `Lasting` inside."""
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        out, err = (Lasting(stream or nowhere) for stream in (sys.stdout, sys.stderr))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            yield
        finally:
            out.flush()
            err.flush()
