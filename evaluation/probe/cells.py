"""The cells that a probe reads, and what it found in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.probe.features import FeatureSource, Part, Timestep, as_timestep
from evaluation.tables import with_interval

ALL = "all"  # the name of all blocks side by side

# the forms, see `support.files.has_form`, of what `CellResult` and `Outcome` write to JSON
NUMBER = int | float
RESULT = {
    "t": NUMBER | str, "block": str, "k": int | None, "sigma": NUMBER | str | None,
    "by_sigma": bool, "width": int, "validation_accuracy": NUMBER, "test_accuracy": NUMBER,
    "test_interval": [NUMBER],
}  # fmt: skip
OUTCOME = {"results": [RESULT], "seconds": NUMBER, "images_per_s": NUMBER | None}


@dataclass(frozen=True)
class Cell:
    """Which features one head reads, and how.

    A cell is mostly one part: a block at a timestep. A combined cell has several, side by side in
    one vector; their names are joined: block out_1+out_2 (or all), t 1+11.
    """

    t: Timestep | str
    block: str
    parts: tuple[Part, ...]
    k: int | None = None  # neighbours of k-NN; None: a linear head
    sigma: float | str | None = None  # the noise level of t; None: no noise
    by_sigma: bool = False  # whether sigma, not t, was asked for

    @property
    def is_combined(self) -> bool:
        """Whether it has several parts."""
        return len(self.parts) > 1

    @property
    def level(self) -> str:
        """The noise, as tables and figures name it."""
        name, value = ("sigma", self.sigma) if self.by_sigma else ("t", self.t)
        return f"{name}={value}" if isinstance(value, str) else f"{name}={value:g}"

    @property
    def row(self) -> str:
        """The block, and k if there is one, as tables and figures name them."""
        return self.block if self.k is None else f"{self.block}, k={self.k}"

    @property
    def name(self) -> str:
        """Block, noise and k in one."""
        return f"{self.block} at {self.level}" + ("" if self.k is None else f", k={self.k}")

    def name_with(self, width: int) -> str:
        """The name, and the width of its features where it is combined."""
        return self.name + (f", {width} wide" if self.is_combined else "")

    def record(self) -> dict:
        """What files of results say of it; `parts` of a combined cell alone."""
        parts = {"parts": [list(part) for part in self.parts]} if self.is_combined else {}
        return {
            "t": self.t, "block": self.block, **parts,
            "k": self.k, "sigma": self.sigma, "by_sigma": self.by_sigma,
        }  # fmt: skip

    @classmethod
    def from_record(cls, record: Mapping) -> Cell:
        """The cell that `record` wrote; other keys are ignored."""
        parts = record.get("parts", [(record["t"], record["block"])])
        names = (record[name] for name in ("k", "sigma", "by_sigma"))
        parts = tuple((as_timestep(t), block) for t, block in parts)
        t = parts[0][0] if len(parts) == 1 else record["t"]
        return cls(t, record["block"], parts, *names)


def cells_of(
    source: FeatureSource,
    timesteps: Sequence[Sequence[float]] | None = None,
    blocks: Sequence[Sequence[str]] | None = None,
    sigmas: Sequence[Sequence[float]] | None = None,
) -> tuple[Cell, ...]:
    """Every one of `timesteps` with every one of `blocks`: the cells that are asked for.

    Each of them is a list: one timestep (or block), or several that are put side by side, in
    whatever order. The block "all" stands for all of them. None: the timesteps of the source's
    grid, each of its blocks alone. `sigmas` are noise levels in place of timesteps. Raises
    UserError for a timestep, noise level or block that the source does not have.
    """
    names, by_sigma = source.block_names, bool(sigmas)
    timesteps = timesteps or [[t] for t in source.default_timesteps]
    if sigmas:
        timesteps = [[source.timestep(sigma) for sigma in sum_] for sum_ in sigmas]
    blocks = blocks or [[name] for name in names]
    blocks = [names if list(sum_) == [ALL] else sum_ for sum_ in blocks]
    source.check({t for sum_ in timesteps for t in sum_}, [b for sum_ in blocks for b in sum_])
    times = {tuple(sorted({as_timestep(t) for t in sum_})) for sum_ in timesteps}
    sums = dict.fromkeys(tuple(name for name in names if name in sum_) for sum_ in blocks)
    return tuple(
        _cell(source, ts, bs, by_sigma)
        for ts in sorted(times, key=lambda ts: (len(ts), ts))
        for bs in sums
    )


def _cell(
    source: FeatureSource, timesteps: tuple[Timestep, ...], blocks: tuple[str, ...], by_sigma: bool
) -> Cell:
    parts = tuple((t, block) for t in timesteps for block in blocks)
    sigmas = [source.sigma(t) for t in timesteps]
    is_all = len(blocks) > 1 and list(blocks) == list(source.block_names)
    if len(timesteps) == 1:
        (t,), (sigma,) = timesteps, sigmas
    else:
        t = "+".join(map(str, timesteps))
        sigma = None if None in sigmas else "+".join(f"{sigma:g}" for sigma in sigmas)
    return Cell(t, ALL if is_all else "+".join(blocks), parts, sigma=sigma, by_sigma=by_sigma)


def timesteps_and_blocks(cells: Sequence[Cell]) -> tuple[list[Timestep], list[str]]:
    """All timesteps, and all blocks, of the cells' parts."""
    parts = [part for cell in cells for part in cell.parts]
    return list(dict.fromkeys(t for t, _ in parts)), list(dict.fromkeys(b for _, b in parts))


