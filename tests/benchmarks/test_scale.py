"""benchmarks/scale.py: one recipe at several widths."""

import pytest
from conftest import ROOT

from benchmarks import scale
from support.files import read_json


def test_a_width_that_is_named_twice_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        scale.main(["--channels", "32,32"])
    assert stop.value.code == 2
    assert "--channels: name each once" in capsys.readouterr().err


@pytest.mark.slow
def test_two_widths_on_digits(tiny_yaml, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    scale.main([
        "--config", str(tiny_yaml), "--device", "cpu", "--n_step", "3", "--channels", "64,32",
        "--timesteps", "11", "--blocks", "out_1,out_2", "--n_train", "200", "--parallel", "2",
        "--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path),
    ])  # fmt: skip
    runs = read_json(tmp_path / "scale_3.json")["runs"]
    assert [run["channels"] for run in runs] == [32, 64]
    assert runs[0]["parameters"] < runs[1]["parameters"]
    for run in runs:
        assert run["trained"]["headline"] != run["untrained"]["headline"]
        assert run["trained"]["cells"][0]["block"] == "out_1"
    assert f"{runs[1]['parameters']:,}" in capsys.readouterr().out
    assert (tmp_path / "scale_3.png").stat().st_size > 0
    assert (tmp_path / "scale_3.md").is_file()
