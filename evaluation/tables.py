"""The results of a probe as text, Markdown, CSV, JSON and a heat map."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from evaluation.plots import heat_map
from evaluation.probe.probe import CellResult, Outcome, ProbedCell, best, best_on_test
from support.files import read_json, replacing, write_json

OVER = None  # what a probe is done over: once
PICKED_ON_TEST = "picked on the test set, as published figures are"
SEEN = {  # what the compared and the reported answers come from, by whether they are k-NN's
    False: ("by heads that have not seen it", "by heads fitted on all of train"),
    True: ("by neighbours in the other 90 %", "by neighbours in all of train"),
}


def file_stem(
    cell: ProbedCell | None, protocol: str, baseline: str | None, over: str | None = None
) -> str:
    """The name of a probe's files: linear_grid, or linear_<block>_t<t> for one cell.

    What is not the default is added: linear_grid_cached_random, linear_epochs_out_2_t21_knn.
    """
    where = "grid" if cell is None else f"{cell.block}_{cell.level.replace('=', '')}"
    parts = ["linear", over, where, None if protocol == "paper" else protocol, baseline]
    return "_".join(filter(None, parts))


def summary(outcome: Outcome, title: str, about: dict) -> str:
    """What the job prints: both tables, the headline, and what picking on test would give."""
    results = outcome.results
    held_out = f"on the held-out 10 % of train ({about['n_validation']:,} images)"
    if len(results) == 1:
        validation = f"{percent(results[0].validation_accuracy)} % {held_out}"
        return "\n".join([title, *_headlines(results), validation])
    compared, reported = SEEN[results[0].k is not None]
    tables = {
        f"accuracy in % {held_out}, {compared}: picks the cell": grid_rows(
            results, lambda r: percent(r.validation_accuracy)
        ),
        f"accuracy in % on test ({about['n_test']:,} images; in brackets the 95 % interval), "
        f"{reported}": grid_rows(results, _on_test),
    }
    return as_text(title, tables, _headlines(results))


def write(stem: Path, outcome: Outcome, title: str, about: dict) -> list[Path]:
    """Writes <stem>.json with `about`; of a grid also .csv, .md and .png. Returns the paths."""
    results = outcome.results
    record = about | {"seconds": outcome.seconds, "images_per_s": outcome.images_per_s}
    paths = [Path(f"{stem}.{suffix}") for suffix in ("json", "csv", "md", "png")]
    cells = {
        "cells": [asdict(result) for result in results],
        "headline": asdict(best(results)),
        "picked_on_test": asdict(best_on_test(results)),
    }
    write_json(paths[0], record | cells)
    if not about["grid"]:
        return paths[:1]
    write_text(paths[1], _csv(results))
    write_text(paths[2], _markdown(results, title))
    rows, levels = _axes(results)
    tables = {
        "held-out 10 % of train (red: the best)": _values(results, "validation_accuracy"),
        "test (red: the same cell)": _values(results, "test_accuracy"),
    }
    winner = best(results)
    heat_map(
        paths[3], tables, rows, levels, title, "accuracy in %",
        marked=(rows.index(winner.row), levels.index(winner.level)),
    )  # fmt: skip
    return paths


def best_cell_of_last_grid(folder: Path) -> tuple[float, str, Path] | None:
    """(t, block, file) of the newest grid in `folder` that is not a baseline's; None without one.

    Raises UserError if it is damaged.
    """
    grids = sorted(folder.glob("linear_grid*.json"), key=lambda path: path.stat().st_mtime)
    for path in reversed(grids):
        record = read_json(path)
        if record["baseline"] is None:
            return record["headline"]["t"], record["headline"]["block"], path
    return None


def _headlines(results: list[CellResult]) -> list[str]:
    if len(results) == 1:
        return [headline(results[0])]
    optimistic = best_on_test(results)
    return [
        f"picked on the held-out images: {headline(best(results))}",
        f"{PICKED_ON_TEST}: {optimistic.name}: test {percent(optimistic.test_accuracy)} %",
    ]


def headline(result: CellResult) -> str:
    return f"{result.name}: test {with_interval(result.test_accuracy, result.test_interval, ' %')}"


def percent(part: float) -> str:
    return f"{100 * part:.2f}"


def with_interval(part: float, interval: tuple[float, float], unit: str = "") -> str:
    """A part and its interval, all in 0..1, in %: 58.49 (57.5-59.5)."""
    low, high = interval
    return f"{percent(part)}{unit} ({100 * low:.1f}-{100 * high:.1f})"


def half_width(interval: tuple[float, float]) -> float:
    """Of an interval in 0..1, in %: the length of an error bar."""
    low, high = interval
    return 50 * (high - low)


def _on_test(result: CellResult) -> str:
    return with_interval(result.test_accuracy, result.test_interval)


def _axes(cells: Sequence[ProbedCell]) -> tuple[list[str], list[str]]:
    rows = list(dict.fromkeys(cell.row for cell in cells))
    return rows, list(dict.fromkeys(cell.level for cell in cells))


def grid_rows(cells: Sequence[ProbedCell], text: Callable) -> list[list[str]]:
    """Rows of block x noise level, the first one being the header; `text` is of one cell."""
    rows, levels = _axes(cells)
    at = {(cell.row, cell.level): text(cell) for cell in cells}
    return [["block", *levels], *([row, *(at[row, level] for level in levels)] for row in rows)]


def _values(results: list[CellResult], field: str) -> np.ndarray:
    """(rows, levels), in %."""
    rows, levels = _axes(results)
    at = {(result.row, result.level): 100 * getattr(result, field) for result in results}
    return np.array([[at[row, level] for level in levels] for row in rows])


def aligned(rows: list[list[str]]) -> str:
    """Rows of equal length as a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def as_text(title: str, tables: dict[str, list[list[str]]], closing: list[str]) -> str:
    """The title, each table below what it is, and the closing lines."""
    parts = [f"{heading}\n{aligned(rows)}" for heading, rows in tables.items()]
    return "\n\n".join([title, *parts, "\n".join(closing)])


def as_markdown(title: str, tables: dict[str, list[list[str]]], closing: list[str]) -> str:
    """The same in Markdown."""
    parts = [f"**{title}**"]
    for heading, rows in tables.items():
        header, *body = ["| " + " | ".join(row) + " |" for row in rows]
        rule = "|---|" + "---:|" * (len(rows[0]) - 1)
        parts += [heading, "\n".join([header, rule, *body])]
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in closing)]) + "\n"


def _markdown(results: list[CellResult], title: str) -> str:
    rows = grid_rows(results, lambda r: f"{percent(r.validation_accuracy)} / {_on_test(r)}")
    compared, reported = SEEN[results[0].k is not None]
    note = (
        "Accuracy in %: on the held-out 10 % of train / on test (95 % interval). The first is "
        f"{compared} and picks the cell, the second {reported}."
    )
    return as_markdown(title, {note: rows}, _headlines(results))


def _csv(results: list[CellResult]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    accuracies = ["validation_accuracy", "test_accuracy", "test_low", "test_high"]
    writer.writerow(["t", "block", "width", *accuracies, "sigma", "k"])
    for r in results:
        row = [r.t, r.block, r.width, r.validation_accuracy, r.test_accuracy, *r.test_interval]
        writer.writerow([*row, r.sigma, r.k])
    return text.getvalue()


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def find_or_add_row(rows: list[dict], settings: dict, blank: dict) -> dict:
    """The first row that holds these settings; if there is none, a new one, with `blank` added."""
    for row in rows:
        if settings.items() <= row.items():
            return row
    rows.append(settings | blank)
    return rows[-1]