def side_by_side(features: Mapping[Part, np.ndarray], cell: Cell) -> np.ndarray:
    """{part: (N, C)} -> (N, the sum of C over the cell's parts), a copy."""
    return np.concatenate([features[part] for part in cell.parts], axis=1)


@dataclass(frozen=True)
class CellResult:
    """Accuracies are in 0..1; `validation_accuracy` is on the held-out images of train."""

    cell: Cell
    width: int
    validation_accuracy: float
    test_accuracy: float
    test_interval: tuple[float, float]  # 95 %

    @property
    def name(self) -> str:
        """That of the cell, see `Cell.name_with`."""
        return self.cell.name_with(self.width)

    @property
    def on_test(self) -> str:
        """The test accuracy and its interval, in %."""
        return with_interval(self.test_accuracy, self.test_interval)

    def record(self) -> dict:
        """What files of results say of it."""
        return self.cell.record() | {
            "width": self.width,
            "validation_accuracy": self.validation_accuracy,
            "test_accuracy": self.test_accuracy,
            "test_interval": list(self.test_interval),
        }

    @classmethod
    def from_record(cls, record: Mapping) -> CellResult:
        """The result that `record` wrote."""
        return cls(
            Cell.from_record(record),
            record["width"],
            record["validation_accuracy"],
            record["test_accuracy"],
            tuple(record["test_interval"]),
        )


@dataclass(frozen=True)
class Outcome:
    """What one probe found, and what it cost.

    Cells of one part and combined ones are never compared with each other: whatever picks a cell
    picks it among one of the two.
    """

    results: list[CellResult]
    seconds: float  # of this call: a probe that goes on counts what was left
    images_per_s: float | None  # of its forward passes; None: all features were there

    def those(self, combined: bool) -> list[CellResult]:
        """The results of the combined cells, or of the others."""
        return [result for result in self.results if result.cell.is_combined == combined]

    def best(self, combined: bool = False) -> CellResult | None:
        """The one with the highest validation accuracy; of equal ones the first."""
        return max(
            self.those(combined), key=lambda result: result.validation_accuracy, default=None
        )

    def best_on_test(self) -> CellResult | None:
        """The cell of one part with the highest test accuracy: an optimistic choice, as in
        published tables."""
        singles = self.those(combined=False)
        return max(singles, key=lambda result: result.test_accuracy, default=None)

    def headlines(self) -> dict[str, dict | None]:
        """What files say of the best cell of one part, and of the best combined one, which are
        compared among themselves alone; None where there is none."""
        best = {"headline": self.best(), "headline_combined": self.best(combined=True)}
        return {name: result and result.record() for name, result in best.items()}

    def record(self) -> dict:
        """What files of results say of it."""
        return {
            "results": [result.record() for result in self.results],
            "seconds": self.seconds,
            "images_per_s": self.images_per_s,
        }

    @classmethod
    def from_record(cls, record: Mapping) -> Outcome:
        """The outcome that `record` wrote."""
        results = [CellResult.from_record(result) for result in record["results"]]
        return cls(results, record["seconds"], record["images_per_s"])
