"""benchmarks/gpu.py: its stages on the CPU, and that none takes the others with it."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from training_helpers import CPU

import checkpoint
from benchmarks import gpu, gpu_jobs, gpu_memory, gpu_stages, memory
from cli import pick_config
from utils import amp_dtype, peak_memory_bytes


def found_in(folder) -> dict:
    (path,) = folder.glob("gpu_rehearsal_*.json")
    return json.loads(path.read_text())


def test_the_full_run_takes_what_was_given(monkeypatch, tiny_yaml):
    commands = []

    def run(command, timeout):
        commands.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    given = ["--config", str(tiny_yaml), "--skip_bad_images", "--set", "n_epoch=2"]
    args = gpu.parse_args(["--full", *given])
    gpu.full(args, pick_config(args))
    assert len(commands) == 3
    assert all({*given, "--use_amp"} <= set(command) for command in commands)
    assert ["--compile" in command for command in commands] == [True, False, False]


def test_what_is_timed_runs_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8e9, 8e9))
    names = ["speed", "tests", "memory", "compile", "two"]
    alone = [["memory"], ["compile"], ["speed"]]
    assert gpu.together(names, torch.device("cuda")) == [["tests", "two"], *alone]
    assert gpu.together(names, CPU) == [["tests", "two", "memory"], *alone[1:]]
    assert gpu.together(["data"], CPU) == [["data"]]


def test_float16_can_be_forced(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    device = torch.device("cuda")
    assert amp_dtype(device) == torch.bfloat16
    with gpu_stages.precision_of("float16"):
        assert amp_dtype(device) == torch.float16
    assert gpu_stages.precisions(device) == ["float32", "bfloat16", "float16"]


@pytest.mark.skipif(not memory.CLEAR.exists(), reason="Linux's")
def test_the_peak_of_a_few_steps_is_theirs_alone(tiny_config):
    """Beyond what this process holds already, which is far more."""
    row = gpu_memory.peak(tiny_config, CPU, use_amp=False)
    assert row["allocated_mb"] == row["reserved_mb"] < peak_memory_bytes(CPU) / 2e6


def test_steps_are_taken_where_their_peak_is_not_known(monkeypatch, tmp_path, tiny_config):
    taken = []
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "nowhere")
    monkeypatch.setattr(gpu_memory.Trainer, "train_step", lambda trainer: taken.append(trainer))
    unknown = gpu_memory.peak(tiny_config, CPU, use_amp=False)
    assert len(taken) == 3
    known = {"allocated_mb": 1234.0, "reserved_mb": 2000.0}
    row = {"float32": unknown, "amp": known, "images_mb": None}
    assert gpu_memory.words_of(row) == ["- / -", "1,234 / 2,000", "images ?"]


def test_a_difference_of_weights_is_the_largest(tmp_path, tiny_config):
    from conftest import save_model

    torch.manual_seed(0)
    a = save_model(tiny_config, 1, path=tmp_path / "a" / "ckpts" / "model_1.pth")
    weights = {name: w.clone() for name, w in checkpoint.load(a)["net"].items()}
    save_model(tiny_config, 1, weights, tmp_path / "same" / "ckpts" / "model_1.pth")
    next(iter(weights.values())).view(-1)[0] += 0.5
    save_model(tiny_config, 1, weights, tmp_path / "b" / "ckpts" / "model_1.pth")
    assert gpu_jobs.difference(tmp_path / "a", tmp_path / "same", 2) == 0
    assert gpu_jobs.difference(tmp_path / "a", tmp_path / "b", 2) == pytest.approx(0.5)


@pytest.mark.slow
def test_the_rehearsal(tmp_path, capsys):
    stages = "tests,precision,memory,data,speed"
    argv = ["--device", "cpu", "--stages", stages, "--output_dir", str(tmp_path)]
    assert gpu.main(argv) == 0
    record = found_in(tmp_path)
    assert record["stages"].keys() == set(stages.split(","))
    status = {name: found["status"] for name, found in record["stages"].items()}
    gpu_there = torch.cuda.is_available()
    assert status.pop("tests") == ("passed" if gpu_there else "skipped")
    assert set(status.values()) == {"passed"}
    assert record["rehearsal"]
    assert record["machine"]["device"] == "cpu"
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in record["stages"])


@pytest.mark.slow
def test_a_stage_that_fails_or_hangs_ends_alone(tmp_path, monkeypatch, capsys):
    """The data stage gets a device that is none, the memory stage no time."""
    real = gpu.Running

    def running(name, words, limit_s, folder):
        device = ["--device", "nonsense"] if name == "data" else []
        return real(name, [*words, *device], limit_s, folder)

    monkeypatch.setattr(gpu, "Running", running)
    monkeypatch.setitem(gpu.STAGES, "memory", replace(gpu.STAGES["memory"], limit_s=1))
    started = time.monotonic()
    argv = ["--device", "cpu", "--stages", "memory,data,speed", "--output_dir", str(tmp_path)]
    assert gpu.main(argv) == 1
    assert time.monotonic() - started < 60
    stages = found_in(tmp_path)["stages"]
    assert {name: found["status"] for name, found in stages.items()} == {
        "memory": "failed", "data": "failed", "speed": "passed",
    }  # fmt: skip
    assert stages["memory"]["lines"] == ["not done in 1 s: it said nothing"]
    assert "nonsense" in stages["data"]["log"]
    assert "failed" in capsys.readouterr().out


@pytest.mark.slow
def test_a_kill_and_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = gpu_jobs.resume(CPU, tmp_path / "resume")
    assert (found.status, found.figures["plain"]["resumed"]) == ("passed", 0)
    assert "bit for bit" in found.lines[0]
    found = gpu_jobs.two_processes(CPU, tmp_path / "two")
    assert found.status == "passed"
    assert len(found.figures["one"]) == len(found.figures["two"]) == 2
    with pytest.raises(RuntimeError, match=r"ended with 2.*no such config"):
        gpu_jobs.finish(gpu_jobs.start(["--config", "nowhere.yaml"]))
