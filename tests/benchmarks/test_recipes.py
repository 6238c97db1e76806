"""benchmarks/recipes.py: recipes at one budget."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks import recipes
from benchmarks.experiment import at_a_time
from config import load_config
from support.errors import UserError


def parsed(*argv: str):
    return recipes.parse_args([*argv, "--runs", "somewhere"])


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_is_a_config_that_sees_the_same_images(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    jobs, folder = recipes.commands(name, parsed("--n_step", "100"))
    train = jobs["train"]
    settings = [word for flag, word in pairwise(train) if flag == "--set"]
    config = load_config(Path(train[2]), settings)
    assert config.n_step * config.batch_size == 6400
    assert config.save_dir == str(folder)
    assert set(settings) <= set(jobs["cached"])
    assert set(settings) <= set(jobs["knn"])


def test_an_unknown_recipe_is_answered_by_those_there_are(capsys):
    with pytest.raises(SystemExit) as stop:
        recipes.main(["--rows", "fsat"])
    assert stop.value.code == 2
    assert "no recipe 'fsat': there are fast; lr 5e-4" in capsys.readouterr().err


@pytest.mark.slow
def test_two_recipes_on_digits_and_a_third_later(tiny_yaml, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    argv = [
        "--config", str(tiny_yaml), "--device", "cpu", "--channels", "32", "--n_step", "3",
        "--timesteps", "11", "--blocks", "out_1,out_1+out_2", "--n_train", "300", "--parallel", "2",
        "--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path), "--rows",
    ]  # fmt: skip
    recipes.main([*argv, "fast;lr 3e-3"])
    record = tmp_path / "recipes_32_3.json"
    first = json.loads(record.read_text())["recipes"]
    recipes.main([*argv, "fast;lr 3e-3;v"])
    second = json.loads(record.read_text())["recipes"]
    assert list(second) == ["fast", "lr 3e-3", "v"]
    assert {name: second[name] for name in first} == first
    assert first["fast"]["test_loss"] != first["lr 3e-3"]["test_loss"]
    assert "+0.00" in capsys.readouterr().out
    assert (tmp_path / "recipes_32_3.md").read_text().count("out_1 at t=11") == 3


def test_a_row_that_fails_loses_no_other():
    def measure(name: str) -> dict:
        if name == "b":
            raise UserError("no such luck")
        return {"is": name}

    rows, found = at_a_time(2, ["a", "b", "c"], measure), {}
    with pytest.raises(UserError, match=r"^b: no such luck$"):
        collect(rows, found)
    assert found == {"a": {"is": "a"}, "c": {"is": "c"}}


def collect(rows, found: dict) -> None:
    for name, record in rows:
        found[name] = record
