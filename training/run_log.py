"""A run's log: TensorBoard, and `metrics.jsonl` with one JSON object per line."""

import csv
import json
from pathlib import Path

import numpy as np

from support import distributed
from support.files import replacing


class RunLog:
    """Appends to <save_dir>/metrics.jsonl and <save_dir>/tensorboard from step `start_step` on.

    Lines of steps past the start are dropped: they belong to work that was lost and is done again.
    Of several processes rank 0 writes for all.
    """

    def __init__(self, save_dir: Path, start_step: int):
        self.writes = distributed.is_main()
        if not self.writes:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        save_dir.mkdir(parents=True, exist_ok=True)
        self.path = save_dir / "metrics.jsonl"
        kept = [line for line in self._whole_lines() if json.loads(line)["step"] <= start_step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(self.path)
        self.file = self.path.open("a", encoding="utf-8")
        self.board = SummaryWriter(str(save_dir / "tensorboard"), purge_step=start_step + 1)

    def _whole_lines(self) -> list[str]:
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [line for line in lines if line.endswith("\n")]  # a kill may have cut the last one

    def lines(self) -> list[dict]:
        """Those of the whole run, also of before it was resumed; on rank 0 alone."""
        return [json.loads(line) for line in self._whole_lines()]

    def write(self, kind: str, step: int, values: dict) -> None:
        """One line {"kind": kind, "step": step, **values}; numbers and lists also go to
        TensorBoard, as `kind/name`."""
        if not self.writes:
            return
        self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self.file.flush()
        for name, value in flat(values).items():
            if isinstance(value, int | float):
                self.board.add_scalar(f"{kind}/{name}", value, step)

    def image(self, name: str, step: int, image: np.ndarray) -> None:
        """image: (C, H, W) uint8."""
        if self.writes:
            self.board.add_image(name, image, step)

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
        if self.writes:
            self.file.close()
            self.board.close()


def flat(values: dict) -> dict:
    """`values`, where a list under `name` becomes name_0, name_1, ..."""
    result = {}
    for name, value in values.items():
        if isinstance(value, list):
            result |= {f"{name}_{i}": entry for i, entry in enumerate(value)}
        else:
            result[name] = value
    return result
