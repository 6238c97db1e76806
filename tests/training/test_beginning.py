"""Where a run begins: at latest.pth, after `load_epoch`, or anew; and what is refused at once."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from training_helpers import metric_lines, new_run, position

import checkpoint
import train
from config import load_config, parse_config
from model.DDPM import DDPM
from support.errors import UserError
from training.trainer import Trainer


@pytest.fixture
def config(tiny_config):
    return parse_config({**tiny_config.model_dump(), "batch_size": 8, "n_epoch": 3})


def at(config, **settings):
    """`config` with other settings."""
    return parse_config({**config.model_dump(), **settings})


# --- load_epoch


def test_load_epoch_starts_from_that_checkpoint_and_then_goes_on(tiny_yaml, mistake):
    common = ["--config", str(tiny_yaml), "--device", "cpu", "--sample_every", "9"]
    train.main(common)
    ckpts = Path(load_config(tiny_yaml).save_dir) / "ckpts"
    first = checkpoint.load(ckpts / "model_1.pth")
    names = sorted(ckpts.iterdir())
    with mistake(
        "model_1.pth: nothing is left to train after it, as the run ends at step 44: raise"
    ):
        train.main([*common, "--set", "load_epoch=1"])
    assert sorted(ckpts.iterdir()) == names
    train.main([*common, "--set", "load_epoch=0"])
    again = checkpoint.load(ckpts / "latest.pth")
    assert again["step"] == first["step"] == 44
    assert not torch.equal(again["net"]["final.weight"], first["net"]["final.weight"])  # new Adam
    before = (ckpts / "latest.pth").read_bytes()
    assert train.main([*common, "--set", "load_epoch=0"]) == 0  # finished: nothing to do
    assert (ckpts / "latest.pth").read_bytes() == before


def test_load_epoch_leaves_no_later_checkpoint_and_counts_epochs(tiny_yaml):
    common = ["--config", str(tiny_yaml), "--device", "cpu", "--sample_every", "9"]
    train.main(common)
    run = Path(load_config(tiny_yaml).save_dir)
    anew = load_config(tiny_yaml, ["load_epoch=0", "batch_size=2"])
    trainer = new_run(anew)
    position(trainer, restart=True)
    assert trainer.trainer.step == trainer.trainer.batches.steps_per_epoch
    assert sorted(path.name for path in (run / "ckpts").glob("*.pth")) == ["model_0.pth"]
    assert (run / "ckpts_before_1" / "model_1.pth").exists()
    position(trainer, restart=True)  # as after a kill before anything was saved


@pytest.fixture
def epoch_0(config):
    """model_0.pth after its epoch of five steps, better than any other, and the log of the run."""
    run = new_run(config)
    for _ in range(5):
        run.trainer.train_step()
    run.trainer.metrics.update(best_loss=1e-9, best_epoch=0)
    checkpoint.save(run.ckpts / "model_0.pth", run.trainer.state())
    steps = [(0, 5), (1, 6), (1, 10)]
    lines = [{"kind": "train", "step": step, "epoch": epoch} for epoch, step in steps]
    log = run.save_dir / "metrics.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.mark.parametrize(("images", "first"), [(40, 5), (56, 7), (24, 3)])
def test_after_load_epoch_comes_the_next_epoch_also_of_more_or_fewer_images(
    config, epoch_0, images, first
):
    run = new_run(at(config, load_epoch=0), n=images)
    position(run)
    assert run.trainer.step == first
    run.trainer.train_step()
    assert run.trainer.epoch == 1


def test_after_load_epoch_there_is_a_new_best_and_no_line_of_what_is_done_again(
    config, epoch_0, monkeypatch
):
    monkeypatch.setattr(DDPM, "default_steps", 4)  # of the samples
    run = new_run(at(config, load_epoch=0, n_step=8), n=56)
    position(run)
    run.run()
    assert checkpoint.load(run.ckpts / "best.pth")["metrics"]["best_epoch"] == 1
    lines = [(line["kind"], line["epoch"], line["step"]) for line in metric_lines(run.save_dir)]
    assert lines == [("train", 0, 5), ("train", 1, 8), ("test", 1, 8)]


def test_after_load_epoch_the_noise_that_is_trained_and_dropout_may_differ(config, epoch_0):
    values = config.model_dump()
    run = new_run(
        at(
            config,
            load_epoch=0,
            network=values["network"] | {"dropout": 0.3},
            diffusion=values["diffusion"] | {"time": "lognormal", "p_mean": -2.0},
        )
    )
    position(run)
    assert run.trainer.step == 5
    other = new_run(at(config, load_epoch=0, diffusion=values["diffusion"] | {"n_T": 100}))
    with pytest.raises(UserError, match="n_T: 100, not 1000"):
        position(other)


def test_load_epoch_is_remembered_by_a_run_that_goes_on_without_it(config, epoch_0):
    for i, load_epoch in enumerate((0, -1, 0)):
        run = new_run(at(config, load_epoch=load_epoch))
        position(run)
        assert run.trainer.step == 5 + i
        run.trainer.train_step()
        run.kept.save(run.trainer.step, run.trainer.full_state())


def test_a_run_with_a_value_that_changed_nothing_goes_on_without_it(config):
    run = new_run(at(config, distill={"weight": 0.03}))
    run.trainer.train_step()
    run.kept.save(run.trainer.step, run.trainer.full_state())
    again = new_run(config)
    position(again)
    assert again.trainer.step == 1


# --- anew


@pytest.mark.parametrize(("names", "stays"), [
    ({"model_0.pth", "best.pth"}, True),  # as this run leaves them, killed before its latest.pth
    ({"model_0.pth", "model_2.pth", "best.pth"}, False),
    ({"model_2.pth"}, False),
])  # fmt: skip
def test_checkpoints_of_another_run_are_not_taken_for_those_of_a_new_one(config, names, stays):
    run = new_run(config)
    run.ckpts.mkdir(parents=True)
    for name in names:
        (run.ckpts / name).touch()
    position(run)
    folder = run.ckpts if stays else run.save_dir / "ckpts_before_1"
    assert {path.name for path in folder.iterdir()} == names


def test_checkpoints_stay_on_the_disk_that_their_folder_links_to(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "model_3.pth").touch()
    run = tmp_path / "run"
    run.mkdir()
    (run / "ckpts").symlink_to(disk)
    train.retire(run / "ckpts", -1)
    assert (tmp_path / "ckpts_before_1" / "model_3.pth").exists()
    assert not list(disk.iterdir())


def test_a_run_that_began_with_restart_says_how_it_goes_on(tiny_yaml, monkeypatch, capsys):
    step = Trainer.train_step

    def stopped(trainer):
        step(trainer)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "train_step", stopped)
    common = ["--config", str(tiny_yaml), "--device", "cpu"]
    for options, words in (([], "; the same command"), (["--restart"], "without --restart goes")):
        with pytest.raises(SystemExit):
            train.main([*common, *options])
        assert words in capsys.readouterr().err


# --- at once


@pytest.fixture
def without_data(config, tiny_yaml, monkeypatch):
    """Calls train.main on a run that has a latest.pth, with --set and options; it reads no data."""
    run = new_run(config)
    checkpoint.save(run.kept.path, run.trainer.full_state())
    monkeypatch.setattr(train, "load_datasets", lambda *_: pytest.fail("data were read"))

    def call(setting: str, *options: str) -> None:
        argv = ["--config", str(tiny_yaml), "--device", "cpu", "--batch_size", "8"]
        train.main([*argv, "--set", "distill.loss=infonce", "--set", setting, *options])

    return call


@pytest.mark.parametrize(("setting", "options", "message"), [
    ("lrate=0.5", [], "lrate: 0.5, not 0.001"),
    ("load_epoch=3", [], "model_3.pth: no such checkpoint"),
    ("start_from=none.pth", ["--restart"], "none.pth: no such checkpoint"),
    ("start_from=none.pth", ["--dry_run"], "none.pth: no such checkpoint"),
    ("optim_args.betas=[0.9]", [], "optim_args: "),
    ("distill.block=out_9", [], "no block 'out_9'"),
    ("distill.teacher_timesteps=[1,1001]", [], "1001 is outside 1..1000"),
])  # fmt: skip
def test_a_mistake_is_told_before_the_data_are_read(
    without_data, mistake, setting, options, message
):
    with mistake(message):
        without_data(setting, *options)


@pytest.mark.skipif(os.name != "posix", reason="needs flock")
def test_so_is_another_process_in_the_folder(without_data, mistake, config):
    import fcntl

    with open(Path(config.save_dir, ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with mistake("another process"):
            without_data("n_epoch=3")
