"""Every mutation changes what it is given, and what a job does wrong with it is counted."""

import json
import random

import pytest
import torch
import yaml

import checkpoint
from benchmarks import fault_mutations
from benchmarks.fault_mutants import CONFIGS, FILES, HOSTILE, STATES, flip_in_weight, mutate_json
from benchmarks.fault_mutations import Found, measure_checkpoints, measure_yaml
from benchmarks.startup import TINY, save_untrained
from config import load_config
from support.errors import UserError

STUB = f"""
import time
from pathlib import Path

def main(words):
    how = words[-1]
    if how == "traceback":
        raise ValueError("a fault")
    if how == "hang":
        time.sleep(600)
    if how == "a file was changed":
        Path("kept/notes.txt").write_text("ours now")
        raise SystemExit(2)
    if how == "code was run":
        Path("{HOSTILE}").touch()
    raise SystemExit(int(how) if how.isdigit() else 0)
"""


@pytest.fixture
def saved(tmp_path):
    """model_0.pth of an untrained network."""
    save_untrained(TINY | {"save_dir": str(tmp_path)})
    return tmp_path / "ckpts" / "model_0.pth"


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_is_changed_and_always_in_the_same_way(kind):
    text = yaml.safe_dump(TINY, sort_keys=False)
    mutants = [CONFIGS[kind](text, random.Random(i)) for i in range(20)]
    assert mutants == [CONFIGS[kind](text, random.Random(i)) for i in range(20)]
    assert sum(mutant != text.encode() for mutant in mutants) > 15


@pytest.mark.parametrize("kind", [*FILES, *STATES])
def test_a_checkpoint_is_changed(kind, saved):
    before = saved.read_bytes()
    (FILES | STATES)[kind](saved, random.Random(0))
    assert not saved.is_file() or saved.read_bytes() != before


def test_states_lose_their_checksum_so_that_more_than_that_is_tried(saved):
    STATES["a weight that is NaN"](saved, random.Random(0))
    with pytest.raises(UserError, match="not finite"):
        checkpoint.load_denoiser(saved)


def test_the_bit_is_in_a_weight(saved):
    before = torch.load(saved)["ema"]
    flip_in_weight(saved, random.Random(0))
    after = torch.load(saved)["ema"]
    assert sum(not torch.equal(before[name], after[name]) for name in before) == 1
    with pytest.raises(UserError, match="another checksum"):
        checkpoint.load(saved)


def test_a_value_of_a_json_is_changed(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(TINY))
    mutate_json(path, random.Random(0))
    assert json.loads(path.read_text()) != TINY


@pytest.mark.parametrize(("how", "what"), [
    ("0", []), ("2", []), ("1", ["exit code 1, not [0, 2]"]), ("hang", ["hang"]),
    ("traceback", ["exit code 1, not [0, 2]", "traceback"]),
    ("a file was changed", ["a file was changed"]), ("code was run", ["code was run"]),
])  # fmt: skip
def test_what_a_job_does_wrong(tmp_path, monkeypatch, how, what):
    (tmp_path / "stub_job.py").write_text(STUB)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(fault_mutations, "LIMIT_S", 1 if how == "hang" else 60)
    folder = tmp_path / "work"
    found = Found(folder)
    found.add("a kind", 7, "stub_job", [how], [folder / "kept"])
    row = found.row()
    assert (row["tried"], row["kinds"]) == (1, {"a kind": 1})
    assert [fault["what"] for fault in row["faults"]] == what
    assert all(fault["command"] == f"stub_job.py {how}" for fault in row["faults"])


def test_configs_that_were_not_changed_work(tmp_path, monkeypatch):
    """Else every mutant could be refused for another reason."""
    monkeypatch.setattr(fault_mutations, "CONFIGS", {"none": lambda text, draw: text.encode()})
    monkeypatch.setattr(fault_mutations, "VALUES", fault_mutations.CONFIGS)
    monkeypatch.setattr(fault_mutations, "SHIPPED", tmp_path)
    row = measure_yaml(tmp_path / "work", 6, seed=0)
    assert row["exit_codes"] == {"0": 6}
    assert load_config(tmp_path / "work" / "config.yaml").network.n_channels == 32


@pytest.mark.slow
@pytest.mark.parametrize("measure", [measure_yaml, measure_checkpoints])
def test_a_few_mutants(tmp_path, measure):
    row = measure(tmp_path / "work", 30, seed=1)
    assert row["tried"] == sum(row["exit_codes"].values()) == 30
    assert row["faults"] == []
