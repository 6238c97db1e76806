"""The report of a whole chain: one Markdown file beside the run's results."""

import platform
import shlex
from datetime import date
from pathlib import Path

from checkpoint import TrainedModel, versions
from evaluation.tables import best_cell_of_last_grid, file_stem, with_interval
from support.files import read_json, replacing


def write_report(model: TrainedModel, steps: dict[str, dict], protocol: str, samples: Path) -> Path:
    """Writes <save_dir>/report.md from the files that the jobs left there. Returns its path.

    steps: {name: {"command", "seconds", "left_out"}} in the order in which they ran;
    samples: the folder of the set that sample.py drew. Raises UserError if a file is damaged.
    """
    folder = Path(model.config.save_dir)
    path = folder / "report.md"
    t, block, _ = best_cell_of_last_grid(folder)  # there is one: the chain ran it
    sections = [
        f"# {model.config.dataset}, epoch {model.epoch}",
        _facts(model),
        "## Linear probe",
        _headlines(folder, protocol),
        _grids(folder, protocol),
        f"## Features of {block} at t = {t}",
        f"![t-SNE](tsne_ep{model.epoch}_t{t}_{block}.png)",
        "## Samples",
        f"![samples]({(samples / 'grid.png').relative_to(folder)})",
        _fid(samples, steps["fid"]),
        "## Commands",
        _commands(steps),
    ]
    with replacing(path) as temporary:
        temporary.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
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


def _headlines(folder: Path, protocol: str) -> str:
    rows = ["| probed | cell | test accuracy in % (95 % interval) |", "|---|---|---|"]
    for name, baseline in (
        ("trained network", None),
        ("untrained network", "random"),
        ("raw pixels", "pixels"),
    ):
        record = read_json(folder / f"{file_stem(None, protocol, baseline)}.json")
        best = record["headline"]
        accuracy = with_interval(best["test_accuracy"], best["test_interval"])
        rows.append(f"| {name} | {best['block']} at t={best['t']} | {accuracy} |")
    return "\n".join(rows)


def _grids(folder: Path, protocol: str) -> str:
    stem = file_stem(None, protocol, None)
    untrained = file_stem(None, protocol, "random")
    texts = [(folder / f"{name}.md").read_text(encoding="utf-8") for name in (stem, untrained)]
    return f"{texts[0]}\n![accuracies of the grid]({stem}.png)\n\n{texts[1]}"


def _fid(samples: Path, step: dict) -> str:
    if step["left_out"]:
        return f"FID: left out. {step['left_out']}"
    record = read_json(samples / "fid.json")
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
