"""When a loop's state is saved, and how a signal ends it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from support import resumable
from support.errors import Stopped
from support.resumable import Resumable, all_finite


def loop(kept: Resumable, last: int, act=lambda step: None, first: int = 0) -> list[int]:
    """Runs steps `first` to `last`; returns the steps at which the state was saved."""
    saved = []
    with kept:
        for step in range(first, last):
            act(step)
            if kept.is_due(step + 1 == last):
                kept.save(step + 1, {})
                saved.append(step + 1)
            kept.stop_if_told(step + 1, last)
    return saved


@pytest.fixture
def kept(tmp_path):
    return Resumable(tmp_path / "state", lambda path, state: path.write_text("x"), every_s=1e9)


def send(number: int, at: int):
    return lambda step: os.kill(os.getpid(), number) if step == at else None


def test_it_is_saved_by_the_clock_and_at_the_end(kept, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(resumable.time, "monotonic", lambda: clock[0])
    kept.every_s = 3.0
    assert loop(kept, 10, lambda step: clock.__setitem__(0, clock[0] + 1)) == [3, 6, 9, 10]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_the_step_end_saves_and_stops(kept, number):
    before = signal.getsignal(number)
    done = []
    with pytest.raises(Stopped, match=r"stopped at step 3 of 9 and saved .*state; the same") as end:
        loop(kept, 9, lambda step: (send(number, 2)(step), done.append(step)))
    assert done == [0, 1, 2]
    assert end.value.signal == number
    assert kept.saved_step == 3
    assert signal.getsignal(number) is before
    assert kept.what_is_saved() == f"{kept.path} holds step 3"


def test_a_signal_in_the_last_step_changes_nothing(kept):
    assert loop(kept, 3, send(signal.SIGTERM, 2)) == [3]


def test_a_second_signal_ends_at_once_unless_it_is_the_first_handed_on(kept, monkeypatch):
    def twice(step):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped):
        loop(kept, 9, twice)
    monkeypatch.setattr(resumable, "SAME_SIGNAL_S", 0.0)
    kept = Resumable(kept.path, kept.write, 1e9)
    with pytest.raises(KeyboardInterrupt):
        loop(kept, 9, twice)
    assert kept.saved_step is None


JOB = """
import signal, sys, time
from pathlib import Path
from support.resumable import Resumable
with Resumable(Path(sys.argv[1]), lambda path, state: path.write_text(state["word"]), 1e9) as kept:
    Path(sys.argv[1] + ".begun").touch()
    for step in range(200):
        time.sleep(0.05)
        print("working", file=sys.stderr, flush=True)
        if kept.is_due(step == 199):
            kept.save(step, {"word": "saved"})
        kept.stop_if_told(step, 200)
"""


def started(path: Path, *before: str, **streams) -> subprocess.Popen:
    process = subprocess.Popen([*before, sys.executable, "-c", JOB, path], cwd=ROOT, **streams)
    begun = Path(f"{path}.begun")
    while not begun.exists():
        assert process.poll() is None
    return process


def test_a_closed_terminal_ends_it_after_a_save(tmp_path):
    ours, theirs = os.openpty()
    process = started(
        tmp_path / "state", stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    os.kill(process.pid, signal.SIGHUP)
    os.close(ours)  # from here on, what is written to it is an error
    process.wait(timeout=60)
    assert (tmp_path / "state").read_text() == "saved"


IGNORED = {  # what stands before a job that is to live on
    signal.SIGHUP: ("nohup",),
    signal.SIGINT: ("sh", "-c", 'trap "" INT; exec "$@"', "sh"),  # as `&` does in a script
}


@pytest.mark.parametrize("number", list(IGNORED))
def test_it_lives_on_where_a_signal_is_ignored(tmp_path, number):
    process = started(tmp_path / "state", *IGNORED[number], stderr=subprocess.DEVNULL)
    os.kill(process.pid, number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.kill()
    process.wait()
    assert not (tmp_path / "state").exists()


def test_finite():
    assert all_finite([])
    assert all_finite([torch.ones(3), torch.tensor(7)])
    for bad in (float("nan"), float("inf")):
        assert not all_finite([torch.ones(2), torch.tensor([1.0, bad])])
