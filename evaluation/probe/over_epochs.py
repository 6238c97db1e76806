"""One probe over the checkpoints of a run: how the features come about while it trains."""

from dataclasses import asdict, dataclass
from pathlib import Path

from checkpoint import find, load_denoiser, saved_epochs
from config import Config
from evaluation.plots import curves
from evaluation.probe.features import model_source
from evaluation.probe.probe import CellResult, Outcome, Probe, best, best_on_test
from evaluation.tables import (
    PICKED_ON_TEST,
    as_markdown,
    as_text,
    half_width,
    headline,
    percent,
    with_interval,
    write_text,
)
from support.files import write_json
from utils import log

OVER = "epochs"


@dataclass(frozen=True)
class EpochResult:
    """What the probe found at one checkpoint; `best` is its cell that is best on held-out."""

    epoch: int
    checkpoint: Path
    fingerprint: str
    outcome: Outcome

    @property
    def best(self) -> CellResult:
        return best(self.outcome.results)


def probe_epochs(
    probe: Probe, epochs: list[int], config: Config, use_amp: bool, input_scale: str | None = None
) -> list[EpochResult]:
    """Probes model_<epoch>.pth of these epochs, or of all where `epochs` is empty.

    What was finished before is kept, see `Probe.kept`. Raises UserError, before any is probed, if
    a checkpoint is not there.
    """
    epochs = sorted(set(epochs)) or saved_epochs(config.save_dir)
    results = []
    for epoch, path in [(epoch, find(config.save_dir, epoch)) for epoch in epochs]:
        model = load_denoiser(path, probe.device, config, input_scale=input_scale)
        source = model_source(model, use_amp)
        outcome = probe.kept(source, config.seed)
        results.append(EpochResult(epoch, path, source.fingerprint, outcome))
        log.info(f"epoch {epoch}: {headline(results[-1].best)}")
    return results


def summary(results: list[EpochResult], title: str, about: dict) -> str:
    """What the job prints: one row per epoch, and the best epoch, picked on the held-out images."""
    return as_text(title, _tables(results, about), _closing(results))


def write(stem: Path, results: list[EpochResult], title: str, about: dict) -> list[Path]:
    """Writes <stem>.json, .md and .png. Returns the paths."""
    paths = [Path(f"{stem}.{suffix}") for suffix in ("json", "md", "png")]
    rows = [
        {
            "epoch": result.epoch,
            "checkpoint": str(result.checkpoint),
            "fingerprint": result.fingerprint,
            "seconds": result.outcome.seconds,
            "headline": asdict(result.best),
            "cells": [asdict(cell) for cell in result.outcome.results],
        }
        for result in results
    ]
    write_json(paths[0], about | {"epochs": rows, "best_epoch": _best(results).epoch})
    write_text(paths[1], as_markdown(title, _tables(results, about), _closing(results)))
    cells = [result.best for result in results]
    test = "test (95 % interval)"
    lines = {
        test: [100 * cell.test_accuracy for cell in cells],
        "held-out 10 % of train": [100 * cell.validation_accuracy for cell in cells],
    }
    half = [half_width(cell.test_interval) for cell in cells]
    epochs = [result.epoch for result in results]
    curves(paths[2], epochs, lines, title, "epoch", "accuracy in %", spread={test: half})
    return paths


def _tables(results: list[EpochResult], about: dict) -> dict[str, list[list[str]]]:
    heading = (
        f"accuracy in % on the held-out 10 % of train ({about['n_validation']:,} images), which "
        f"picks, and on test ({about['n_test']:,} images; in brackets the 95 % interval)"
    )
    header, rows = ["epoch", "held-out", "test"], []
    for result in results:
        cell = result.best
        on_test = with_interval(cell.test_accuracy, cell.test_interval)
        rows.append([str(result.epoch), percent(cell.validation_accuracy), on_test])
    if len({result.best.name for result in results}) > 1:  # else the title has it
        header.append("cell")
        rows = [[*row, result.best.name] for row, result in zip(rows, results, strict=True)]
    return {heading: [header, *rows]}


def _best(results: list[EpochResult]) -> EpochResult:
    return max(results, key=lambda result: result.best.validation_accuracy)


def _closing(results: list[EpochResult]) -> list[str]:
    honest = _best(results)
    tops = [(best_on_test(result.outcome.results), result.epoch) for result in results]
    top, epoch = max(tops, key=lambda pair: pair[0].test_accuracy)
    return [
        f"picked on the held-out images: epoch {honest.epoch}, {headline(honest.best)}",
        f"{PICKED_ON_TEST}: epoch {epoch}, {top.name}: test {percent(top.test_accuracy)} %",
    ]
