"""Files of our own: written whole or not at all, and read back with care."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from support.errors import UserError
from support.files import (
    load_array,
    load_json,
    read_json,
    remove_leftovers,
    replacing,
    save_array,
    write_json,
)

RNG = np.random.default_rng(0)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def pid_of_the_dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# --- leftovers


KILLED_INSIDE = """
import sys, time
from support.files import replacing
with replacing(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


def test_what_a_kill_inside_a_save_leaves_goes_with_the_next_save_of_that_name(tmp_path):
    path = tmp_path / "latest.pth"
    killed, other = (
        subprocess.Popen(
            [sys.executable, "-c", KILLED_INSIDE, str(target)],
            stdout=subprocess.PIPE, cwd=ROOT,
        )
        for target in (path, tmp_path / "best.pth")
    )  # fmt: skip
    for process in (killed, other):
        process.stdout.readline()
    living = f".latest.pth.{os.getppid()}.tmp"
    (tmp_path / living).write_text("of a process that lives")
    killed.kill()
    killed.wait()
    assert len(names(tmp_path)) == 3
    with replacing(path) as temporary:
        temporary.write_text("whole")
    assert names(tmp_path) == sorted([living, f".best.pth.{other.pid}.tmp", "latest.pth"])
    other.kill()
    other.wait()
    remove_leftovers(tmp_path)  # of every name
    assert names(tmp_path) == [living, "latest.pth"]


def test_only_leftovers_are_removed(tmp_path):
    dead = pid_of_the_dead()
    kept = [".x.tmp", ".x.1a.tmp", f"x.{dead}.tmp", f".x.{dead}", ".tmp", f".y.x.{dead}.tmp"]
    for name in kept:
        (tmp_path / name).touch()
    half = tmp_path / f".x.{dead}.tmp"  # of an archive that was being unpacked
    (half / "inner").mkdir(parents=True)
    remove_leftovers(tmp_path, "x")
    assert names(tmp_path) == sorted(kept)


# --- arrays


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_arrays_come_back_as_they_were(tmp_path, name):
    array = RNG.normal(size=(5, 3)).astype(np.float32)
    path = tmp_path / "new" / name
    assert load_array(path, lambda _: True) is None
    save_array(path, array if name == "a.npy" else {"one": array, "two": np.array(5)})
    found = load_array(path, lambda _: True)
    if name == "a.npz":
        assert int(found["two"]) == 5
        found = found["one"]
    assert np.array_equal(found, array)
    assert found.dtype == np.float32
    assert names(path.parent) == [name]


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_a_damaged_array_is_none_or_of_the_right_form_whatever_the_damage(tmp_path, name):
    array = RNG.normal(size=(20, 3))
    path = tmp_path / name
    save_array(path, array if name == "a.npy" else {"one": array})
    whole, none = path.read_bytes(), 0

    def fits(found) -> bool:
        return (found if name == "a.npy" else found["one"]).shape == (20, 3)

    for trial in range(600):
        data = bytearray(whole)
        at = int(RNG.integers(len(data)))
        if trial % 3 == 0:
            del data[at:]
        elif trial % 3 == 1:
            data[at : at + 40] = bytes(len(data[at : at + 40]))
        else:
            data[int(RNG.integers(min(len(data), 160)))] = int(RNG.integers(256))
        path.write_bytes(data)
        found = load_array(path, fits)
        none += found is None
        assert found is None or fits(found)
    assert none > 300


def test_an_array_that_does_not_fit_is_noted_and_none(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("support.files.log.propagate", True)
    save_array(tmp_path / "a.npy", np.zeros((3, 2)))
    assert load_array(tmp_path / "a.npy", lambda a: a.shape == (3, 3)) is None
    assert f"{tmp_path / 'a.npy'} is damaged, or of something else" in caplog.text
    np.save(tmp_path / "code.npy", np.array([print], dtype=object), allow_pickle=True)
    assert load_array(tmp_path / "code.npy", lambda _: True) is None


def test_an_array_in_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        save_array(tmp_path / "file" / "a.npy", np.zeros(2))


# --- JSON

FORM = {"n": int, "best": {"t": int | float, "name": str | None}, "rows": [{"x": float}]}
GOOD = {"n": 3, "best": {"t": 2.5, "name": None}, "rows": [{"x": 1.0}], "more": "ignored"}


def test_json_of_the_right_form_comes_back(tmp_path):
    write_json(tmp_path / "a.json", GOOD)
    assert read_json(tmp_path / "a.json", FORM) == GOOD
    assert load_json(tmp_path / "a.json", {str: object}) == GOOD
    assert load_json(tmp_path / "nothing.json") is None
    with pytest.raises(UserError, match=r"nothing\.json: could not be read"):
        read_json(tmp_path / "nothing.json")


@pytest.mark.parametrize("text", [
    "", "\0\0\0\0", "{", "[]", "null", "3", '"text"', "{}", json.dumps(GOOD)[:-9], "[" * 100_000,
    b"\xff\xfe{}", *(json.dumps(GOOD | wrong) for wrong in (
        {"n": "3"}, {"n": None}, {"best": []}, {"best": {"t": 1}}, {"rows": {}}, {"rows": [3]},
        {"rows": [{"x": 1.0}, {}]},
    )),
])  # fmt: skip
def test_other_json_is_named_with_the_way_out(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: .*; fit again$") as error:
        read_json(path, FORM, "fit again")
    assert "\n" not in str(error.value)
    assert load_json(path, FORM) is None


def test_a_folder_in_place_of_a_record(tmp_path):
    with pytest.raises(UserError, match="could not be read"):
        read_json(tmp_path)
