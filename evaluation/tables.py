"""The results of a probe as text, Markdown, CSV, JSON and a heat map."""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from errors import UserError
from evaluation.plots import heat_map
from evaluation.probe import CellResult, best, best_on_test
from files import replacing, write_json

PICKED_ON_TEST = "picked on the test set, as published figures are"


def file_stem(cell: CellResult | None, protocol: str, baseline: str | None) -> str:
    """The name of a probe's files: linear_grid, or linear_<block>_t<t> for one cell.

    What is not the default is appended: linear_grid_cached_random.
    """
    stem = "linear_grid" if cell is None else f"linear_{cell.block}_t{cell.t}"
    return stem + ("_cached" if protocol == "cached" else "") + (f"_{baseline}" if baseline else "")


def summary(results: list[CellResult], title: str, n_validation: int, n_test: int) -> str:
    """What the job prints: both tables, the headline, and what picking on test would give."""
    if len(results) == 1:
        validation = f"{100 * results[0].validation_accuracy:.2f} % on the held-out 10 % of train"
        return "\n".join([title, *_headlines(results), f"{validation} ({n_validation:,} images)"])
    validation = _grid(results, lambda r: f"{100 * r.validation_accuracy:.2f}")
    test = _grid(results, lambda r: f"{100 * r.test_accuracy:.2f} ({_interval(r)})")
    lines = [
        title,
        "",
        f"accuracy in % on the held-out 10 % of train ({n_validation:,} images), by heads that "
        "have not seen it: picks the cell",
        aligned(validation),
        "",
        f"accuracy in % on test ({n_test:,} images; in brackets the 95 % interval), by heads "
        "fitted on all of train",
        aligned(test),
        "",
        *_headlines(results),
    ]
    return "\n".join(lines)


def write_grid(folder: Path, stem: str, results: list[CellResult], record: dict, title: str):
    """Writes <stem>.json, .csv, .md and .png. Returns the paths."""
    paths = [folder / f"{stem}.{suffix}" for suffix in ("json", "csv", "md", "png")]
    write_record(paths[0], results, record)
    _write_text(paths[1], _csv(results))
    _write_text(paths[2], _markdown(results, title))
    blocks, timesteps = _axes(results)
    tables = {
        "held-out 10 % of train (red: the best)": _values(results, "validation_accuracy"),
        "test (red: the same cell)": _values(results, "test_accuracy"),
    }
    winner = best(results)
    heat_map(
        paths[3], tables, blocks, [f"t={t}" for t in timesteps], title, "accuracy in %",
        marked=(blocks.index(winner.block), timesteps.index(winner.t)),
    )  # fmt: skip
    return paths


def write_record(path: Path, results: list[CellResult], record: dict) -> None:
    """Writes `record` and the results as JSON; accuracies are in 0..1."""
    cells = {
        "cells": [asdict(result) for result in results],
        "headline": asdict(best(results)),
        "picked_on_test": asdict(best_on_test(results)),
    }
    write_json(path, record | cells)


def best_cell_of_last_grid(folder: Path) -> tuple[int, str, Path]:
    """(t, block, file) of the newest grid in `folder` that is not a baseline's.

    Raises UserError if there is none.
    """
    grids = sorted(folder.glob("linear_grid*.json"), key=lambda path: path.stat().st_mtime)
    for path in reversed(grids):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{path}: not valid JSON; delete it and run linear.py --grid") from None
        if record["baseline"] is None:
            return record["headline"]["t"], record["headline"]["block"], path
    raise UserError(
        f"no linear_grid*.json in {folder}: run linear.py --grid, or give --timestep and "
        "--blockname"
    )


def _headlines(results: list[CellResult]) -> list[str]:
    honest, optimistic = best(results), best_on_test(results)
    if len(results) == 1:
        return [f"{_name(honest)}: test {100 * honest.test_accuracy:.2f} % ({_interval(honest)})"]
    return [
        f"picked on the held-out images: {_name(honest)}: "
        f"test {100 * honest.test_accuracy:.2f} % ({_interval(honest)})",
        f"{PICKED_ON_TEST}: {_name(optimistic)}: test {100 * optimistic.test_accuracy:.2f} %",
    ]


def _name(result: CellResult) -> str:
    return f"{result.block} at t={result.t}"


def _interval(result: CellResult) -> str:
    low, high = result.test_interval
    return f"{100 * low:.1f}-{100 * high:.1f}"


def _axes(results: list[CellResult]) -> tuple[list[str], list[int]]:
    blocks = list(dict.fromkeys(result.block for result in results))
    return blocks, list(dict.fromkeys(result.t for result in results))


def _grid(results: list[CellResult], text: Callable[[CellResult], str]) -> list[list[str]]:
    """Rows of block x t, the first one being the header."""
    blocks, timesteps = _axes(results)
    at = {(result.t, result.block): text(result) for result in results}
    rows = [[block, *(at[t, block] for t in timesteps)] for block in blocks]
    return [["block", *(f"t={t}" for t in timesteps)], *rows]


def _values(results: list[CellResult], field: str) -> np.ndarray:
    """(blocks, timesteps), in %."""
    blocks, timesteps = _axes(results)
    at = {(result.t, result.block): 100 * getattr(result, field) for result in results}
    return np.array([[at[t, block] for t in timesteps] for block in blocks])


def aligned(rows: list[list[str]]) -> str:
    """Rows of equal length as a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def _markdown(results: list[CellResult], title: str) -> str:
    rows = _grid(
        results,
        lambda r: (
            f"{100 * r.validation_accuracy:.2f} / {100 * r.test_accuracy:.2f} ({_interval(r)})"
        ),
    )
    header, *body = ["| " + " | ".join(row) + " |" for row in rows]
    rule = "|---|" + "---:|" * (len(rows[0]) - 1)
    note = (
        "Accuracy in %: on the held-out 10 % of train / on test (95 % interval). The first is by "
        "heads fitted on the other 90 % and picks the cell, the second by heads fitted on all of "
        "train."
    )
    headlines = [f"- {line}" for line in _headlines(results)]
    return "\n".join([f"**{title}**", "", note, "", header, rule, *body, "", *headlines, ""])


def _csv(results: list[CellResult]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["t", "block", "width", "validation_accuracy", "test_accuracy", "test_low", "test_high"]
    )
    for r in results:
        row = [r.t, r.block, r.width, r.validation_accuracy, r.test_accuracy, *r.test_interval]
        writer.writerow(row)
    return text.getvalue()


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
