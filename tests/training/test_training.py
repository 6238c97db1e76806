"""Training: what a step does, and that a stopped run goes on as if nothing had happened."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from ema_pytorch import EMA
from training_helpers import assert_same, metric_lines, new_run, position, state_of, trainer

import checkpoint
import train
from config import load_config, parse_config
from support.errors import UserError
from training.run import Run
from training.trainer import learning_rate

CPU = torch.device("cpu")


@pytest.fixture
def config(tiny_config):
    return parse_config({**tiny_config.model_dump(), "batch_size": 8, "n_epoch": 3})


def rates(steps=8, steps_per_epoch=2, **settings) -> list[float]:
    config = parse_config({"lrate": 0.1, "warm_epoch": 0, **settings})
    return [learning_rate(config, step, steps_per_epoch, steps) for step in range(steps)]


def test_the_rate_warms_up_by_epochs_or_steps_and_decays_to_0():
    assert rates(warm_epoch=4) == pytest.approx([0.025] * 2 + [0.05] * 2 + [0.075] * 2 + [0.1] * 2)
    assert rates() == [0.1] * 8
    assert rates(warm_step=4)[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    linear = rates(lr_decay="linear", decay_from=0.5)
    assert linear == pytest.approx([0.1] * 5 + [0.075, 0.05, 0.025])
    cosine = rates(lr_decay="cosine")
    assert cosine[0] == 0.1
    assert cosine[4] == pytest.approx(0.05)
    assert cosine[7] < 0.005


def test_the_same_seed_gives_the_same_run_and_another_does_not(config):
    runs = []
    for seed in (0, 0, 1):
        t = trainer(parse_config({**config.model_dump(), "seed": seed}))
        for _ in range(3):
            t.train_step()
        runs.append(state_of(t))
    assert_same(runs[0], runs[1])
    assert not torch.equal(runs[0]["net.final.weight"], runs[2]["net.final.weight"])


DECAYING = {"warm_epoch": 2, "warm_step": 3, "lr_decay": "cosine", "decay_from": 0.2}


@pytest.mark.parametrize(("use_amp", "settings"), [
    (False, {}), (True, {}), (False, DECAYING), (False, {**DECAYING, "n_step": 9}),
])  # fmt: skip
def test_resumed_equals_uninterrupted_bit_for_bit(config, use_amp, settings):
    config = parse_config({**config.model_dump(), **settings})
    whole = trainer(config, use_amp)
    for _ in range(9):
        whole.train_step()
    first = new_run(config, use_amp)
    for _ in range(4):  # in the middle of an epoch of five steps
        first.trainer.train_step()
    first.kept.save(4, first.trainer.full_state())
    second = trainer(config, use_amp)
    second.resume(checkpoint.load(first.kept.path))
    for _ in range(5):
        second.train_step()
    assert second.step == whole.step
    assert_same(state_of(second), state_of(whole))
    for mine, other in zip(
        second.optimizer.state.values(), whole.optimizer.state.values(), strict=True
    ):
        assert_same(mine, other)


def test_ema_is_that_of_ema_pytorch(config):
    t = trainer(config)
    theirs = EMA(t.denoiser.net, beta=config.ema, update_after_step=0, update_every=1)
    for _ in range(5):
        t.train_step()
        theirs.update()
    for a, b in zip(t.ema.ema_model.parameters(), theirs.ema_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert t.ema.step.device.type == "cpu"


def test_gradients_are_clipped(config):
    t = trainer(parse_config({**config.model_dump(), "grad_clip": 1e-3}))
    t.train_step()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in t.denoiser.parameters()))
    assert norm == pytest.approx(1e-3, rel=1e-3)
    assert t.window.sums["grad_norm"] > 1e-2


def test_a_step_of_several_batches_is_that_of_one_large_batch(config):
    values = config.model_dump()
    values |= {"optim": "SGD", "lrate": 0.1, "flip": True, "cond_drop_prob": 0.5}
    values["network"] |= {"dropout": 0.0, "augment_dim": 9}
    values["diffusion"] |= {"augment_prob": 0.5}
    runs = {}
    for batch_size, accumulate in ((16, 1), (8, 2), (8, 1)):
        sizes = {"batch_size": batch_size, "accumulate": accumulate}
        t = trainer(parse_config({**values, **sizes}))
        seen = []
        t.loss.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(len(given[0])))
        for _ in range(3):
            t.train_step()
        assert seen == [batch_size] * 3 * accumulate
        runs[batch_size, accumulate] = t
    one, several, small = runs.values()
    assert several.batches.steps_per_epoch == one.batches.steps_per_epoch == 40 // 16
    start = trainer(parse_config({**values, "batch_size": 16})).denoiser.net.state_dict()
    for name, weight in one.denoiser.net.state_dict().items():
        torch.testing.assert_close(several.denoiser.net.state_dict()[name], weight)
    moved, apart = (
        max((a - b).abs().max() for a, b in zip(one.denoiser.parameters(), other, strict=True))
        for other in (start.values(), small.denoiser.parameters())
    )
    assert min(moved, apart) > 1e-3  # far above rounding
    for name in ("loss", "grad_norm", "bucket_images", "bucket_loss"):
        torch.testing.assert_close(several.window.sums[name], one.window.sums[name])


def test_a_step_of_more_images_than_there_are_is_refused(config):
    config = parse_config({**config.model_dump(), "accumulate": 6})
    with pytest.raises(UserError, match="batch_size 8 times accumulate 6 is more than the 40"):
        trainer(config)


def test_n_step_ends_the_run_as_an_epoch_does_and_may_be_raised(config):
    values = {**config.model_dump(), "save_every": 9, "sample_every": 9}

    def run(**changes) -> Run:
        r = new_run(parse_config({**values, **changes}))
        position(r)
        r.run()
        return r

    folder = run(n_step=7).save_dir  # an epoch has five steps
    state = checkpoint.load(folder / "ckpts" / "model_1.pth")
    assert (state["epoch"], state["step"]) == (1, 7)
    assert checkpoint.saved_epochs(folder) == [1]
    assert [(line["kind"], line["step"]) for line in metric_lines(folder)] == [
        ("train", 5), ("train", 7), ("test", 7),
    ]  # fmt: skip
    assert (folder / "visual" / "samples_ep1.png").exists()
    longer, whole = run(n_step=9).trainer, trainer(config)
    for _ in range(9):
        whole.train_step()
    assert longer.step == 9
    for weights in ("net", "ema"):
        assert_same(longer.state()[weights], whole.state()[weights])


def test_the_loss_falls_on_real_digits(tiny_yaml):
    assert train.main(["--config", str(tiny_yaml), "--device", "cpu"]) == 0
    run = Path(load_config(tiny_yaml).save_dir)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    tests = [line["loss"] for line in lines if line["kind"] == "test"]
    assert losses[-1] < 0.7 * losses[0]
    assert tests[1] < tests[0] < 1.1
    assert len(lines[0]["loss_by_t"]) == 10
    names = {p.name for p in (run / "ckpts").iterdir()}
    assert names == {"model_0.pth", "model_1.pth", "best.pth", "latest.pth"}
    state = checkpoint.load(run / "ckpts" / "model_1.pth")
    assert "resume" not in state
    norm = math.sqrt(sum(w.square().sum().item() for w in state["net"].values()))
    assert lines[-2]["param_norm"] == pytest.approx(norm, rel=1e-5)
    pictures = {path.name for path in (run / "visual").iterdir()}
    assert pictures == {
        "samples_ep0.png", "samples_ep1.png", "denoise_trajectory.png", "loss_curve.png",
        "loss_by_timestep_bucket.png",
    }  # fmt: skip
    assert list((run / "tensorboard").iterdir())


def test_another_config_is_refused_with_the_differences(tiny_yaml, capsys):
    common = ["--config", str(tiny_yaml), "--device", "cpu", "--sample_every", "9"]
    train.main([*common, "--set", "n_epoch=1"])
    with pytest.raises(SystemExit) as stop:
        train.main([*common, "--set", "lrate=0.5"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "lrate: 0.5, not 0.001" in error
    assert "--restart" in error
    assert train.main([*common, "--set", "linear.timestep=3"]) == 0  # and n_epoch is 2 again
    run = Path(load_config(tiny_yaml).save_dir)
    assert checkpoint.load(run / "ckpts" / "latest.pth")["epoch"] == 1
    log = (run / "metrics.jsonl").read_text()
    assert train.main([*common, "--set", "lrate=0.5", "--set", "n_epoch=1", "--restart"]) == 0
    assert checkpoint.load(run / "ckpts" / "latest.pth")["epoch"] == 0
    assert checkpoint.saved_epochs(run) == [0]  # model_1.pth of the earlier run is not the newest
    before = run / "ckpts_before_1"
    assert (before / "model_1.pth").exists()
    assert (before / "metrics.jsonl").read_text() == log


def test_the_length_of_a_run_whose_rate_decays_stays(tiny_config):
    def free(**settings) -> set[str]:
        return train.may_change(parse_config({**tiny_config.model_dump(), **settings}))[0]

    assert {"n_epoch", "n_step"} <= free()
    assert not {"n_epoch", "n_step"} & free(lr_decay="linear")
    assert free(lr_decay="linear", n_step=9) & {"n_epoch", "n_step"} == {"n_epoch"}
    advice = train.may_change(parse_config({"lr_decay": "cosine"}))[1]
    assert advice.startswith("with lr_decay cosine, n_epoch decides the rate of every step: put")


@pytest.mark.parametrize("damage", [
    lambda state: state.pop("step"),
    lambda state: state.update(step=-1),
    lambda state: state.update(metrics={"skipped": 0}),
    lambda state: state["resume"].update(optimizer={}),
    lambda state: state["resume"]["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
    lambda state: state["resume"]["window"].pop("loss"),
])  # fmt: skip
def test_what_training_cannot_go_on_from(config, damage):
    run = new_run(config)
    run.trainer.train_step()
    latest = run.kept.path
    checkpoint.save(latest, run.trainer.full_state())
    state = checkpoint.load(latest)
    damage(state)
    torch.save(state, latest)  # without a checksum
    before = latest.read_bytes()
    with pytest.raises(UserError, match=r"damaged: what is needed to go on .*--restart"):
        position(run)
    assert latest.read_bytes() == before


def test_a_run_of_before_norms_were_counted_goes_on(config):
    first, second = trainer(config), trainer(config)
    first.train_step()
    state = copy.deepcopy(first.full_state())
    del state["resume"]["window"]["norms"]
    second.resume(state)
    assert_same(state_of(second), state_of(first))


def test_dry_run_writes_nothing(tiny_yaml, capsys):
    assert train.main(["--config", str(tiny_yaml), "--device", "cpu", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    for word in ("parameters", "GFLOPs", "memory", "images/s", "time expected"):
        assert word in printed
    assert not Path(load_config(tiny_yaml).save_dir).exists()


def test_epochs_are_refused_where_steps_end_the_run(tiny_yaml, mistake):
    with mistake("n_step is 5"):
        train.main(["--config", str(tiny_yaml), "--epochs", "3", "--set", "n_step=5"])


def run_train(tiny_yaml, **options):
    return subprocess.Popen(
        [sys.executable, "train.py", "--config", str(tiny_yaml), "--device", "cpu",
         "--set", "n_epoch=6", "--sample_every", "3"],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, **options,
    )  # fmt: skip


def wait_for(path: Path, process) -> None:
    deadline = time.monotonic() + 600
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_killed_and_resumed_equals_uninterrupted(tiny_yaml, tmp_path, how, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = Path(load_config(tiny_yaml).save_dir)
    latest = run / "ckpts" / "latest.pth"
    process = run_train(tiny_yaml)
    wait_for(run / "ckpts" / "model_1.pth", process)
    process.send_signal(how)
    _, error = process.communicate(timeout=600)
    if how == signal.SIGKILL:
        assert process.returncode == -how
    else:
        assert process.returncode == 128 + how
        assert "the same command goes on from there" in error
    assert checkpoint.load(latest)["step"] < 6 * 22
    process = run_train(tiny_yaml)
    assert process.wait(timeout=600) == 0, process.stderr.read()
    resumed, resumed_lines = checkpoint.load(latest), metric_lines(run)

    run.rename(tmp_path / "first")
    process = run_train(tiny_yaml)
    assert process.wait(timeout=600) == 0
    whole = checkpoint.load(latest)
    for weights in ("net", "ema"):
        assert_same(resumed[weights], whole[weights])
    assert resumed_lines == metric_lines(run)


@pytest.mark.parametrize(("options", "name", "weight"), [
    ({"diffusion": {"augment_prob": 0.5}, "network": {"augment_dim": 9}}, "augment", "aug_emb"),
    ({"cond_drop_prob": 0.3}, "y", "label_emb"),
])  # fmt: skip
def test_conditions_are_drawn_by_step_and_reach_the_network(config, options, name, weight):
    values = config.model_dump()
    for key, value in options.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    t = trainer(parse_config({**values, "batch_size": 40}))
    before = t.denoiser.net.time_emb.get_parameter(f"{weight}.weight").clone()
    first, again = t._draw_images(), t._draw_images()
    assert list(first) == ["x0", "u", "noise", name]
    assert torch.equal(first[name], again[name])
    t.train_step()
    assert not torch.equal(first[name], t._draw_images()[name])
    assert not torch.equal(before, t.denoiser.net.time_emb.get_parameter(f"{weight}.weight"))
    if name == "y":
        assert set(first["y"].tolist()) == {-1, 0}
