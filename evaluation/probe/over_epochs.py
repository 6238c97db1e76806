"""One probe over the checkpoints of a run: how the features come about while it trains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoint import find, load_denoiser, saved_epochs
from config import Config
from evaluation.plots import curves
from evaluation.probe.cells import CellResult, Outcome
from evaluation.probe.features import model_source
from evaluation.probe.grid import (
    PICKED,
    PICKED_ON_TEST,
    SIDE_BY_SIDE,
    Rows,
    headline,
    held_out,
    on_test,
)
from evaluation.probe.probe import Probe
from evaluation.tables import as_markdown, as_text, ends, percent
from support.files import write_json, write_text
from utils import compile_network, log


@dataclass(frozen=True)
class EpochResult:
    """What the probe found at one checkpoint."""

    epoch: int
    checkpoint: Path
    fingerprint: str
    outcome: Outcome

    def record(self) -> dict:
        """What the file says of it."""
        return {
            "epoch": self.epoch,
            "checkpoint": str(self.checkpoint),
            "fingerprint": self.fingerprint,
            "seconds": self.outcome.seconds,
            **self.outcome.headlines(),
            "cells": [cell.record() for cell in self.outcome.results],
        }


def probe_epochs(
    probe: Probe,
    epochs: list[int],
    config: Config,
    use_amp: bool,
    compiles: bool = False,
    input_scale: str | None = None,
) -> list[EpochResult]:
    """Probes model_<epoch>.pth of these epochs, or of all where `epochs` is empty.

    What was finished before is kept, see `Probe.kept`. Raises UserError, before any is probed, if
    a checkpoint is not there.
    """
    epochs = sorted(set(epochs)) or saved_epochs(config.save_dir)
    results = []
    for epoch, path in [(epoch, find(config.save_dir, epoch)) for epoch in epochs]:
        model = load_denoiser(path, probe.device, config, input_scale=input_scale)
        if compiles:
            compile_network(model.denoiser.net, probe.device)
        source = model_source(model, use_amp)
        outcome = probe.kept(source, config.seed)
        results.append(EpochResult(epoch, path, source.fingerprint, outcome))
        log.info(f"epoch {epoch}: {headline(outcome.best() or outcome.best(combined=True))}")
    return results


UNTRAINED = -1  # its place among the epochs, which count from 0


@dataclass(frozen=True)
class EpochCurve:
    """The best cell of each epoch, picked on the held-out images; of combined cells likewise, as
    a curve of its own.

    about: the facts that its files record. untrained: what the same probe found in the same cells
    of the untrained network, if that is known: the curve begins with it.
    """

    OVER = "epochs"  # what the probe was done over, in the names of its files

    results: Sequence[EpochResult]
    title: str
    about: Mapping
    untrained: Sequence[CellResult] = ()

    def best_epoch(self, combined: bool = False) -> EpochResult | None:
        """The epoch whose cell is best on the held-out images; None without such cells."""
        return max(
            (result for result in self.results if result.outcome.best(combined)),
            key=lambda result: result.outcome.best(combined).validation_accuracy,
            default=None,
        )

    def text(self) -> str:
        """What the job prints: one row per epoch, and the best epoch."""
        return as_text(self.title, self._tables(), self._closing())

    def save(self, stem: Path) -> list[Path]:
        """Writes <stem>.json, .md and .png. Returns the paths."""
        paths = [Path(f"{stem}.{suffix}") for suffix in ("json", "md", "png")]
        best = {
            "best_epoch": self.best_epoch(),
            "best_epoch_combined": self.best_epoch(combined=True),
        }
        record = {
            "untrained": [cell.record() for cell in self.untrained],
            "epochs": [result.record() for result in self.results],
            **{name: result and result.epoch for name, result in best.items()},
        }
        write_json(paths[0], {**self.about, **record})
        write_text(paths[1], as_markdown(self.title, self._tables(), self._closing()))
        lines, bars = {}, {}
        for name, cells in self._curves().items():
            test = f"{name}test (95 % interval)"
            lines[test] = [100 * cell.test_accuracy for cell in cells]
            lines[f"{name}held-out images of train"] = [100 * c.validation_accuracy for c in cells]
            bars[test] = [ends(cell.test_interval) for cell in cells]
        x_label = f"epoch ({UNTRAINED}: untrained)" if self.untrained else "epoch"
        epochs = list(self._outcomes())
        curves(paths[2], epochs, lines, self.title, x_label, "accuracy in %", bars=bars)
        return paths

    def _outcomes(self) -> dict[int, Outcome]:
        """{epoch: what was found}, the untrained network first where it is known."""
        before = {UNTRAINED: Outcome(list(self.untrained), 0.0, None)} if self.untrained else {}
        return before | {result.epoch: result.outcome for result in self.results}

    def _curves(self) -> dict[str, list[CellResult]]:
        """{what stands before its names: the best cell of every epoch}."""
        both = {
            prefix: [outcome.best(combined) for outcome in self._outcomes().values()]
            for prefix, combined in (("", False), (f"{SIDE_BY_SIDE}: ", True))
        }
        return {prefix: cells for prefix, cells in both.items() if all(cells)}

    def _tables(self) -> dict[str, Rows]:
        where = f"{held_out(self.about)}, which picks, and {on_test(self.about)}"
        return {
            f"{prefix}accuracy in % {where}": self._rows(cells)
            for prefix, cells in self._curves().items()
        }

    def _rows(self, cells: Sequence[CellResult]) -> Rows:
        header, rows = ["epoch", "held-out", "test"], []
        for epoch, cell in zip(self._outcomes(), cells, strict=True):
            name = "untrained" if epoch == UNTRAINED else str(epoch)
            rows.append([name, percent(cell.validation_accuracy), cell.on_test])
        if len({cell.name for cell in cells}) > 1 or len(self._curves()) > 1:
            header.append("cell")  # else the title has it
            rows = [[*row, cell.name] for row, cell in zip(rows, cells, strict=True)]
        return [header, *rows]

    def _closing(self) -> list[str]:
        lines = []
        if honest := self.best_epoch():
            tops = [(result.outcome.best_on_test(), result.epoch) for result in self.results]
            top, epoch = max(tops, key=lambda pair: pair[0].test_accuracy)
            lines = [
                f"{PICKED}: epoch {honest.epoch}, {headline(honest.outcome.best())}",
                f"{PICKED_ON_TEST}: epoch {epoch}, {top.name}: test {percent(top.test_accuracy)} %",
            ]
        if combined := self.best_epoch(combined=True):
            cell = headline(combined.outcome.best(combined=True))
            lines.append(f"{SIDE_BY_SIDE}, {PICKED}: epoch {combined.epoch}, {cell}")
        return lines
