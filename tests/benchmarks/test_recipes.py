"""benchmarks/recipes.py: recipes at one budget."""

import json
import time
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks import experiment, recipes
from benchmarks.experiment import at_a_time, budget_of, raise_failed, shared_cores
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


def test_an_unknown_recipe_is_answered_by_those_there_are(mistake):
    with mistake("no recipe 'fsat': there are fast; lr 5e-4"):
        recipes.main(["--rows", "fsat"])


def test_two_seeds_have_folders_and_records_of_their_own(monkeypatch):
    monkeypatch.chdir(ROOT)
    plain, one, two = parsed(), parsed("--seed", "1"), parsed("--seed", "2")
    folders = {recipes.commands("fast", args)[1] for args in (plain, one, two)}
    assert len(folders) == 3
    assert recipes.budget_name(plain) == "64_781"
    assert recipes.budget_name(one) == "64_781_seed1"
    assert "seed=1" in recipes.commands("fast", one)[0]["cached"]


def test_batches_that_accumulate_are_counted(monkeypatch):
    monkeypatch.chdir(ROOT)
    jobs, _ = recipes.commands("fast", parsed("--n_step", "100", "--set", "accumulate=4"))
    assert "n_step=25" in jobs["train"]


def test_a_budget_of_less_than_a_step_is_refused(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="--n_step 1: fewer than the 128 images of one step"):
        recipes.commands("batch 128", parsed("--n_step", "1"))


def test_a_setting_may_wait_for_the_row_that_it_is_about(monkeypatch):
    monkeypatch.chdir(ROOT)
    args = parsed("--rows", "InfoNCE", "--set", "distill.temperature=0.5")
    assert budget_of(args)["config"]["distill"]["temperature"] == 0.5
    recipes.commands("InfoNCE", args)
    with pytest.raises(UserError, match=r"distill\.temperature: changes nothing"):
        recipes.commands("fast", args)


def test_a_row_keeps_what_it_is_about_whatever_all_are_given(monkeypatch):
    monkeypatch.chdir(ROOT)
    args = parsed("--set", "lrate=1e-3", "--set", "ema=0.9")
    train = recipes.commands("lr 3e-3", args)[0]["train"]
    settings = [word for flag, word in pairwise(train) if flag == "--set"]
    config = load_config(Path(train[2]), settings)
    assert (config.lrate, config.ema) == (3e-3, 0.9)


@pytest.mark.slow
def test_recipes_on_digits_of_which_one_fails_and_one_comes_later(
    tiny_yaml, tmp_path, monkeypatch, mistake, capsys
):
    monkeypatch.chdir(ROOT)
    argv = [
        "--config", str(tiny_yaml), "--device", "cpu", "--channels", "32", "--n_step", "30",
        "--timesteps", "11", "--blocks", "out_1,out_1+out_2", "--n_train", "300", "--parallel", "2",
        "--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path),
    ]  # fmt: skip
    with mistake("self-condition: "):  # out_4 is the last block here
        recipes.main([*argv, "--rows", "fast;self-condition;lr 3e-3"])
    path = tmp_path / "recipes_32_30.json"
    first = json.loads(path.read_text())["recipes"]
    assert list(first) == ["fast", "lr 3e-3"]
    assert (tmp_path / "recipes_32_30.md").read_text().count("out_1 at t=11") == 2
    assert first["fast"]["test_loss"] != first["lr 3e-3"]["test_loss"]
    run = tmp_path / "runs" / "fast_32_30"
    saved = [path.name for path in (run / "ckpts").glob("model_*.pth")]
    assert saved == [f"model_{first['fast']['epoch']}.pth"]  # one, of the last of two epochs
    assert first["fast"]["step"] == 30
    assert (run / "train.log").stat().st_size > 0

    recipes.main([*argv, "--rows", "v", "--base", "lr 3e-3"])
    second = json.loads(path.read_text())["recipes"]
    assert list(second) == ["fast", "lr 3e-3", "v"]
    assert {name: second[name] for name in first} == first
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("lr 3e-3 "))
    assert "+0.00" in row
    with mistake("is of another budget (n_train differ)"):
        recipes.main([*argv, "--n_train", "200"])


# --- several at a time


def test_a_row_that_fails_loses_no_other():
    def measure(name: str) -> dict:
        if name == "b":
            raise UserError("no such luck")
        return {"is": name}

    failed = []
    found = dict(at_a_time(2, ["a", "b", "c"], measure, failed))
    assert found == {"a": {"is": "a"}, "c": {"is": "c"}}
    with pytest.raises(UserError, match=r"^b: no such luck$"):
        raise_failed(failed)


def test_an_interruption_begins_no_other_row():
    begun = []
    rows = at_a_time(1, list("abcdefgh"), lambda name: begun.append(name) or time.sleep(0.2), [])
    assert next(rows) == ("a", None)
    rows.close()
    assert len(begun) < 4


def test_jobs_beside_each_other_share_the_cores(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    for name in experiment.THREADS:
        monkeypatch.delenv(name, raising=False)
    assert shared_cores(4)["OMP_NUM_THREADS"] == "4"
    assert shared_cores(99)["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in shared_cores(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert shared_cores(4)["OMP_NUM_THREADS"] == "2"
