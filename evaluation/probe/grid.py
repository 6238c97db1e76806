"""One cell or a grid of them: its names, its tables, its files, its headline."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.plots import heat_map
from evaluation.probe.cells import CellResult, Outcome
from evaluation.probe.grid_files import gain_rows
from evaluation.tables import as_markdown, as_text, percent, with_interval
from support.files import write_json, write_text

Rows = list[list[str]]  # the first one is the header
PICKED = "picked on the held-out images"
PICKED_ON_TEST = "picked on the test set, as published figures are"
SIDE_BY_SIDE = "features side by side"
SEEN = {  # what the compared and the reported answers come from, by whether they are k-NN's
    False: ("by heads that have not seen it", "by heads fitted on all of train"),
    True: ("by neighbours among the others", "by neighbours in all of train"),
}
BESIDE_UNTRAINED = (
    "test accuracy in % beside that of the same cell of the untrained network, and the gain in "
    "points"
)


@dataclass(frozen=True)
class Grid:
    """What one probe found in its cells: a grid of them, or only one.

    about: the facts that its files record. untrained: what the same probe found in the same cells
    of the untrained network, if that is known.
    """

    OVER = None  # what the probe was done over, in the names of its files

    outcome: Outcome
    title: str
    about: dict
    untrained: Sequence[CellResult] = ()

    def text(self) -> str:
        """What the job prints: the tables, the headlines, and what picking on test would give."""
        closing = _headlines(self.outcome)
        if len(self.outcome.results) > 1:
            return as_text(self.title, self._tables(), closing)
        (result,) = self.outcome.results
        lines = [
            f"{percent(result.validation_accuracy)} % {held_out(self.about)}",
            *(f"{row[2]} % by the untrained network: {row[3]}" for row in self._gain()[1:]),
        ]
        return "\n".join([self.title, *closing, *lines])

    def save(self, stem: Path) -> list[Path]:
        """Writes <stem>.json; of a grid also .csv, .md and, of cells of one part, the heat map
        .png. Returns the paths."""
        paths = [Path(f"{stem}.{suffix}") for suffix in ("json", "csv", "md", "png")]
        write_json(paths[0], self._record())
        if not self.about["grid"]:
            return paths[:1]
        write_text(paths[1], _csv(self.outcome.results))
        closing = _headlines(self.outcome)
        write_text(paths[2], as_markdown(self.title, self._short_tables(), closing))
        if self.outcome.best() is None:
            paths[3].unlink(missing_ok=True)  # of an earlier grid: it would stand beside this one
            return paths[:3]
        self._heat_map(paths[3])
        return paths

    def _record(self) -> dict:
        top = self.outcome.best_on_test()
        return self.about | {
            "seconds": self.outcome.seconds,
            "images_per_s": self.outcome.images_per_s,
            "cells": [result.record() for result in self.outcome.results],
            **self.outcome.headlines(),
            "picked_on_test": top and top.record(),
        }

    def _tables(self) -> dict[str, Rows]:
        compared, reported = self._seen()
        picks = f"accuracy in % {held_out(self.about)}, {compared}: picks the cell"
        shown = f"accuracy in % {on_test(self.about)}, {reported}"
        singles, tables = self.outcome.those(combined=False), {}
        if singles:
            tables[picks] = grid_rows(singles, lambda r: percent(r.validation_accuracy))
            tables[shown] = grid_rows(singles, lambda r: r.on_test)
        return tables | self._further_tables()

    def _short_tables(self) -> dict[str, Rows]:
        compared, reported = self._seen()
        note = (
            "Accuracy in %: on held-out images of train / on test (95 % interval). The first is "
            f"{compared} and picks the cell, the second {reported}."
        )
        singles, tables = self.outcome.those(combined=False), {}
        if singles:
            tables[note] = grid_rows(
                singles, lambda r: f"{percent(r.validation_accuracy)} / {r.on_test}"
            )
        return tables | self._further_tables()

    def _further_tables(self) -> dict[str, Rows]:
        """The combined cells, and the untrained network's."""
        tables = {}
        if combined := self.outcome.those(combined=True):
            where = f"{held_out(self.about)}, which picks among them, and {on_test(self.about)}"
            tables[f"{SIDE_BY_SIDE}: accuracy in % {where}"] = [
                ["cell", "width", "held-out", "test"],
                *(
                    [r.cell.name, str(r.width), percent(r.validation_accuracy), r.on_test]
                    for r in combined
                ),
            ]
        if self.untrained:
            tables[BESIDE_UNTRAINED] = self._gain()
        return tables

    def _seen(self) -> tuple[str, str]:
        return SEEN[self.outcome.results[0].cell.k is not None]

    def _gain(self) -> Rows:
        return gain_rows(self.outcome.results, self.untrained) if self.untrained else []

    def _heat_map(self, path: Path) -> None:
        singles = self.outcome.those(combined=False)
        rows, levels = _axes(singles)
        tables = {
            "held-out images of train (red: the best)": _values(singles, "validation_accuracy"),
            "test (red: the same cell)": _values(singles, "test_accuracy"),
        }
        winner = self.outcome.best().cell
        heat_map(
            path, tables, rows, levels, self.title, "accuracy in %",
            marked=(rows.index(winner.row), levels.index(winner.level)),
        )  # fmt: skip


