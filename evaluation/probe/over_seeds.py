"""One probe of one model with several seeds: how much of its accuracy is chance."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from evaluation.probe.cells import Cell, Outcome
from evaluation.probe.features import FeatureSource
from evaluation.probe.grid import (
    PICKED,
    PICKED_ON_TEST,
    SIDE_BY_SIDE,
    Rows,
    grid_rows,
    headline,
    held_out,
)
from evaluation.probe.probe import Probe
from evaluation.tables import as_markdown, as_text, percent
from support.files import write_json, write_text
from utils import log


@dataclass(frozen=True)
class CellSpread:
    """Means and standard deviations (of n - 1) over the seeds, of accuracies in 0..1."""

    cell: Cell
    width: int
    validation_mean: float
    validation_std: float
    test_mean: float
    test_std: float

    @property
    def name(self) -> str:
        """That of the cell, see `Cell.name_with`."""
        return self.cell.name_with(self.width)

    @property
    def validation(self) -> str:
        """Mean ± standard deviation, in %."""
        return f"{percent(self.validation_mean)} ± {percent(self.validation_std)}"

    @property
    def test(self) -> str:
        """Mean ± standard deviation, in %."""
        return f"{percent(self.test_mean)} ± {percent(self.test_std)}"

    def record(self) -> dict:
        """What the file says of it."""
        names = ("width", "validation_mean", "validation_std", "test_mean", "test_std")
        return self.cell.record() | {name: getattr(self, name) for name in names}


def probe_seeds(probe: Probe, source: FeatureSource, seeds: Collection[int]) -> dict[int, Outcome]:
    """{seed: what the probe found}. What was finished before is kept, see `Probe.kept`."""
    outcomes = {}
    for seed in dict.fromkeys(seeds):
        outcomes[seed] = outcome = probe.kept(source, seed)
        log.info(f"seed {seed}: {headline(outcome.best() or outcome.best(combined=True))}")
    return outcomes


@dataclass(frozen=True)
class SeedTable:
    """What a probe found with each of at least two seeds. about: the facts that its files
    record."""

    OVER = "seeds"  # what the probe was done over, in the names of its files

    outcomes: Mapping[int, Outcome]
    title: str
    about: Mapping

    @property
    def spreads(self) -> list[CellSpread]:
        """One per cell, in the order of the probe."""
        cells = []
        for same in zip(*(outcome.results for outcome in self.outcomes.values()), strict=True):
            values = [
                statistic([getattr(result, field) for result in same])
                for field in ("validation_accuracy", "test_accuracy")
                for statistic in (mean, stdev)
            ]
            cells.append(CellSpread(same[0].cell, same[0].width, *values))
        return cells

    @property
    def headline(self) -> CellSpread | None:
        """The cell of one part with the highest mean on the held-out images; None without one."""
        return self._best(combined=False)

    @property
    def headline_combined(self) -> CellSpread | None:
        """The same of the combined cells, which are compared among themselves alone."""
        return self._best(combined=True)

    def text(self) -> str:
        """What the job prints: mean ± standard deviation of every cell, and the picked cell."""
        return as_text(self.title, self._tables(), self._closing())

    def save(self, stem: Path) -> list[Path]:
        """Writes <stem>.json and .md. Returns the paths."""
        paths = [Path(f"{stem}.{suffix}") for suffix in ("json", "md")]
        best = {"headline": self.headline, "headline_combined": self.headline_combined}
        results = {
            "cells": [cell.record() for cell in self.spreads],
            **{name: cell and cell.record() for name, cell in best.items()},
            "runs": [{"seed": seed, **o.record()} for seed, o in self.outcomes.items()],
        }
        write_json(paths[0], {**self.about, **results})
        write_text(paths[1], as_markdown(self.title, self._tables(), self._closing()))
        return paths

    def _those(self, combined: bool) -> list[CellSpread]:
        return [spread for spread in self.spreads if spread.cell.is_combined == combined]

    def _best(self, combined: bool) -> CellSpread | None:
        return max(self._those(combined), key=lambda cell: cell.validation_mean, default=None)

    def _tables(self) -> dict[str, Rows]:
        on_test = f"on test ({self.about['n_test']:,} images)"
        both = f"accuracy in % {held_out(self.about)} and {on_test}"
        if len(self.spreads) == 1:
            rows = [["seed", "held-out", "test"]]
            for seed, outcome in self.outcomes.items():
                (result,) = outcome.results
                accuracies = result.validation_accuracy, result.test_accuracy
                rows.append([str(seed), *map(percent, accuracies)])
            return {both: rows}
        over = f"mean ± standard deviation over {len(self.outcomes)} seeds"
        singles, combined = (self._those(is_combined) for is_combined in (False, True))
        tables = {}
        if singles:
            picks = f"accuracy in % {held_out(self.about)}, {over}: picks the cell"
            tables[picks] = grid_rows(singles, lambda spread: spread.validation)
            tables[f"accuracy in % {on_test}, {over}"] = grid_rows(singles, lambda s: s.test)
        if combined:
            tables[f"{SIDE_BY_SIDE}: {both}, {over}"] = [
                ["cell", "width", "held-out", "test"],
                *([s.cell.name, str(s.width), s.validation, s.test] for s in combined),
            ]
        return tables

    def _closing(self) -> list[str]:
        def words(spread: CellSpread) -> str:
            return f"{spread.name}: test {spread.test} % over {len(self.outcomes)} seeds"

        if len(self.spreads) == 1:
            return [words(self.spreads[0])]
        lines = []
        if singles := self._those(combined=False):
            top = max(singles, key=lambda spread: spread.test_mean)
            lines = [
                f"{PICKED}: {words(self.headline)}",
                f"{PICKED_ON_TEST}: {top.name}: test {top.test} %",
            ]
        if self.headline_combined:
            lines.append(f"{SIDE_BY_SIDE}, {PICKED}: {words(self.headline_combined)}")
        return lines
