"""benchmarks/scale.py: one recipe at several widths."""

from itertools import pairwise

import pytest
from conftest import ROOT

from benchmarks import scale
from config import load_config
from support.errors import UserError
from support.files import read_json


def test_a_width_that_is_named_twice_is_refused(mistake):
    with mistake("--channels: name each once"):
        scale.main(["--channels", "32,32"])


def test_every_width_is_the_fast_recipe_but_for_its_channels(monkeypatch):
    monkeypatch.chdir(ROOT)
    args = scale.parse_args(["--n_step", "100"])
    ours = load_config("config/fast.yaml").model_dump()
    for channels in args.channels:
        jobs, folder = scale.commands(channels, 0, args)
        words = [word for flag, word in pairwise(jobs["train"]) if flag == "--set"]
        config = load_config("config/fast.yaml", words).model_dump()
        changed = {key for key in ours if config[key] != ours[key]} - {"network"}
        assert changed == {"n_step", "save_dir", "n_sample", "sample_every", "save_every"}
        assert config["network"] == ours["network"] | {"n_channels": channels}
        assert config["save_dir"] == str(folder)
        assert jobs["untrained"] == [*jobs["trained"], "--baseline", "random"]
    assert args.channels == [32, 64, 96, 128]


def test_the_longest_run_begins_first():
    args = scale.parse_args(["--channels", "32,96", "--seeds", "0,1"])
    missing = scale.missing_of(args, [{"channels": 96, "seed": 0}])
    assert list(missing.values()) == [(96, 1), (32, 0), (32, 1)]


@pytest.mark.slow
def test_two_widths_on_digits_and_a_second_seed_later(tiny_yaml, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    argv = [
        "--config", str(tiny_yaml), "--device", "cpu", "--n_step", "30", "--timesteps", "11",
        "--blocks", "out_1,out_2", "--n_train", "200", "--parallel", "2",
        "--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path),
    ]  # fmt: skip
    scale.main([*argv, "--channels", "64,32"])
    first = read_json(tmp_path / "scale_30.json")["runs"]
    assert [run["channels"] for run in first] == [32, 64]
    assert first[0]["parameters"] < first[1]["parameters"]
    for run in first:
        assert run["trained"]["headline"] != run["untrained"]["headline"]
        assert run["trained"]["cells"][0]["block"] == "out_1"
        assert run["step"] == 30
    assert f"{first[1]['parameters']:,}" in capsys.readouterr().out
    assert (tmp_path / "scale_30.png").stat().st_size > 0
    assert (tmp_path / "scale_30.md").is_file()
    scale.main([*argv, "--channels", "32", "--seed", "1"])
    runs = read_json(tmp_path / "scale_30.json")["runs"]
    assert [(run["channels"], run["seed"]) for run in runs] == [(32, 0), (32, 1), (64, 0)]
    assert [runs[0], runs[2]] == first


@pytest.mark.parametrize("blocks", ["all", "out_1+out_2,all"])
def test_a_row_needs_a_block_that_stands_alone(blocks):
    with pytest.raises(UserError, match="name one block that stands alone too"):
        scale.parse_args(["--blocks", blocks])
