"""Jobs as forks of one process that has imported PyTorch, so that none waits for that."""

import importlib
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.startup import FIRST_WORK

JOBS = tuple(FIRST_WORK)
LEFT_BY_KILLS = "ignore:resource_tracker:UserWarning"  # counts the locks of killed progress bars
NO_NETWORK = {"https_proxy": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}  # nothing listens there
SLOW_IMPORTS = ("torchvision", "matplotlib.pyplot", "sklearn", "torch.utils.tensorboard")


@dataclass(frozen=True)
class Ended:
    """How a job ended: its exit code, -9 for a SIGKILL, None if it was killed for hanging; and
    what it wrote to standard output and error."""

    code: int | None
    said: str

    @property
    def traceback(self) -> bool:
        """Whether it showed one."""
        return "Traceback (most recent call last)" in self.said


class Job:
    """A job that runs: `python <name>.py <words>`, its output in the file `log`.

    It leads a process group of its own: a signal reaches what it has started, too. `cwd` is the
    folder that it runs in, `memory` so many bytes that it may take.
    """

    def __init__(
        self,
        name: str,
        words: Sequence[str],
        log: Path,
        cwd: Path | None = None,
        memory: int | None = None,
    ):
        os.environ.setdefault("PYTHONWARNINGS", LEFT_BY_KILLS)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*SLOW_IMPORTS, *JOBS])  # once; later calls change nothing
        self.log = log
        self.process = context.Process(
            target=_run, args=(name, list(words), log.absolute(), cwd, memory)
        )
        self.process.start()

    def send(self, number: int) -> None:
        """The signal, to the whole group; nothing if it has ended."""
        with suppress(ProcessLookupError):
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:  # it has not come so far
                os.kill(self.process.pid, number)

    def wait(self, limit_s: float) -> Ended:
        """Its end; if it has not come after `limit_s` seconds, it is killed."""
        self.process.join(limit_s)
        hangs = self.process.exitcode is None
        end = self.kill()
        return Ended(None, end.said) if hangs else end

    def kill(self) -> Ended:
        """Ends it with SIGKILL, and what it may have left running."""
        self.send(signal.SIGKILL)
        self.process.join()
        said = self.log.read_text(errors="replace") if self.log.exists() else ""
        return Ended(self.process.exitcode, said)


def run_job(
    name: str,
    words: Sequence[str],
    log: Path,
    limit_s: float = 60,
    cwd: Path | None = None,
    memory: int | None = None,
) -> Ended:
    """`python <name>.py <words>` to its end, see `Job`."""
    return Job(name, words, log, cwd, memory).wait(limit_s)


def _run(name: str, words: list[str], log: Path, cwd: Path | None, memory: int | None) -> None:
    """In the fork: what `python <name>.py <words>` does."""
    os.setpgid(0, 0)
    os.environ.update(NO_NETWORK)
    if cwd is not None:
        os.chdir(cwd)
    if memory is not None:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + memory, held + memory))
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = [f"{name}.py", *words]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as it is in a process of its own
    sys.exit(importlib.import_module(name).main(words))
