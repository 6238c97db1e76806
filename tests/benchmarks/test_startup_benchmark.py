"""benchmarks/startup.py: how long the jobs take to begin."""

import pytest
from conftest import JOBS

from benchmarks import startup
from benchmarks.record import median_ratio
from support.errors import UserError
from support.files import read_json


def test_it_knows_every_job():
    assert set(startup.FIRST_WORK) == {*JOBS, "export"}


def test_ratios_are_of_each_round_and_then_their_median():
    assert median_ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == 3  # of the medians it would be 4


def test_a_job_that_fails_is_named(tmp_path):
    with pytest.raises(UserError, match=r"python -c 1/0 ended with 1: ZeroDivisionError"):
        startup.seconds_of_command(["-c", "1/0"])


def test_a_job_is_measured_in_turn_with_import_torch(tmp_path, monkeypatch, capsys):
    ran = []

    def pretend(words, code):
        ran.append(words)
        return float(len(words))

    monkeypatch.setattr(startup, "seconds_of_command", pretend)
    argv = ["--jobs", "sample,fid", "--rounds", "2", "--output_dir", str(tmp_path)]
    assert startup.main(argv) == 0
    (path,) = tmp_path.glob("startup_*.json")
    record = read_json(path)
    assert set(record["seconds"]) == {
        "sample help", "sample mistake", "sample work", "fid help", "fid mistake",
    }  # fmt: skip
    assert all(len(seconds) == 2 for seconds in record["seconds"].values())
    assert ran[0] == ran[6] == ran[12] == ["-c", "import torch"]
    assert len(ran) == 18
    row = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("fid "))
    assert row.split() == ["fid", "1.00", "2.50", "-"]


@pytest.mark.slow
def test_every_job_begins_as_it_is_asked_to(tmp_path):
    """Each command ends with the exit code that is written for it."""
    for words, code in startup.commands(list(startup.FIRST_WORK), tmp_path).values():
        assert startup.seconds_of_command(words, code) > 0
