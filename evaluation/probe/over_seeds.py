"""One probe of one model with several seeds: how much of its accuracy is chance."""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

from evaluation.probe.features import FeatureSource
from evaluation.probe.probe import Outcome, Probe, ProbedCell, best
from evaluation.tables import (
    PICKED_ON_TEST,
    as_markdown,
    as_text,
    grid_rows,
    headline,
    percent,
    write_text,
)
from support.files import write_json
from utils import log

OVER = "seeds"


@dataclass(frozen=True)
class CellSpread(ProbedCell):
    """Means and standard deviations (of n - 1) over the seeds, of accuracies in 0..1."""

    validation_mean: float
    validation_std: float
    test_mean: float
    test_std: float


def probe_seeds(probe: Probe, source: FeatureSource, seeds: Collection[int]) -> dict[int, Outcome]:
    """{seed: what the probe found}. What was finished before is kept, see `Probe.kept`."""
    outcomes = {}
    for seed in dict.fromkeys(seeds):
        outcomes[seed] = probe.kept(source, seed)
        log.info(f"seed {seed}: {headline(best(outcomes[seed].results))}")
    return outcomes


def spreads(outcomes: dict[int, Outcome]) -> list[CellSpread]:
    """One per cell, in the order of the probe; at least two seeds."""
    cells = []
    for same in zip(*(outcome.results for outcome in outcomes.values()), strict=True):
        first = same[0]
        values = [
            statistic([getattr(result, field) for result in same])
            for field in ("validation_accuracy", "test_accuracy")
            for statistic in (mean, stdev)
        ]
        cells.append(
            CellSpread(
                first.t, first.block, *values,
                k=first.k, sigma=first.sigma, by_sigma=first.by_sigma,
            )
        )  # fmt: skip
    return cells


def summary(outcomes: dict[int, Outcome], title: str, about: dict) -> str:
    """What the job prints: mean ± standard deviation of every cell, and the cell that is picked."""
    return as_text(title, _tables(outcomes, about), _closing(outcomes))


def write(stem: Path, outcomes: dict[int, Outcome], title: str, about: dict) -> list[Path]:
    """Writes <stem>.json and .md. Returns the paths."""
    paths = [Path(f"{stem}.{suffix}") for suffix in ("json", "md")]
    cells = spreads(outcomes)
    results = {
        "cells": [asdict(cell) for cell in cells],
        "headline": asdict(_best(cells)),
        "runs": [{"seed": seed, **asdict(outcome)} for seed, outcome in outcomes.items()],
    }
    write_json(paths[0], about | results)
    write_text(paths[1], as_markdown(title, _tables(outcomes, about), _closing(outcomes)))
    return paths


def _tables(outcomes: dict[int, Outcome], about: dict) -> dict[str, list[list[str]]]:
    cells = spreads(outcomes)
    held_out = f"on the held-out 10 % of train ({about['n_validation']:,} images)"
    on_test = f"on test ({about['n_test']:,} images)"
    if len(cells) == 1:
        rows = [["seed", "held-out", "test"]]
        for seed, outcome in outcomes.items():
            (result,) = outcome.results
            accuracies = result.validation_accuracy, result.test_accuracy
            rows.append([str(seed), *map(percent, accuracies)])
        return {f"accuracy in % {held_out} and {on_test}": rows}
    n_seeds = f"over {len(outcomes)} seeds"
    return {
        f"accuracy in % {held_out}, mean ± standard deviation {n_seeds}: picks the cell": grid_rows(
            cells, lambda c: _plus_minus(c.validation_mean, c.validation_std)
        ),
        f"accuracy in % {on_test}, mean ± standard deviation {n_seeds}": grid_rows(
            cells, lambda c: _plus_minus(c.test_mean, c.test_std)
        ),
    }


def _closing(outcomes: dict[int, Outcome]) -> list[str]:
    cells = spreads(outcomes)
    honest, optimistic = _best(cells), max(cells, key=lambda cell: cell.test_mean)
    test = f"test {_plus_minus(honest.test_mean, honest.test_std)} % over {len(outcomes)} seeds"
    if len(cells) == 1:
        return [f"{honest.name}: {test}"]
    return [
        f"picked on the held-out images: {honest.name}: {test}",
        f"{PICKED_ON_TEST}: {optimistic.name}: test "
        f"{_plus_minus(optimistic.test_mean, optimistic.test_std)} %",
    ]


def _best(cells: list[CellSpread]) -> CellSpread:
    return max(cells, key=lambda cell: cell.validation_mean)


def _plus_minus(average: float, deviation: float) -> str:
    return f"{percent(average)} ± {percent(deviation)}"
