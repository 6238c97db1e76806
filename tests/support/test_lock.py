"""Two processes never go on from one file at once, and a kill leaves no lock."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from support import lock, resumable
from support.errors import UserError
from support.lock import held

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs flock")

HOLD = """
import sys, time
from pathlib import Path
from support.lock import held
with held(Path(sys.argv[1]), "the run"):
    print("holds", flush=True)
    sys.stdin.read()
"""


def holder(path: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"holds\n"
    return process


def test_a_second_process_is_refused_while_the_first_lives(tmp_path):
    path = tmp_path / "run" / ".lock"
    first = holder(path)
    with (
        pytest.raises(UserError, match=rf"the run: another process \({first.pid} on"),
        held(path, "the run"),
    ):
        pass
    first.communicate()  # its end
    assert not path.exists()
    with held(path, "the run"):
        pass


def test_a_kill_leaves_no_lock(tmp_path):
    path = tmp_path / ".lock"
    first = holder(path)
    first.kill()
    first.wait()
    assert path.exists()
    with held(path, "the run"), held(path, "the run"):  # a process may take its own again
        assert path.read_text().startswith(f"{os.getpid()} on ")
    assert not path.exists()
    assert not lock._held


def test_a_lock_that_was_removed_under_a_waiting_one_is_no_lock(tmp_path, monkeypatch):
    path, real, removed = tmp_path / ".lock", lock._is_still, []

    def is_still(path, descriptor):
        if not removed:
            removed.append(True)
            path.unlink()
        return real(path, descriptor)

    monkeypatch.setattr(lock, "_is_still", is_still)
    with held(path, "the run"):
        assert path.exists()


def test_without_locks_a_note_is_said(tmp_path, monkeypatch, messages):
    monkeypatch.setattr(lock, "fcntl", None)
    with held(tmp_path / ".lock", "the run"):
        assert not list(tmp_path.iterdir())
    assert "nothing stops a second run" in messages[0]


JOBS = {
    "train": [],
    "linear": ["--timestep", "21", "--blockname", "out_2"],
    "finetune": ["--epochs", "1", "--warm_epochs", "0"],
    "noisy_classifier": ["--backbone", "wrn", "--depth", "10", "--width", "1", "--epochs", "6"],
}


@pytest.mark.parametrize("job", JOBS)
def test_two_jobs_never_go_on_from_one_file(
    job, tiny_yaml, tiny_checkpoint, tmp_path, monkeypatch, mistake
):
    main, paths = importlib.import_module(job).main, []

    def recorded(path, what):
        paths.append(path)
        raise UserError("recorded")

    argv = ["--config", str(tiny_yaml), "--device", "cpu", *JOBS[job]]
    with monkeypatch.context() as patched, mistake("recorded"):
        patched.setattr(resumable, "held", recorded)
        main(argv)
    first = holder(paths[0])
    before = sorted((tmp_path / "run").rglob("*"))
    with mistake(f"another process ({first.pid} on"):
        main([*argv, *(["--restart"] if job == "train" else [])])
    assert sorted((tmp_path / "run").rglob("*")) == before
    first.communicate()
