"""A long loop that survives a kill: when its state is saved, and how a signal ends it."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from support import distributed
from support.errors import Stopped
from support.lock import held

SAVE_EVERY_S = 60.0  # where a state is small and quickly written
SAME_SIGNAL_S = 1.0  # torchrun hands a Ctrl-C on to processes that the terminal has sent it already


class Resumable:
    """The file at `path` that a loop goes on from; write(path, state) writes it.

        with Resumable(path, checkpoint.save) as kept:
            for step in range(first, last):
                ...
                if kept.is_due(step + 1 == last):
                    kept.save(step + 1, {...})
                kept.stop_if_told(step + 1, last)

    Within the block SIGINT, SIGTERM and SIGHUP (a closed terminal) let the step in progress end:
    the state is then due, and `stop_if_told` raises Stopped. A second signal ends the block at once
    with KeyboardInterrupt. Only rank 0 writes; all ranks save and stop at the same step.

    Two processes never go on from one file at the same time: the block, and `alone` around it,
    hold the lock at `lock` (default: beside the file), and raise UserError where another has it.
    """

    def __init__(
        self,
        path: Path,
        write: Callable[[Path, dict], None],
        every_s: float = SAVE_EVERY_S,
        unit: str = "step",
        lock: Path | None = None,
    ):
        self.path, self.write, self.every_s, self.unit = path, write, every_s, unit
        self.lock = lock or path.with_name(f".{path.name}.lock")
        self.blocks = contextlib.ExitStack()
        self.saved_step: int | None = None  # that of the file, where this object knows it
        self.goes_on = "the same command goes on from there"
        self.saved_at = self.signalled_at = time.monotonic()
        self.own_signal = self.signal = 0  # what this rank was sent, and what all agree on
        self.handlers: dict[int, object] = {}  # those that were there before
        self.terminals: list[int] = []  # of standard output and error

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """A block in which no other process writes the file, as far as rank 0 can see."""
        if not distributed.is_main():
            return contextlib.nullcontext()
        return held(self.lock, str(self.path))

    def __enter__(self) -> "Resumable":
        self.blocks.enter_context(self.alone())
        self.saved_at = time.monotonic()
        self.terminals = [fd for fd in (1, 2) if os.isatty(fd)]
        for number in stopping_signals():
            self.handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.blocks.close()

    def is_due(self, at_once: bool = False) -> bool:
        """Whether to save after this step: `at_once`, or it is time, or a signal has come.

        All ranks have to call it at the same steps; they get the same answer.
        """
        due = at_once or self.seconds_since_save() >= self.every_s
        # one number for both questions: a signal counts more than the time
        agreed = distributed.max_over_ranks(2 * self.own_signal + due)
        self.signal = agreed // 2
        return agreed > 0

    def seconds_since_save(self) -> float:
        """Since the last `save`, or since the block began."""
        return time.monotonic() - self.saved_at

    def save(self, step: int, state: dict) -> None:
        """Writes the state after `step` steps."""
        if distributed.is_main():
            self.write(self.path, state)
        self.saved_step, self.saved_at = step, time.monotonic()

    def stop_if_told(self, step: int, last: int) -> None:
        """Raises Stopped if a signal had come when `is_due` was asked and work is left."""
        if self.signal and step < last:
            raise Stopped(
                f"stopped at {self.unit} {step:,} of {last:,} and saved {self.path}; "
                f"{self.goes_on}",
                self.signal,
            )

    def what_is_saved(self) -> str:
        """What `path` holds, for messages about a loop that cannot go on."""
        if self.saved_step is not None:
            return f"{self.path} holds {self.unit} {self.saved_step:,}"
        return f"{self.path} is {'of an earlier run' if self.path.exists() else 'not there yet'}"

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.own_signal and now - self.signalled_at > SAME_SIGNAL_S:
            raise KeyboardInterrupt
        if not self.own_signal:
            self.own_signal, self.signalled_at = number, now
        if number == getattr(signal, "SIGHUP", None):
            self._leave_terminal()
        elif distributed.is_main():
            words = f"finishing this {self.unit}, then saving; a second one ends at once"
            with contextlib.suppress(OSError):  # standard error may be closed
                # past Python's buffers, which this may have interrupted in the middle of a write
                os.write(2, f"\n{signal.Signals(number).name}: {words}\n".encode())

    def _leave_terminal(self) -> None:
        """From a closed terminal every write would be an error, and end the loop by it."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self.terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)


def stopping_signals() -> list[int]:
    """SIGINT, SIGTERM and SIGHUP, but those that are ignored: nohup, or `&` in a script, lets a job
    live on."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no value is infinite or not a number."""
    finite = [t.isfinite().all() for t in tensors if t.is_floating_point()]
    return not finite or bool(torch.stack(finite).all())
