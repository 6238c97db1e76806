"""Imports run downwards: the map of rooms in CONTRIBUTING.md, held to by each file's syntax."""

import ast
from pathlib import Path

import pytest
from conftest import JOBS, ROOT

FLOORS = [  # from the top; a room may import those on floors below, and itself
    {*JOBS, "export"},
    {"benchmarks"},
    {"training", "cli"},
    {"evaluation"},
    {"sampling"},
    {"checkpoint", "datasets"},
    {"model", "readers"},
    {"config", "utils", "arguments"},
    {"support"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
KNOWS_ARGPARSE = {*FLOORS[0], "benchmarks", "cli", "arguments"}


def room(name: str) -> str:
    return name.split(".")[0]


def sources() -> list[Path]:
    inside = [path for name in FLOOR for path in (ROOT / name).rglob("*.py")]
    return [*ROOT.glob("*.py"), *inside]


def imports(tree: ast.AST) -> set[str]:
    """The rooms and libraries that a file imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {room(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names.add(room(node.module))
    return names


def wrong(where: str, imported: set[str]) -> list[str]:
    """The imports that a file of the room `where` may not have."""
    upwards = [name for name in imported if name in FLOOR and FLOOR[name] <= FLOOR[where]]
    if where not in KNOWS_ARGPARSE:
        upwards += {"argparse"} & imported
    return sorted(set(upwards) - {where})


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path):
    where = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert where in FLOOR, "a file without a floor: put it on the map"
    assert wrong(where, imports(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(("where", "text", "found"), [
    ("linear", "from sample import draw", ["sample"]),
    ("evaluation", "def f():\n    import training.trainer", ["training"]),
    ("training", "import argparse, cli", ["argparse", "cli"]),
    ("config", "from utils import log", ["utils"]),
    ("linear", "import argparse\nfrom evaluation.probe import features", []),
])  # fmt: skip
def test_what_the_map_forbids(where, text, found):
    assert wrong(where, imports(ast.parse(text))) == found


def test_the_map_is_in_contributing():
    words = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in set(FLOOR) - FLOORS[0]:
        assert f"| `{name}" in words
