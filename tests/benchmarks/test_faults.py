"""Kills and their comparison are tried on a job that does wrong: a benchmark has to notice."""

import json
import random
import shutil
import signal

import pytest
import torch

from benchmarks import faults
from benchmarks.fault_compare import differences, half_written
from benchmarks.fault_jobs import Ended, Job, run_job
from benchmarks.fault_kills import Case, Work
from benchmarks.fault_places import checked

STUB = """
import sys, time
from pathlib import Path

def main(words):
    how = words[-1]
    if how == "raises":
        raise ValueError("a fault")
    if how == "hangs":
        time.sleep(600)
    if how == "says":
        print("words")
        raise SystemExit(2)
    run = Path(words[1]).parent / "run"
    run.mkdir(exist_ok=True)
    with (run / "lines.txt").open("a") as file:
        for i in range(20):
            file.write(f"line {i}\\n")
            file.flush()
            (run / ".a.1.tmp").touch()
            time.sleep(0.02)
            (run / ".a.1.tmp").unlink()
    return 0
"""


@pytest.fixture
def stub(tmp_path, monkeypatch) -> str:
    """A job that appends what it had written before, and whose last word says how it ends."""
    (tmp_path / "stub_job.py").write_text(STUB)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "stub_job"


@pytest.mark.parametrize(("how", "code", "says"), [
    ("says", 2, "words"), ("raises", 1, "ValueError: a fault"), ("hangs", None, ""),
])  # fmt: skip
def test_how_a_job_ends(stub, tmp_path, how, code, says):
    end = run_job(stub, [how], tmp_path / "log.txt", 1 if how == "hangs" else 60)
    assert (end.code, says in end.said, end.traceback) == (code, True, how == "raises")


def test_a_signal_ends_a_job(stub, tmp_path):
    job = Job(stub, ["hangs"], tmp_path / "log.txt")
    job.send(signal.SIGTERM)
    assert job.wait(60).code == -signal.SIGTERM


def test_a_job_that_does_its_work_twice_is_noticed(stub, tmp_path):
    row = Work(Case(stub), tmp_path / "work", None).measure(2, seed=0)
    assert row["tried"] == 2
    assert row["kills"] >= 2
    assert row["identical"] == 0
    assert {fault["what"] for fault in row["faults"]} == {"lines.txt: differs"}


def test_a_kill_while_a_file_is_written(stub, tmp_path):
    work = Work(Case(stub), tmp_path / "work", None)
    work.begin()
    assert work.killed(0.2, while_writing=True).code == -signal.SIGKILL
    assert half_written(work.run) == [".a.1.tmp"]


def test_a_job_that_fails_after_a_kill_is_named(tmp_path, monkeypatch):
    work = Work(Case("stub_job"), tmp_path / "work", None)
    monkeypatch.setattr(work, "killed", lambda *_, **__: Ended(1, "what it said"))
    work.seconds = 1.0
    assert work.killed_and_resumed(random.Random(0)) == (0, 0, ["ended with 1: what it said"])


def test_a_run_that_ends_before_its_kill_begins_anew(stub, tmp_path):
    work = Work(Case(stub), tmp_path / "work", None)
    work.alone()
    shutil.copytree(work.run, work.expected)
    work.seconds = 1000.0
    kills, _, _ = work.killed_and_resumed(random.Random(4))
    assert kills >= 1
    assert work.seconds < 60


# --- what differs


def change_weights(run):
    path = run / "a.pth"
    state = torch.load(path)
    state["net"]["w"][0] += 1e-7
    torch.save(state, path)


CHANGES = {
    "the same": (lambda run: None, []),
    "weights": (change_weights, ["a.pth: differs"]),
    "an unreadable checkpoint": (
        lambda run: (run / "a.pth").write_bytes(b"PK"), ["a.pth: cannot be read"]
    ),
    "a doubled line": (
        lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n' * 2),
        ["metrics.jsonl: differs"],
    ),
    "other times": (
        lambda run: (run / "report.md").write_text("accuracy 3, took 17.5 min"), []
    ),
    "another number": (
        lambda run: (run / "report.md").write_text("accuracy 4, took 2 s"), ["report.md: differs"]
    ),
    "another speed": (lambda run: (run / "a.json").write_text('{"seconds": 9, "n": 1}'), []),
    "another value": (
        lambda run: (run / "a.json").write_text('{"seconds": 1, "n": 2}'), ["a.json: differs"]
    ),
    "another picture": (lambda run: (run / "a.png").write_bytes(b"4"), ["a.png: differs"]),
    "a lost one": (lambda run: (run / "a.png").unlink(), ["missing: a.png"]),
    "a leftover": (lambda run: (run / ".a.png.1.tmp").touch(), ["left behind: .a.png.1.tmp"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_differences(tmp_path, name):
    expected, found = tmp_path / "expected", tmp_path / "found"
    expected.mkdir()
    torch.save({"net": {"w": torch.ones(3)}, "step": 1}, expected / "a.pth")
    (expected / "metrics.jsonl").write_text('{"step": 1}\n')
    (expected / "report.md").write_text("accuracy 3, took 2 s")
    (expected / "a.json").write_text('{"seconds": 1, "n": 1}')
    (expected / "a.png").write_bytes(b"3")
    shutil.copytree(expected, found)
    change, lines = CHANGES[name]
    change(found)
    result = differences(expected, found)
    assert len(result) == len(lines)
    assert all(line.startswith(start) for line, start in zip(result, lines, strict=True))


# --- places, and the whole


@pytest.mark.parametrize(("end", "faults"), [
    (Ended(2, "error: another process (3)"), 0),
    (Ended(0, "another process"), 1),
    (Ended(2, "error: something else"), 1),
    (Ended(2, "another process\nTraceback (most recent call last)"), 1),
    (Ended(None, "another process"), 1),
])  # fmt: skip
def test_an_end_that_should_be_another(end, faults):
    assert len(checked(end, {2}, "another process")) == faults


def test_what_is_written(tmp_path, monkeypatch, capsys):
    row = {"tried": 3, "kills": 5, "kills_while_writing": 2, "identical": 2, "faults": []}
    faulty = row | {"faults": [{"run": 1, "what": "a.pth: differs"}]}
    kills = [("train, killed", row), ("sample, killed", faulty)]
    monkeypatch.setattr(faults, "measure_kills", lambda *_: kills)
    arguments = ["--parts", "kills", "--output_dir", str(tmp_path)]
    assert faults.main(arguments) == 1
    assert "5 kills, 2 while a file was being written" in capsys.readouterr().out
    assert "sample, killed: {'run': 1, 'what': 'a.pth: differs'}" in (
        (tmp_path / "faults.md").read_text()
    )
    del kills[0]
    kills[0] = ("sample, killed", row | {"tried": 4})
    assert faults.main(arguments) == 0
    rows = json.loads((tmp_path / "faults.json").read_text())["rows"]
    assert {name: row["tried"] for name, row in rows.items()} == {
        "train, killed": 3, "sample, killed": 4,
    }  # fmt: skip
    assert rows["train, killed"]["seed"] == 0


@pytest.mark.slow
def test_a_real_run_of_some_cases(tmp_path):
    arguments = ["--job_runs", "1", "--runs", "1", "--output_dir", str(tmp_path)]
    arguments += ["--cases", "train,linear paper,sample,finetune"]
    assert faults.main(["--parts", "kills", *arguments]) == 0
    record = json.loads((tmp_path / "faults.json").read_text())
    assert len(record["rows"]) == 4
