"""Figures: what stands in them, and that they are files that open at a size that can be read."""

import warnings

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from evaluation.fonts import fonts_with
from evaluation.plots import curves, heat_map, image_grids, scatter
from evaluation.tables import ends, wilson_interval
from support.errors import UserError


def words(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (8, 3)])
def test_a_heat_map_holds_every_number_and_frames_the_best(tmp_path, rows, columns):
    tables = {name: np.random.default_rng(0).random((rows, columns)) for name in ("a", "b")}
    path = tmp_path / "map.png"
    names = [f"out_{i}" for i in range(rows)], [f"t={i}" for i in range(columns)]
    figure = heat_map(path, tables, *names, "title", "accuracy in %", (0, 0))
    found = words(figure)
    for word in ("a", "b", "title", "accuracy in %", *names[0], *names[1]):
        assert word in found
    assert all(f"{value:.2f}" in found for value in tables["a"].ravel())
    pixels = np.array(Image.open(path).convert("RGB")).astype(int)
    assert pixels.shape[1] >= 2 * columns * 90  # room for "12.34" in every cell
    assert pixels.shape[0] >= rows * 45
    red = (pixels[..., 0] > 240) & (pixels[..., 1:] < 20).all(axis=-1)
    assert red.sum() > 500
    assert [file.name for file in tmp_path.iterdir()] == ["map.png"]


@pytest.mark.parametrize("n_classes", [2, 15, 100])
def test_scatter_gives_every_class_its_colour(tmp_path, n_classes):
    labels = np.arange(200) % n_classes
    points = np.stack([labels, np.arange(200)], axis=1).astype(np.float32)
    path = tmp_path / "points.png"
    names = [f"class {i}" for i in range(n_classes)]
    figure = scatter(path, points, labels, names, "title")
    assert set(names) <= set(words(figure)) or n_classes == 100
    colours = Image.open(path).convert("RGB").getcolors(maxcolors=1_000_000)
    vivid = {c for n, c in colours if n > 3 and max(c) - min(c) > 40}
    assert len(vivid) >= min(n_classes, 2 * n_classes // 3 + 1)


NAMES = ["_private", "$1", "a$b$c", r"$\frac$", "猫", "plain"]


def test_names_that_people_chose_are_shown_as_they_are(tmp_path):
    """A leading _ would hide a class, a $ would be mathematics, or end in an error."""
    labels = np.arange(60) % len(NAMES)
    points = np.stack([labels, np.arange(60)], axis=1)
    grid = np.zeros((3, 12, 12), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = [
            scatter(tmp_path / "a.png", points, labels, NAMES, "title"),
            image_grids(tmp_path / "b.png", [("grid", grid)], NAMES, "title"),
        ]
    for figure in figures:
        texts = {text.get_text(): text for text in figure.findobj(Text)}
        assert set(NAMES) <= set(texts)
        assert not any(texts[name].get_parse_math() for name in NAMES)


def test_characters_come_from_a_font_that_has_them_or_are_named():
    families, lacking = fonts_with(frozenset("a猫\U0010fffd"))
    assert "a" not in lacking
    assert ("猫" in lacking) == (not families)


def test_curves_leave_out_what_is_not_there(tmp_path):
    figure = curves(tmp_path / "a.png", [5, 9, 10], {"a": [1.0, None, 0.5]}, "title", "x", "y")
    (line,) = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert line.get_xydata().tolist() == [[5, 1.0], [10, 0.5]]
    assert {"title", "x", "y"} <= set(words(figure))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a"]


def test_error_bars_end_where_the_interval_does(tmp_path):
    found = {n: wilson_interval(part, n) for n, part in ((360, 1.0), (361, 350 / 361))}
    bars = {"a": [ends(interval) for interval in found.values()]}
    lines = {"a": [100.0, 100 * 350 / 361]}
    figure = curves(tmp_path / "a.png", [0, 1], lines, "title", "x", "y", bars=bars)
    (drawn,) = figure.axes[0].collections
    for segment, (low, high) in zip(drawn.get_segments(), found.values(), strict=True):
        assert segment[:, 1] == pytest.approx([100 * low, 100 * high])
        assert high <= 1


@pytest.mark.parametrize("n", [2, 20, 28])
def test_every_line_has_its_colour(tmp_path, n):
    lines = {f"block_{i}": [1.0] for i in range(n)}
    figure = curves(tmp_path / "a.png", [1], lines, "title", "x", "y")
    colours = [line.get_color() for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert len(set(map(tuple, colours))) == n


def test_curves_have_notes_beside_the_points_that_are_there(tmp_path):
    lines, notes = {"a": [1.0, None, 0.5]}, {"a": ["first", "absent", "last"]}
    figure = curves(tmp_path / "a.png", [5, 9, 10], lines, "title", "x", "y", notes=notes)
    assert {"first", "last"} <= set(words(figure))
    assert "absent" not in words(figure)


def test_a_folder_that_cannot_be_written_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        scatter(tmp_path / "file" / "a.png", np.zeros((2, 2)), np.zeros(2), ["x"], "title")