def held_out(about: Mapping) -> str:
    """The images on which cells are compared."""
    return f"on the {about['n_validation']:,} held-out images of train"


def on_test(about: Mapping) -> str:
    """The images of the reported accuracy."""
    return f"on test ({about['n_test']:,} images; in brackets the 95 % interval)"


def headline(result: CellResult) -> str:
    """The cell and its test accuracy in one line."""
    return f"{result.name}: test {with_interval(result.test_accuracy, result.test_interval, ' %')}"


def _headlines(outcome: Outcome) -> list[str]:
    singles, combined = outcome.those(combined=False), outcome.best(combined=True)
    lines = []
    if len(singles) == 1:
        lines = [headline(singles[0])]
    elif singles:
        top = outcome.best_on_test()
        lines = [
            f"{PICKED}: {headline(outcome.best())}",
            f"{PICKED_ON_TEST}: {top.name}: test {percent(top.test_accuracy)} %",
        ]
    if combined:
        is_picked = len(outcome.results) > 1
        lines.append((f"{SIDE_BY_SIDE}, {PICKED}: " if is_picked else "") + headline(combined))
    return lines


def _axes(results: Sequence) -> tuple[list[str], list[str]]:
    rows = list(dict.fromkeys(result.cell.row for result in results))
    return rows, list(dict.fromkeys(result.cell.level for result in results))


def grid_rows(results: Sequence, text: Callable) -> Rows:
    """Rows of block x noise level; `text` is of one result, which has a `cell`."""
    rows, levels = _axes(results)
    at = {(result.cell.row, result.cell.level): text(result) for result in results}
    return [["block", *levels], *([row, *(at[row, level] for level in levels)] for row in rows)]


def _values(results: Sequence[CellResult], name: str) -> np.ndarray:
    """(rows, levels), in %."""
    rows, levels = _axes(results)
    at = {(r.cell.row, r.cell.level): 100 * getattr(r, name) for r in results}
    return np.array([[at[row, level] for level in levels] for row in rows])


def _csv(results: Sequence[CellResult]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    accuracies = ["validation_accuracy", "test_accuracy", "test_low", "test_high"]
    writer.writerow(["t", "block", "width", *accuracies, "sigma", "k"])
    for r in results:
        accuracies = [r.validation_accuracy, r.test_accuracy, *r.test_interval]
        writer.writerow([r.cell.t, r.cell.block, r.width, *accuracies, r.cell.sigma, r.cell.k])
    return text.getvalue()
