"""What the documents say holds: commands parse, figures are those of results/, links work.

A figure names its source in its own link, `[68.06 (67.1–69.0)](FILE.json "headline")`: see
"Figures in texts" in CONTRIBUTING.md.
"""

import argparse
import importlib
import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

from cli import pick_config

DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("benchmarks/*.md"),
        *ROOT.glob("config/**/README.md"),
        *ROOT.glob("results/**/README.md"),
    ]
)
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`([^`]+)`")
SHELL_VARIABLE = re.compile(r'\b([A-Z])="([^"]*)"')  # a document's own, as in S="--sampler heun"
LINK = re.compile(r"(?:\]\(|<img src=\")(?P<target>[^)\"\s]+)")  # of a link or a picture
FIGURE = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<file>[^)\s]+) \"(?P<where>[^\"]+)\"\)")
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?")
CELL = re.compile(r"(?P<block>[\w+]+) at (?P<level>t|sigma) ?= ?(?P<value>[\d.+]+)")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code(text: str) -> str:
    return INLINE_CODE.sub("", FENCE.sub("", text))


# --- commands


def commands_of(path: Path) -> list[str]:
    """Every command line of a document, in a block or in a sentence, its variables put in."""
    text = path.read_text().replace("\\\n", " ")
    lines = []
    for fence in FENCE.finditer(text):
        if fence["info"] not in ("python", "bibtex"):
            lines += fence["text"].splitlines()
    lines += INLINE_CODE.findall(FENCE.sub("", text))
    for letter, value in SHELL_VARIABLE.findall(text):
        lines = [line.replace(f"${letter}", value) for line in lines]
    return list(dict.fromkeys(line.strip() for line in lines if words_of(line)))


def words_of(line: str) -> list[str]:
    """The words of a command from `python`, `torchrun` or `make` on; none for another line."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # an apostrophe: a sentence
        return []
    starts = [i for i, word in enumerate(words) if word in ("python", "torchrun", "make")]
    words = words[starts[0] :] if starts else []
    return words if len(words) > 1 and is_ours(words) else []


def is_ours(words: list[str]) -> bool:
    if words[0] == "make":
        return words[1].isidentifier() or "-" in words[1]
    return any(word.endswith(".py") or word.startswith("benchmarks.") for word in words)


def parse(words: list[str]) -> argparse.Namespace | None:
    """What the job's own parser makes of a command; None for a target of make that is no job."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        given = dict(word.split("=", 1) for word in words[2:])
        assert set(given) <= {"CONFIG", "ARGS"}
        if words[1] != "reproduce":
            return None
        config = ["--config", given.get("CONFIG", "config/digits.yaml")]
        return importlib.import_module("reproduce").parse_args(
            config + shlex.split(given.get("ARGS", ""))
        )
    at = next(i for i, w in enumerate(words) if w.endswith(".py") or w.startswith("benchmarks."))
    module = words[at].removesuffix(".py")
    return importlib.import_module(module).parse_args(words[at + 1 :])


COMMANDS = [(path, command) for path in DOCUMENTS for command in commands_of(path)]


@pytest.mark.parametrize(
    ("path", "command"), COMMANDS, ids=[f"{name(path)}: {command}" for path, command in COMMANDS]
)
def test_a_command_is_one_that_its_job_takes(path, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    if "--help" in command:
        with pytest.raises(SystemExit) as end:
            parse(words_of(command))
        assert end.value.code == 0
        return
    args = parse(words_of(command))  # refused: SystemExit or UserError, and pytest shows why
    if args is None:
        return
    names_config = any(getattr(args, key, None) for key in ("config", "dataset"))
    checkpoint = getattr(args, "ckpt", None) or ""
    if not checkpoint.startswith("results/"):
        args.ckpt = None  # it is not here; the config beside it is
    if names_config and not (args.config or "").startswith("their"):  # somebody else's
        pick_config(args)
    if checkpoint.startswith("results/") and not name(path).startswith("results/"):
        assert Path(checkpoint).exists()  # what results/ tells may be of an earlier commit


def test_commands_are_found():
    """So that the test above cannot pass by finding nothing."""
    found = {words_of(command)[1] for path, command in COMMANDS if path == ROOT / "README.md"}
    assert {"train.py", "linear.py", "visualize_features.py", "sample.py", "fid.py"} <= found
    assert "reproduce" in found


# --- figures


@cache
def read(path: Path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return json.loads(path.read_text())


def hours_of(rows: list[dict], batch_size: int) -> float:
    """Time of the training steps of a metrics.jsonl, without measuring and drawing."""
    seconds, before = 0.0, 0
    for row in rows:
        if row["kind"] == "train":
            seconds += (row["step"] - before) * batch_size / row["images_per_s"]
            before = row["step"]
    return seconds / 3600


def is_cell(record: dict, cell: re.Match) -> bool:
    noise = cell["value"]  # several are side by side: "1+11"
    noise = noise if "+" in noise else float(noise)
    return (record["block"], record[cell["level"]]) == (cell["block"], noise)


def value_at(path: Path, where: str) -> float | dict:
    """What a figure's source holds.

    where: a cell ("out_2 at t=21", "out_1 at sigma=0.06"), or keys and places in a list with dots
    between ("headline", "sets.1"). "images seen" is of a probe's file, "hours at batch 64" of a
    metrics.jsonl.
    """
    content = read(path)
    if where == "images seen":  # an epoch leaves out the batch that is not full
        batch = content["config"]["batch_size"]
        return content["n_train"] // batch * batch * (content["epoch"] + 1)
    if where.startswith("hours at batch "):
        return hours_of(content, int(where.split()[-1]))
    if cell := CELL.fullmatch(where):
        return next(found for found in content["cells"] if is_cell(found, cell))
    for part in where.split("."):
        content = content[int(part)] if isinstance(content, list) else content[part]
    return content


def numbers_of(value: float | dict) -> list[float]:
    """The numbers that may be shown: of an accuracy or a share with its interval, in %."""
    if not isinstance(value, dict):
        return [value]
    names = (("test_accuracy", "test_interval"), ("test_mean", "test_std"), ("share", "interval"))
    share, spread = next(pair for pair in names if pair[0] in value)
    more = value[spread] if isinstance(value[spread], list) else [value[spread]]
    return [100 * number for number in (value[share], *more)]


def shown(number: float, like: str) -> str:
    decimals = len(like.partition(".")[2])
    return f"{number:,.{decimals}f}" if "," in like else f"{number:.{decimals}f}"


FIGURES = [
    (path, match["text"], match["file"], match["where"])
    for path in DOCUMENTS
    for match in FIGURE.finditer(FENCE.sub("", path.read_text()))
]


@pytest.mark.parametrize(
    ("path", "text", "file", "where"), FIGURES, ids=[f"{name(f[0])}: {f[1]}" for f in FIGURES]
)
def test_a_figure_is_that_of_its_file(path, text, file, where):
    value = value_at(path.parent / file, where)
    if cell := CELL.fullmatch(text):
        assert is_cell(value, cell), (value["block"], value[cell["level"]])
        return
    written = NUMBER.findall(text)
    assert written, f"[{text}] shows no number"
    expected = [shown(n, like) for n, like in zip(numbers_of(value), written, strict=False)]
    assert written == expected


def test_every_figure_of_the_results_has_a_source():
    section = (ROOT / "README.md").read_text().partition("\n## Results\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) > 4
    for row in rows:
        left = re.sub(r"\[[^\]]+\]\([^)]+\)", "", row)
        assert not re.search(r"\d\.\d", left), f"without a link to its source: {row}"


def test_an_output_is_that_of_its_file():
    """A block marked `text results/.../x.txt` holds lines of that file; "..." leaves some out."""
    blocks = 0
    for path in DOCUMENTS:
        for fence in FENCE.finditer(path.read_text()):
            if fence["info"].startswith("text results/"):
                blocks += 1
                lines = (ROOT / fence["info"].removeprefix("text ")).read_text().splitlines()
                quoted = [line for line in fence["text"].splitlines() if line != "..."]
                assert not set(quoted) - set(lines), (name(path), fence["info"])
    assert blocks


# --- links


def anchors_of(path: Path) -> set[str]:
    """As GitHub makes them of the headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_and_pictures_lead_somewhere(path):
    for match in LINK.finditer(without_code(path.read_text())):
        target, _, anchor = match["target"].partition("#")
        if target.startswith(("http://", "https://")):
            continue
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), f"{name(path)}: {target} is not there"
        assert not anchor or anchor in anchors_of(file), f"{name(path)}: {match['target']}"


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    for page in [*ROOT.glob("docs/*.md"), ROOT / "config" / "paper" / "README.md"]:
        assert f"({name(page)}" in readme, name(page)
