"""benchmarks/recipes.py: recipes at one budget."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks import recipes
from config import load_config


def parsed(*argv: str):
    return recipes.parse_args([*argv, "--runs", "somewhere"])


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_is_a_config_that_sees_the_same_images(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    train, probe, folder = recipes.commands(name, parsed("--n_step", "100"))
    settings = [word for flag, word in pairwise(train) if flag == "--set"]
    config = load_config(Path(train[2]), settings)
    assert config.n_step * config.batch_size == 6400
    assert config.save_dir == str(folder)
    assert set(settings) <= set(probe)


def test_an_unknown_recipe_is_answered_by_those_there_are(capsys):
    with pytest.raises(SystemExit) as stop:
        recipes.main(["--rows", "fsat"])
    assert stop.value.code == 2
    assert "no recipe 'fsat': there are fast; lr 3e-4" in capsys.readouterr().err


@pytest.mark.slow
def test_two_recipes_on_digits_and_a_third_later(tiny_yaml, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    argv = [
        "--config", str(tiny_yaml), "--device", "cpu", "--channels", "32", "--n_step", "3",
        "--timesteps", "11", "--blocks", "out_1", "--n_train", "200",
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
