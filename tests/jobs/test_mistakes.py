"""What bad input gets in every job: one or two lines, exit code 2, no traceback."""

import importlib
import subprocess
import sys

import pytest
import torch
from conftest import JOBS, READS_A_MODEL, ROOT, TAKES_A_DEVICE

from cli import job_parser, load_model
from support.errors import UserError

# what a job cannot do without, beside a config
MORE = {
    "fid": ["--n", "4"],
    "visualize_features": ["--timestep", "1", "--blockname", "out_1"],
    "noisy_classifier": ["--backbone", "ddae"],
}


def refused(job: str, argv: list[str], capsys) -> str:
    """The message with which the job ends; checks the rest."""
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(job).main([*argv, *MORE.get(job, [])])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    last = message[message.index("error: ") :]
    assert len(last.strip().splitlines()) <= 5
    return last


@pytest.mark.parametrize("job", JOBS)
def test_a_misspelt_key(job, tiny_yaml, capsys, tmp_path):
    tiny_yaml.write_text("batchsize: 3\nsave_dir: " + str(tmp_path / "run"))
    message = refused(job, ["--config", str(tiny_yaml)], capsys)
    assert "'batchsize': did you mean 'batch_size'?" in message
    assert str(tiny_yaml) in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("job", ["train", *READS_A_MODEL])
def test_no_config(job, capsys):
    assert "--config" in refused(job, ["--device", "cpu"], capsys)


@pytest.mark.parametrize("job", TAKES_A_DEVICE)
def test_a_device_that_is_not_there(job, tiny_yaml, capsys):
    message = refused(job, ["--config", str(tiny_yaml), "--device", "cuda:77"], capsys)
    assert "--device cuda:77" in message
    assert "--device cpu" in message


@pytest.mark.parametrize("job", READS_A_MODEL)
def test_no_checkpoint_yet(job, tiny_yaml, capsys):
    message = refused(job, ["--config", str(tiny_yaml), "--device", "cpu"], capsys)
    assert "run train.py first" in message


@pytest.mark.parametrize("job", READS_A_MODEL)
def test_an_epoch_that_was_not_saved(job, tiny_yaml, tiny_checkpoint, capsys):
    argv = ["--config", str(tiny_yaml), "--device", "cpu", "--epoch", "59"]
    message = refused(job, argv, capsys)
    assert "model_59.pth: no such checkpoint. There are: model_1.pth" in message


@pytest.mark.parametrize("job", READS_A_MODEL)
def test_a_truncated_checkpoint(job, tiny_yaml, tiny_checkpoint, capsys):
    data = tiny_checkpoint.read_bytes()
    tiny_checkpoint.write_bytes(data[: len(data) // 2])
    message = refused(job, ["--config", str(tiny_yaml), "--device", "cpu"], capsys)
    assert "damaged or truncated" in message


@pytest.mark.parametrize("job", READS_A_MODEL)
def test_a_checkpoint_of_another_network(job, tiny_yaml, tiny_checkpoint, capsys):
    argv = ["--config", str(tiny_yaml), "--device", "cpu", "--set", "network.n_channels=64"]
    message = refused(job, argv, capsys)
    assert "network.n_channels: 64, not 32" in message


@pytest.mark.parametrize("job", READS_A_MODEL)
def test_two_names_for_a_checkpoint(job, tiny_checkpoint, capsys):
    message = refused(job, ["--ckpt", str(tiny_checkpoint), "--epoch", "1"], capsys)
    assert "--ckpt and --epoch exclude each other" in message


def test_a_checkpoint_and_the_dataset_of_another(tiny_checkpoint):
    args = job_parser("").parse_args(["--ckpt", str(tiny_checkpoint), "--dataset", "mnist"])
    with pytest.raises(UserError, match=r"network\.n_channels: 64, not 32"):
        load_model(args, torch.device("cpu"))


@pytest.mark.parametrize("job", ["linear", "visualize_features"])
@pytest.mark.parametrize(("argument", "names"), [
    (("--blockname", "out_99"), "out_1, out_2"),
    (("--timestep", "1001"), "1..1000"),
    (("--timestep", "0"), "1..1000"),
])  # fmt: skip
def test_an_unknown_cell(job, argument, names, tiny_yaml, tiny_checkpoint, mistake):
    other = {"--blockname": ["--timestep", "1"], "--timestep": ["--blockname", "out_1"]}
    argv = ["--config", str(tiny_yaml), "--device", "cpu", *argument, *other[argument[0]]]
    with mistake(names):
        importlib.import_module(job).main(argv)


@pytest.mark.parametrize("job", ["train", "linear"])
def test_a_dataset_that_is_not_there(job, tiny_yaml, tiny_checkpoint, tmp_path, capsys):
    argv = ["--config", str(tiny_yaml), "--device", "cpu", "--data_dir", str(tmp_path / "none")]
    shape = ["--set", "dataset=folder"]
    if job == "linear":
        argv += ["--grid"]
    assert "folder" in refused(job, [*argv, *shape], capsys)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
])  # fmt: skip
def test_out_of_memory_names_the_setting(error, tiny_yaml, monkeypatch, capsys):
    import train

    def no_memory(*_):
        raise error

    monkeypatch.setattr(train.Trainer, "train_step", no_memory)
    message = refused("train", ["--config", str(tiny_yaml), "--device", "cpu"], capsys)
    assert "memory: lower batch_size" in message


@pytest.mark.parametrize("job", JOBS)
def test_help_names_every_argument_and_imports_do_nothing(job):
    done = subprocess.run(
        [sys.executable, f"{job}.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stderr == ""
    for argument in ("--config", "--data_dir", "--set", "--seed"):
        assert argument in done.stdout
    for argument in ("--device", "--use_amp"):  # where there is something to compute
        assert (argument in done.stdout) == (job in TAKES_A_DEVICE)
    if job in READS_A_MODEL:
        assert "--checkpoint" in done.stdout
        assert "--epoch" in done.stdout
    assert "(default: None)" not in done.stdout
