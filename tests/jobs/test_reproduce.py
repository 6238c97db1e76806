"""The whole chain, every job for real and as its own process, on digits."""

import contextlib
import importlib
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import checkpoint
import linear
import reproduce
from config import load_config
from support.errors import UserError
from training.cost import Cost


def command(tiny_yaml, tmp_path, *more: str) -> list[str]:
    weights = tmp_path / "none.pth"
    weights.write_text("not Inception's weights")
    return [
        sys.executable, "reproduce.py", "--config", str(tiny_yaml), "--device", "cpu",
        "--protocol", "cached", "--n", "8", "--inception", str(weights), *more,
    ]  # fmt: skip


def run(*args):
    return subprocess.run(command(*args), cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_the_chain_and_its_second_run(tiny_yaml, tmp_path):
    folder = Path(load_config(tiny_yaml).save_dir)
    process = subprocess.Popen(
        command(tiny_yaml, tmp_path), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    while not (folder / "linear_grid_cached_random.json").exists():  # interrupted after it
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode != 0
    assert not (folder / "report.md").exists()

    done = run(tiny_yaml, tmp_path)
    assert done.returncode == 0, done.stderr
    report = (folder / "report.md").read_text()
    for text in ("trained network", "untrained network", "raw pixels", "FID: left out", "none.pth"):
        assert text in report
    assert report.count("the gain in points") == 1
    for picture in [line for line in report.splitlines() if line.startswith("![")]:
        name = picture.partition("(")[2].rstrip(")")
        assert (folder / name).stat().st_size > 1000, name
    record = json.loads((folder / "reproduce.json").read_text())
    assert set(record["steps"]) == {
        "train", "grid of an untrained network", "grid", "probe of raw pixels", "t-SNE",
        "samples", "fid",
    }  # fmt: skip

    grid = (folder / "linear_grid_ep1_cached.json").stat().st_mtime_ns
    again = run(tiny_yaml, tmp_path)
    assert again.returncode == 0, again.stderr
    assert "grid: done before" in again.stderr
    assert (folder / "linear_grid_ep1_cached.json").stat().st_mtime_ns == grid


@pytest.fixture
def stubbed(monkeypatch):
    """The chain with jobs that do nothing: the names of those that ran, and the folder of the
    report."""
    ran, reported = [], []

    def run(name, command, steps, keep):
        ran.append(name)
        steps[name] = {"command": command, "seconds": 1.0, "left_out": None}
        keep()

    def write_report(model, *_):
        reported.append(model.config.save_dir)
        return "report"

    monkeypatch.setattr(reproduce, "run", run)
    monkeypatch.setattr(reproduce, "announce_long_work", lambda *_: None)
    monkeypatch.setattr(reproduce, "write_report", write_report)
    cell = SimpleNamespace(cell=SimpleNamespace(parts=((21, "out_2"),)))
    monkeypatch.setattr(reproduce, "best_cell", lambda *_: (None, cell))
    return ran, reported


def test_the_report_is_of_the_folder_that_was_asked_for(tiny_yaml, tiny_checkpoint, stubbed):
    before = Path(load_config(tiny_yaml).save_dir)
    moved = before.rename(before.with_name("moved"))
    argv = ["--config", str(tiny_yaml), "--device", "cpu", "--set", f"save_dir={moved}"]
    assert reproduce.main(argv) == 0
    assert stubbed[1] == [str(moved)]


def test_more_samples_are_scored_again(tiny_yaml, tiny_checkpoint, stubbed):
    ran, _ = stubbed
    argv = ["--config", str(tiny_yaml), "--device", "cpu", "--n"]
    for n, expected in (("8", 7), ("8", 1), ("9", 3)):
        ran.clear()
        assert reproduce.main([*argv, n]) == 0
        assert len(ran) == expected
    assert ran == ["train", "samples", "fid"]


def test_heads_of_other_settings_are_fitted_again(tiny_yaml, tiny_checkpoint, stubbed):
    ran, _ = stubbed
    argv = ["--config", str(tiny_yaml), "--device", "cpu"]
    assert reproduce.main(argv) == 0
    values = json.loads(tiny_yaml.read_text())  # JSON is YAML
    tiny_yaml.write_text(json.dumps(values | {"linear": {"n_epoch": 3}}))
    ran.clear()
    assert reproduce.main(argv) == 0
    assert ran == ["train", *reproduce.PROBED]


def test_other_images_are_probed_and_scored_again(tiny_yaml, tiny_checkpoint, stubbed, monkeypatch):
    ran, _ = stubbed
    argv = ["--config", str(tiny_yaml), "--device", "cpu"]
    assert reproduce.main(argv) == 0
    ran.clear()
    loaded = reproduce.load_datasets
    monkeypatch.setattr(  # one test image is gone
        reproduce, "load_datasets", lambda *given: (loaded(*given)[0], loaded(*given)[1].take([0]))
    )
    assert reproduce.main(argv) == 0
    assert ran == ["train", *reproduce.PROBED, "fid"]


def test_seconds_of_interrupted_calls_count_and_only_a_mistake_is_left_out():
    steps, kept = {}, []

    def end(name, code, more="", word="--a"):
        job = f"import sys, time; time.sleep(0.2); {more}; sys.exit({code})"
        command = [sys.executable, "-c", job or "pass", word]
        reproduce.run(name, command, steps, lambda: kept.append(steps[name]["seconds"]))

    stop = 128 + signal.SIGTERM
    for _ in range(2):
        with pytest.raises(SystemExit):
            end("grid", f"{stop}", "pass")
    assert steps["grid"]["left_out"] == "interrupted"
    assert kept == sorted(kept)
    assert kept[1] >= 0.4
    with pytest.raises(SystemExit):
        end("grid", f"{stop}", "pass", word="--other")
    assert kept[2] < kept[1]
    end("fid", 2, "print('error: no weights', file=sys.stderr)")
    assert steps["fid"]["left_out"] == "no weights"
    with pytest.raises(UserError, match=r"fid failed \(exit code 1\): the last line$"):
        end("fid", 1, "print('a line\\nthe last line', file=sys.stderr)")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_goes_on_to_the_job_and_the_chain_ends_with_it(number):
    """The job sends it to the chain, and ends with a code of its own when it comes back."""
    job = (
        "import os, signal, time\n"
        f"signal.signal({number}, lambda *_: os._exit(128 + {number}))\n"
        f"os.kill(os.getppid(), {number})\n"
        "time.sleep(60)"
    )
    with pytest.raises(SystemExit) as stop:
        reproduce.run("job", [sys.executable, "-c", job], {}, lambda: None)
    assert stop.value.code == 128 + number


def test_messages_of_a_job_go_to_what_stands_for_standard_error():
    text = "train: " + "é" * 5000 + "error: no such file\n"
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        end = reproduce.pass_on(io.BytesIO(text.encode()))
    assert stderr.getvalue() == text
    assert end == text[-4096:]


def test_which_config():
    for argv, path in (
        ([], "config/digits.yaml"),
        (["--dataset", "mnist"], "config/mnist.yaml"),
        (["--config", "a.yaml"], "a.yaml"),
    ):
        arguments = reproduce.common_arguments(reproduce.parse_args(argv))
        assert json.loads(json.dumps(arguments))[:2] == ["--config", path]


@pytest.mark.parametrize(("argv", "message"), [
    (["--n", "0"], "--n 0: give at least 1"),
    (["--inception", "nowhere.pth"], "--inception nowhere.pth: no such file"),
    (["--config", "a.yaml", "--dataset", "mnist"], "--config and --dataset exclude each other"),
])  # fmt: skip
def test_mistakes_are_found_before_training(argv, message):
    with pytest.raises(UserError, match=message):
        reproduce.parse_args(argv)


def test_a_damaged_record_is_named(tmp_path):
    path = tmp_path / "reproduce.json"
    assert reproduce.read_record(path) == {"weights": None, "steps": {}}
    path.write_text('{"weights": ')
    with pytest.raises(UserError, match=r"reproduce\.json: not valid JSON; delete it"):
        reproduce.read_record(path)


def test_long_work_is_announced_with_what_shortens_it(tiny_yaml, monkeypatch):
    """At 10 images/s, 60 epochs of 50,000 images and the paper's grid take days."""
    cost = Cost(1, 1.0, 1.0, 10.0, 1, 80.0, probe_timesteps=3, evaluations_per_sample=100)
    monkeypatch.setattr(reproduce, "measure", lambda *_: (cost, 60_000))

    class Inline:
        def __init__(self, *_, **__): ...

        def __enter__(self):
            return self

        def __exit__(self, *_): ...

        def submit(self, function, *args):
            self.value = function(*args)
            return self

        def result(self):
            return self.value

    monkeypatch.setattr(reproduce, "ProcessPoolExecutor", Inline)
    args = reproduce.parse_args(["--config", str(tiny_yaml)])
    lines = []
    monkeypatch.setattr(reproduce.log, "info", lambda text, *a: lines.append(text % a))
    reproduce.announce_long_work(args, load_config(tiny_yaml))
    assert lines[0] == "train: about 80.0 h expected; --set n_epoch=... shortens it"
    assert any(line.startswith("grid: about 3.3 h") and "cached" in line for line in lines)
    assert not any(line.startswith("samples") for line in lines)


def test_every_job_takes_its_command_and_the_picture_is_of_the_grids_best_cell(
    tiny_yaml, tiny_checkpoint
):
    args = reproduce.parse_args(
        ["--config", str(tiny_yaml), "--inception", str(tiny_yaml), "--protocol", "cached"]
    )
    model = checkpoint.load_denoiser(tiny_checkpoint, torch.device("cpu"))
    steps = reproduce.later_steps(args, model, Path("samples"))
    commands = {}
    for name, (_, script, *options) in steps:
        commands[name] = options
        importlib.import_module(Path(script).stem).parse_args(options)  # refuses what excludes
        if name == "grid":
            linear.main([*options, "--device", "cpu", "--timesteps", "7", "--blocks", "out_3"])
    assert commands["t-SNE"][-4:] == ["--timestep", "7", "--blockname", "out_3"]
    assert list(commands) == [
        "grid of an untrained network", "grid", "probe of raw pixels", "t-SNE", "samples", "fid",
    ]  # fmt: skip
