"""A run's log: TensorBoard, and `metrics.jsonl` with one JSON object per line."""

import contextlib
import csv
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from support import distributed
from support.errors import UserError, reason_of
from support.files import has_form, replacing, write_text, writing
from utils import log

LINE = {"kind": str, "step": int, "epoch": int}  # and what was measured


class RunLog:
    """Appends to <save_dir>/metrics.jsonl and <save_dir>/tensorboard.

    epoch, step: those that the checkpoint names which the run goes on from. The last lines, back to
    these, are dropped: they belong to work that was lost and is done again. The steps alone do not
    tell: in epochs before a `load_epoch` they may have been longer or shorter ones. Damaged lines,
    as a power cut leaves them, are dropped with a note. Of several processes rank 0 writes for all.
    Raises UserError if the files cannot be written.
    """

    def __init__(self, save_dir: Path, epoch: int, step: int):
        self.path = save_dir / "metrics.jsonl"
        self.writes = distributed.is_main()
        if not self.writes:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        kept = self.lines()
        while kept and (kept[-1]["epoch"], kept[-1]["step"]) > (epoch, step):
            kept.pop()
        write_text(self.path, "".join(map(_as_text, kept)))
        with writing(self.path):
            self.file = self.path.open("a", encoding="utf-8")
        self.events = save_dir / "tensorboard"
        with writing(self.events):
            self.board = SummaryWriter(str(self.events), purge_step=step + 1)

    def lines(self) -> list[dict]:
        """Those of the whole run, also of before it was resumed; on rank 0 alone.

        A last one that a kill has cut is left out; so are damaged ones, with a note.
        """
        if not self.path.exists():
            return []
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"{self.path}: could not be read ({reason_of(error)})") from None
        whole = text[: text.rfind("\n") + 1].splitlines()
        found = [line for line in map(_parsed, whole) if line is not None]
        if len(found) < len(whole):
            log.warning("%s: %d damaged lines left out", self.path, len(whole) - len(found))
        return found

    def write(self, kind: str, step: int, values: dict) -> None:
        """One line {"kind": kind, "step": step, **values}, `epoch` among the values; numbers and
        lists also go to TensorBoard, as `kind/name`."""
        if not self.writes:
            return
        with writing(self.path):
            self.file.write(_as_text({"kind": kind, "step": step, **values}))
            self.file.flush()
        with writing(self.events), _said_once():
            for name, value in flat(values).items():
                if isinstance(value, int | float):
                    self.board.add_scalar(f"{kind}/{name}", value, step)
            self.board.flush()

    def image(self, name: str, step: int, image: np.ndarray) -> None:
        """image: (C, H, W) uint8."""
        if self.writes:
            with writing(self.events), _said_once():
                self.board.add_image(name, image, step)
                self.board.flush()

    def write_csv(self) -> None:
        """Writes metrics.csv, the lines of metrics.jsonl with a column per value, empty where
        there is none."""
        if not self.writes:
            return
        rows = [flat(line) for line in self.lines()]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        with (
            replacing(self.path.with_suffix(".csv")) as temporary,
            temporary.open("w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    def close(self) -> None:
        """Closes both files; nothing can be written after it."""
        if self.writes:
            with writing(self.path):
                self.file.close()
            with writing(self.events), _said_once():
                self.board.close()


@contextlib.contextmanager
def _said_once() -> Iterator[None]:
    """TensorBoard writes in a thread of its own, which shows a traceback of what it cannot write;
    `flush` then raises it here, and that is enough."""
    show = threading.excepthook

    def unless_it_comes_again(thread: threading.ExceptHookArgs) -> None:
        if not issubclass(thread.exc_type, OSError):
            show(thread)

    threading.excepthook = unless_it_comes_again
    try:
        yield
    finally:
        threading.excepthook = show


def _as_text(line: dict) -> str:
    return json.dumps(line) + "\n"


def _parsed(text: str) -> dict | None:
    try:
        line = json.loads(text.strip("\0 "))  # zeros: where a power cut came before the data
    except (ValueError, RecursionError):
        return None
    return line if has_form(line, LINE) else None


def flat(values: dict) -> dict:
    """`values`, where a list under `name` becomes name_0, name_1, ..."""
    result = {}
    for name, value in values.items():
        if isinstance(value, list):
            result |= {f"{name}_{i}": entry for i, entry in enumerate(value)}
        else:
            result[name] = value
    return result
