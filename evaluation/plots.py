"""Every figure of the project, as PNG files; each function also returns the figure.

Matplotlib is imported where something is drawn: no job waits for it before it has work.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from datasets import to_uint8
from evaluation.fonts import as_written
from support.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure, SubFigure

LEGEND_MARKER = 60  # area in points squared, whatever the size of the points
LEGEND_CLASSES = 40  # more names than this cannot be read beside a figure


def subject(dataset: str, process: str) -> str:
    """What a figure is about, for its title: "cifar10 (DDPM)"."""
    return f"{dataset} ({process})"


def heat_map(
    path: Path,
    tables: dict[str, np.ndarray],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    colour_label: str,
    marked: tuple[int, int],
) -> "Figure":
    """One panel per table, (len(rows), len(columns)), on a common colour scale.

    `marked`, a (row, column), is framed in every panel. Raises UserError if `path` cannot be
    written.
    """
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    size = (len(tables) * (1.8 + 0.85 * len(columns)) + 1.2, 1.7 + 0.45 * len(rows))
    figure = _new_figure(max(size[0], 7.0), max(size[1], 2.8))
    axes = figure.subplots(1, len(tables), squeeze=False)[0]
    values = np.concatenate([table.ravel() for table in tables.values()])
    scale = Normalize(values.min(), max(values.max(), values.min() + 1))
    for ax, (name, table) in zip(axes, tables.items(), strict=True):
        image = ax.imshow(table, cmap="viridis", norm=scale, aspect="auto")
        for (i, j), value in np.ndenumerate(table):
            colour = "black" if scale(value) > 0.6 else "white"
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour)
        row, column = marked
        ax.add_patch(
            Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2.5)
        )
        ax.set_title(name, fontsize=10)
        ax.set_xticks(range(len(columns)), columns)
        ax.set_yticks(range(len(rows)), rows)
    figure.colorbar(image, ax=axes, label=colour_label)
    figure.suptitle(title, fontsize=11)
    return _save(figure, path)


def scatter(
    path: Path, points: np.ndarray, labels: np.ndarray, class_names: Sequence[str], title: str
) -> "Figure":
    """points: (N, 2), coloured by labels: (N,) in 0 .. len(class_names) - 1.

    Raises UserError if `path` cannot be written.
    """
    wide, high = np.ptp(points, axis=0) + 1e-9  # all may be in one place
    figure = _new_figure(8.5, 0.5 + 6.5 * np.clip(high / wide, 0.5, 1.2))  # that of the points
    ax = figure.subplots()
    n = len(class_names)
    name = "tab10" if n <= 10 else "tab20" if n <= 20 else "gist_rainbow"
    colours = _colour_map(name)
    size = np.clip(15_000 / len(points), 4, 30)  # square points
    for label in range(n):
        chosen = points[labels == label]
        colour = colours(label) if n <= 20 else colours(label / (n - 1))
        ax.scatter(*chosen.T, s=size, color=colour, label=str(label), alpha=0.8, linewidths=0)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_aspect("equal", adjustable="datalim")
    ax.set_title(title, fontsize=11)
    if n <= LEGEND_CLASSES:
        legend = figure.legend(loc="outside right center", frameon=False, ncols=1 + n // 21)
        for handle in legend.legend_handles:
            handle.set_sizes([LEGEND_MARKER])
        style = as_written(class_names)
        for text, name in zip(legend.get_texts(), class_names, strict=True):
            text.set(text=name, **style)  # as a label, a name that begins with _ would be hidden
    return _save(figure, path)


def curves(
    path: Path,
    x: Sequence[float],
    lines: dict[str, Sequence[float | None]],
    title: str,
    x_label: str,
    y_label: str,
    bars: dict[str, Sequence[tuple[float, float]]] | None = None,
    log_x: bool = False,
    log_y: bool = False,
    notes: dict[str, Sequence[str]] | None = None,
) -> "Figure":
    """One line of len(x) values per name, with points; `bars` gives the ends of error bars, low and
    high, and `notes` words beside the points.

    None among the values: no point there. Raises UserError if `path` cannot be written.
    """
    figure = _new_figure(8.0, 5.0)
    ax = figure.subplots()
    _draw_lines(ax, x, lines, x_label, y_label, bars, log_x, log_y)
    if notes:
        _write_notes(ax, x, lines, notes)
    ax.set_title(title, fontsize=11)
    figure.legend(loc="outside right center", frameon=False)
    return _save(figure, path)


def curve_panels(
    path: Path,
    x: Sequence[float],
    panels: dict[str, dict[str, Sequence[float]]],
    title: str,
    x_label: str,
) -> "Figure":
    """The lines of `curves`, one panel per y label, side by side; all with the same names.

    Raises UserError if `path` cannot be written.
    """
    figure = _new_figure(5.5 * len(panels) + 1, 4.5)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (y_label, lines) in zip(axes, panels.items(), strict=True):
        _draw_lines(ax, x, lines, x_label, y_label)
    figure.suptitle(title, fontsize=11)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False)
    return _save(figure, path)


def _draw_lines(
    ax: "Axes",
    x: Sequence[float],
    lines: dict[str, Sequence[float | None]],
    x_label: str,
    y_label: str,
    bars: dict[str, Sequence[tuple[float, float]]] | None = None,
    log_x: bool = False,
    log_y: bool = False,
) -> None:
    from matplotlib.ticker import MaxNLocator

    colours = _colours(len(lines))
    for colour, (name, y) in zip(colours, lines.items(), strict=True):
        there = [j for j, value in enumerate(y) if value is not None]
        at, y, lengths = [x[j] for j in there], [y[j] for j in there], None
        if name in (bars or {}):
            ends = np.reshape([bars[name][j] for j in there], (-1, 2)).T  # low, high
            lengths = np.abs(ends - y)
        ax.errorbar(at, y, yerr=lengths, color=colour, label=name, marker="o", ms=4, capsize=3)
    if log_y:
        ax.set_yscale("log")
    whole = all(isinstance(value, int) for value in x)
    if log_x:
        ax.set_xscale("log")
        if whole:  # 10 and 100 alone would be too few
            _log_ticks(ax.xaxis)
    elif whole:  # no tick at epoch 0.5
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    ax.grid(alpha=0.3)


def _colours(n: int) -> Sequence:
    """Of n lines; more than there are names for are coloured in their order."""
    for name in ("tab10", "tab20"):
        if n <= len(colours := _colour_map(name).colors):
            return colours[:n]
    return _colour_map("viridis")(np.linspace(0, 0.95, n))


def _write_notes(
    ax: "Axes",
    x: Sequence[float],
    lines: dict[str, Sequence[float | None]],
    notes: dict[str, Sequence[str]],
) -> None:
    ax.margins(x=0.2)  # room for the first and the last words
    for i, (name, words) in enumerate(notes.items()):  # lines that lie close take turns
        offset, side = ((-5, 6), "right") if i % 2 else ((5, -11), "left")  # points
        for at, y, text in zip(x, lines[name], words, strict=True):
            if y is not None:
                ax.annotate(text, (at, y), offset, textcoords="offset points", fontsize=7, ha=side)


def _log_ticks(axis: "Axis") -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def loss_curve(
    path: Path,
    steps: Sequence[int],
    raw: Sequence[float],
    smoothed: Sequence[float],
    test: dict[int, float],
    title: str,
) -> "Figure":
    """The training loss at `steps`, as it is and smoothed, and that of the test images by step.

    Raises UserError if `path` cannot be written.
    """
    figure, ax = _loss_axes(title)
    blue, orange = _colour_map("tab10").colors[:2]
    ax.plot(steps, raw, color=blue, alpha=0.35, marker=".", label="train, raw")
    ax.plot(steps, smoothed, color=blue, label="train, smoothed")
    ax.plot(list(test), list(test.values()), "o", color=orange, label="test, EMA weights")
    ax.legend(frameon=False)
    return _save(figure, path)


def loss_by_bucket(
    path: Path, steps: Sequence[int], parts: dict[str, Sequence[float]], title: str
) -> "Figure":
    """One loss curve per part of the noise levels, coloured in their order; NaN is not drawn.

    Raises UserError if `path` cannot be written.
    """
    figure, ax = _loss_axes(title)
    colours = _colour_map("viridis")(np.linspace(0, 0.95, len(parts)))
    for colour, (name, losses) in zip(colours, parts.items(), strict=True):
        ax.plot(steps, losses, color=colour, marker=".", ms=3, label=name)
    figure.legend(loc="outside right center", frameon=False)
    return _save(figure, path)


def _loss_axes(title: str) -> tuple["Figure", "Axes"]:
    figure = _new_figure(8.0, 5.0)
    ax = figure.subplots()
    ax.set_yscale("log")
    _log_ticks(ax.yaxis)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel("loss")
    ax.grid(alpha=0.3, which="both")
    ax.set_title(title, fontsize=11)
    return figure, ax


def image_table(path: Path, images: Tensor, column_titles: Sequence[str], title: str) -> "Figure":
    """images: (rows, columns, C, H, W) uint8. Raises UserError if `path` cannot be written."""
    rows, columns = images.shape[:2]
    figure = _new_figure(max(1.1 * columns, 6.0), 1.1 * rows + 0.8)
    _show_images(figure, images, column_titles)
    figure.suptitle(title, fontsize=11)
    return _save(figure, path)


def image_grids(
    path: Path, grids: Sequence[tuple[str, np.ndarray]], row_titles: Sequence[str], title: str
) -> "Figure":
    """Titles and grids of images, (3, H, W) uint8, all of one size, side by side; the rows of
    images in them have `row_titles`. Raises UserError if `path` cannot be written."""
    height, width = grids[0][1].shape[1:]
    size = 0.5 * len(row_titles)
    figure = _new_figure(len(grids) * (size * width / height + 0.2) + 1.2, size + 0.9)
    axes = figure.subplots(1, len(grids), squeeze=False)[0]
    for ax, (name, grid) in zip(axes, grids, strict=True):
        ax.imshow(grid.transpose(1, 2, 0), interpolation="nearest")
        ax.set_title(name, fontsize=9)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_visible(False)
    centres = (np.arange(len(row_titles)) + 0.5) * height / len(row_titles)
    axes[0].set_yticks(centres, row_titles, fontsize=9, **as_written(row_titles))
    axes[0].tick_params(length=0)
    figure.suptitle(title, fontsize=11)
    return _save(figure, path)


def _show_images(
    figure: "Figure | SubFigure", images: Tensor, column_titles: Sequence[str]
) -> None:
    for (i, j), ax in np.ndenumerate(figure.subplots(*images.shape[:2], squeeze=False)):
        pixels = images[i, j].permute(1, 2, 0).numpy()
        ax.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=255)
        ax.set_axis_off()
        if i == 0:
            ax.set_title(column_titles[j], fontsize=9)


def forward_process(
    path: Path,
    images: Tensor,
    timesteps: Sequence[int],
    t: np.ndarray,
    signal: np.ndarray,
    noise: np.ndarray,
    title: str,
) -> "Figure":
    """images: (N, T, C, H, W) in [-1, 1], one row each; below them the weights of the image and
    of the noise, `signal` and `noise` (len(t),), over t. Raises UserError if `path` cannot be
    written."""
    rows, columns = images.shape[:2]
    figure = _new_figure(max(1.1 * columns, 6.0), 1.1 * rows + 3.2)
    above, below = figure.subfigures(2, 1, height_ratios=[1.1 * rows + 0.4, 2.8])
    _show_images(above, to_uint8(images), [f"t = {t}" if t else "clean" for t in timesteps])
    ax = below.subplots()
    ax.plot(t, signal, label="image")
    ax.plot(t, noise, label="noise")
    for shown in timesteps:
        if shown:
            ax.axvline(shown, color="grey", alpha=0.4, linewidth=0.8)
    ax.set_xlabel("t")
    ax.set_ylabel("weight (squares add up to 1)")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    return _save(figure, path)


def _new_figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _colour_map(name: str) -> "Colormap":
    import matplotlib

    return matplotlib.colormaps[name]


def _save(figure: "Figure", path: Path) -> "Figure":
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # said by as_written
        figure.savefig(temporary, format="png", dpi=150)
    return figure
