"""The report of a whole chain: one Markdown file beside the run's results."""

import platform
import shlex
from datetime import date
from pathlib import Path

from checkpoint import TrainedModel, versions
from evaluation.fid.image_sets import score_file
from evaluation.probe.cells import CellResult
from evaluation.probe.grid_files import GRID, best_cell, file_stem
from support.files import read_json, write_text

FID_FORM = {
    "name": str, "fid": int | float, "images": int,
    "reference": {"images": int, "dataset": str, "split": str},
}  # fmt: skip


def write_report(model: TrainedModel, steps: dict[str, dict], protocol: str, samples: Path) -> Path:
    """Writes <save_dir>/report.md from the files that the jobs left there. Returns its path.

    steps: {name: {"command", "seconds", "left_out"}} in the order in which they ran;
    samples: the folder of the set that sample.py drew. Raises UserError if a file is damaged.
    """
    folder = Path(model.config.save_dir)
    path = folder / "report.md"
    grid, best = best_cell(folder, model, protocol)
    ((t, block),) = best.cell.parts
    sections = [
        f"# {model.config.dataset}, {model.stage}",
        _facts(model),
        "## Linear probe",
        _headlines(grid, protocol),
        _grids(grid, protocol),
        f"## Features of {block} at t = {t}",
        f"![t-SNE](tsne_ep{model.epoch}_t{t}_{block}.png)",
        "## Samples",
        f"![samples]({(samples / 'grid.png').relative_to(folder)})",
        _fid(samples, steps["fid"]),
        "## Commands",
        _commands(steps),
    ]
    write_text(path, "\n\n".join(sections) + "\n")
    return path


def command_line(command: list[str]) -> str:
    """[".../python", ".../job.py", *arguments] as one would type it in the repository."""
    return shlex.join(["python", Path(command[1]).name, *command[2:]])


def _facts(model: TrainedModel) -> str:
    parameters = sum(p.numel() for p in model.denoiser.parameters())
    libraries = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        f"{parameters:,} parameters, weights {model.fingerprint()}; {date.today()}, "
        f"{platform.machine()}, Python {platform.python_version()}, {libraries}"
    )


def _headlines(grid: Path, protocol: str) -> str:
    rows = ["| probed | cell | test accuracy in % (95 % interval) |", "|---|---|---|"]
    for name, path in (
        ("trained network", grid),
        ("untrained network", _baseline(grid, protocol, "random")),
        ("raw pixels", _baseline(grid, protocol, "pixels")),
    ):
        best = CellResult.from_record(read_json(path, GRID)["headline"])
        rows.append(f"| {name} | {best.name} | {best.on_test} |")
    return "\n".join(rows)


def _grids(grid: Path, protocol: str) -> str:
    untrained = _baseline(grid, protocol, "random")
    trained, before = (p.with_suffix(".md").read_text(encoding="utf-8") for p in (grid, untrained))
    return f"{trained}\n![accuracies of the grid]({grid.with_suffix('.png').name})\n\n{before}"


def _baseline(grid: Path, protocol: str, baseline: str) -> Path:
    return grid.with_name(f"{file_stem(None, protocol, baseline)}.json")


def _fid(samples: Path, step: dict) -> str:
    if step["left_out"]:
        return f"FID: left out. {step['left_out']}"
    record = read_json(score_file(samples / "pngs"), FID_FORM)
    reference = record["reference"]
    return (
        f"{record['name']}: {record['fid']:.2f} ({record['images']:,} images against all "
        f"{reference['images']:,} of {reference['dataset']} {reference['split']})"
    )


def _commands(steps: dict[str, dict]) -> str:
    lines = [
        f"{command_line(step['command'])}   # {name}, {step['seconds']:.0f} s"
        + (", left out" if step["left_out"] else "")
        for name, step in steps.items()
    ]
    return "\n".join(["```", *lines, "```"])
