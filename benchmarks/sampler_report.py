"""The benchmark of samplers as text, Markdown and a plot."""

from collections.abc import Callable
from pathlib import Path

from evaluation.fid.frechet import score_name
from evaluation.plots import curves
from evaluation.tables import as_markdown, as_text
from model.samplers import SAMPLERS
from support.files import write_text

BASELINE = "ddim"  # what the seconds are compared with
ERROR = (
    "distance to the exact images from the same noise: rms over all pixels, in [-1, 1], in "
    "brackets the median of the images' own"
)
AXIS = "rms distance to the exact images (pixels in [-1, 1])"
NO_FID = "no FID: --fid adds it, for 5,000 images of each place; it needs pytorch-fid's weights"

Rows = dict[tuple[str, int], dict]  # (sampler, evaluations at most) -> what was measured


def tables(rows: Rows, clock: str, fid: bool) -> dict[str, list[list[str]]]:
    """Heading -> sampler x evaluations, the first row being the header."""

    def error(name: str, evaluations: int) -> str:
        row = rows[name, evaluations]
        return f"{row['error']:.2g} ({row['median_error']:.2g})"

    def ms(name: str, evaluations: int) -> str:
        seconds = rows[name, evaluations]["seconds_per_image"]
        ratio = seconds / rows[BASELINE, evaluations]["seconds_per_image"]
        return f"{1000 * seconds:.1f} ({ratio:.2f})"

    def score(name: str, evaluations: int) -> str:
        return f"{rows[name, evaluations]['fid']['value']:.2f}"

    names = list(dict.fromkeys(name for name, _ in rows))
    found = {
        ERROR: _table(rows, [name for name in names if SAMPLERS[name].deterministic], error),
        f"ms of {clock} per image, in brackets as a multiple of {BASELINE}": _table(
            rows, names, ms
        ),
    }
    if fid:
        images = next(iter(rows.values()))["fid"]["images"]
        found[f"{score_name(images)} against all training images"] = _table(rows, names, score)
    return found


def _table(rows: Rows, names: list[str], text: Callable[[str, int], str]) -> list[list[str]]:
    budgets = list(dict.fromkeys(evaluations for _, evaluations in rows))
    body = [[name, *(text(name, evaluations) for evaluations in budgets)] for name in names]
    return [["evaluations of D", *map(str, budgets)], *body]


def closing(rows: Rows, reference: dict, fid: bool) -> list[str]:
    """What the tables do not say."""
    fewer: dict[str, list[str]] = {}
    for (name, _), row in rows.items():
        if SAMPLERS[name].per_step > 1:
            fewer.setdefault(name, []).append(str(row["evaluations"]))
    lines = [
        f"{name} takes {SAMPLERS[name].per_step} evaluations a step and one in the last: "
        f"{', '.join(taken)} here"
        for name, taken in fewer.items()
    ]
    distance = reference["distance_to_half_the_steps"]
    lines.append(
        f"the exact images: {reference['sampler']}, {reference['steps']:,} steps; they are "
        f"{distance:.1e} away from those of half the steps"
    )
    return lines if fid else [*lines, NO_FID]


def write_sampler_tables(
    folder: Path, rows: Rows, title: str, clock: str, reference: dict, fid: bool
) -> list[Path]:
    """Writes samplers.md and samplers.png to `folder`, then prints the tables. Returns the paths.

    `clock` is what the seconds are of, `reference` says how the exact images were made. Raises
    UserError if a file cannot be written.
    """
    found, lines = tables(rows, clock, fid), closing(rows, reference, fid)
    paths = [folder / "samplers.md", folder / "samplers.png"]
    write_text(paths[0], as_markdown(title, found, lines))
    _plot(paths[1], rows, title)
    print(as_text(title, found, lines))
    return paths


def _plot(path: Path, rows: Rows, title: str) -> None:
    """Errors over the true number of evaluations."""
    lines: dict[str, dict[int, float]] = {}
    for (name, _), row in rows.items():
        if row["error"] is not None:
            lines.setdefault(name, {})[row["evaluations"]] = row["error"]
    x = sorted({evaluations for line in lines.values() for evaluations in line})
    curves(
        path, x, {name: [line.get(e) for e in x] for name, line in lines.items()}, title,
        "evaluations of D", AXIS, log_x=True, log_y=True,
    )  # fmt: skip
