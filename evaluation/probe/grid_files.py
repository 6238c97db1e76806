"""The files of grids: their names, which of them is a model's, and two of them side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from checkpoint import TrainedModel
from config.identity import same_untrained
from evaluation.probe.cells import RESULT, Cell, CellResult
from evaluation.probe.probe import PROTOCOLS
from evaluation.tables import percent
from support.errors import UserError
from support.files import load_json

GRID = {  # the form of a grid's .json, as far as it is read
    "baseline": str | None, "protocol": str, "epoch": int | None, "fingerprint": str,
    "n_train": int, "headline": (RESULT, type(None)), "cells": [RESULT],
}  # fmt: skip
FACTS = {  # of the images, the protocol and the fit: see `probed_alike`
    "protocol": str, "dataset": str, "n_train": int, "n_test": int, "seed": int | None,
    "config": {"network": dict, "linear": dict, "flip": bool},
}  # fmt: skip
COMPARABLE = GRID | FACTS | {"use_amp": bool}


def file_stem(
    cell: Cell | None,
    protocol: str,
    baseline: str | None,
    *,
    epoch: int | None = None,
    over: str | None = None,
    n_train: int | None = None,
) -> str:
    """The name of a probe's files: linear_grid, or linear_<block>_t<t> for one cell.

    What there is of the rest is added, and a protocol that is not the default:
    linear_grid_ep59_cached, linear_grid_cached_random, linear_epochs_out_2_t21_knn. `n_train` is
    given where a part of the training images is probed: linear_grid_ep59_cached_n10000.
    """
    where = "grid" if cell is None else f"{cell.block}_{cell.level.replace('=', '')}"
    at = None if epoch is None else f"ep{epoch}"
    part = None if n_train is None else f"n{n_train}"
    parts = ["linear", over, where, at, None if protocol == "paper" else protocol, part, baseline]
    return "_".join(filter(None, parts))


# --- the untrained network beside the trained one


def gain_rows(trained: Sequence[CellResult], untrained: Sequence[CellResult]) -> list[list[str]]:
    """Cell by cell: test accuracy, that of the untrained network, and what training gained.

    Raises KeyError for a cell that `untrained` lacks.
    """
    before = {_same(result): result.test_accuracy for result in untrained}
    rows = [["cell", "trained", "untrained", "gain"]]
    for result in trained:
        gain = result.test_accuracy - before[_same(result)]
        rows.append(
            [result.name, result.on_test, percent(before[_same(result)]), f"{100 * gain:+.2f}"]
        )
    return rows


def untrained_results(
    folder: Path, about: Mapping, results: Sequence[CellResult]
) -> list[CellResult]:
    """What the same probe found in the same cells of the untrained network, in their order; []
    unless `folder` has all of them.

    about: the facts of the probe that found `results`.
    """
    if about["baseline"] is not None:
        return []
    for path in sorted(folder.glob("linear_grid*_random.json")):
        record = load_json(path, COMPARABLE)
        if record is None:
            continue
        untrained = [CellResult.from_record(cell) for cell in record["cells"]]
        alike = probed_alike(record, about) and record["use_amp"] == about["use_amp"]
        alike = alike and same_untrained(record["config"], about["config"])
        if alike and _covers(untrained, results):
            at = {_same(result): result for result in untrained}
            return [at[_same(result)] for result in results]
    return []


def probed_alike(one: Mapping, other: Mapping) -> bool:
    """Whether the facts of two grids are of the same images, protocol and fit."""
    keys = ("protocol", "dataset", "n_train", "n_test", "seed")
    same = all(one[key] == other[key] for key in keys) and _fit(one) == _fit(other)
    if "data" in one and "data" in other:  # older records have no fingerprints
        same = same and one["data"] == other["data"]
    return same


def _fit(about: Mapping) -> list:
    """How the heads were fitted, where the config decides it: by the protocol `paper`."""
    config = about["config"]
    recipe = [config["linear"].get(name) for name in ("n_epoch", "batch_size", "lrate")]
    return [*recipe, config["flip"]] if about["protocol"] == "paper" else []


def _same(result: CellResult) -> tuple:
    return result.cell.parts, result.cell.k


def _covers(those: Sequence[CellResult], these: Sequence[CellResult]) -> bool:
    return set(map(_same, these)) <= set(map(_same, those))


# --- finding the grid of a model


def find_grid(
    folder: Path, model: TrainedModel, protocol: str | None = None
) -> tuple[Path, CellResult] | None:
    """The file of the grid of this model's weights in `folder`, and its headline; None without.

    Of several it is that of the most training images, and of `protocol`, else of the first of
    PROTOCOLS.
    """
    fitting = {
        path: record
        for path, record in grids_in(folder).items()
        if weights_of(record) == model.fingerprint() and protocol in (None, record["protocol"])
    }
    if not fitting:
        return None

    def rank(path: Path) -> tuple[int, int]:
        return -fitting[path]["n_train"], PROTOCOLS.index(fitting[path]["protocol"])

    path = min(fitting, key=rank)
    return path, CellResult.from_record(fitting[path]["headline"])


def best_cell(
    folder: Path, model: TrainedModel, protocol: str | None = None
) -> tuple[Path, CellResult]:
    """As `find_grid`. Raises UserError, saying which grids there are, if none fits."""
    found = find_grid(folder, model, protocol)
    if found is None:
        wanted = model.stage + (f", protocol {protocol}" if protocol else "")
        there = [
            f"{path.name} (epoch {record['epoch']}, protocol {record['protocol']}"
            + (", other weights)" if weights_of(record) != model.fingerprint() else ")")
            for path, record in grids_in(folder).items()
        ]
        raise UserError(
            f"no linear_grid*.json of these weights ({wanted}) in {folder}. There are: "
            f"{', '.join(there) or 'none'}. Run linear.py --grid, or give --timestep and "
            "--blockname"
        )
    return found


def grids_in(folder: Path, form: object = GRID) -> dict[Path, dict]:
    """Those of trained networks that have a headline, in the order of their names; what is not of
    `form` is left out, with a note."""
    paths = sorted(folder.glob("linear_grid*.json"))
    trained = [path for path in paths if not path.stem.endswith(("_random", "_pixels"))]
    records = {path: load_json(path, form) for path in trained}
    return {
        path: record
        for path, record in records.items()
        if record and record["baseline"] is None and record["headline"] is not None
    }


def weights_of(record: Mapping) -> str:
    """The fingerprint of the weights that a grid is of."""
    return record["fingerprint"].rpartition("-")[0]  # the rest is the precision of the forwards
