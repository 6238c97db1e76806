"""float16 with a scaler, as on a GPU without bfloat16; here on the CPU."""

import copy

import pytest
import torch
from training_helpers import (
    assert_same,
    break_loss,
    new_run,
    state_of,
    trainer,
)

import utils
from config import parse_config
from training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture
def config(tiny_config):
    return parse_config({**tiny_config.model_dump(), "batch_size": 8, "n_epoch": 3})


@pytest.fixture
def float16(monkeypatch):
    """What --use_amp is on a GPU without bfloat16: float16 with a scaler, here on the CPU."""
    monkeypatch.setattr(utils, "amp_dtype", lambda device: torch.float16)


def largest_change(t: Trainer, before: dict) -> float:
    after = t.denoiser.net.state_dict()
    return max((after[name] - before[name]).abs().max().item() for name in before)


def test_a_scaled_step_is_that_of_float32(config, float16):
    """SGD, whose step is in proportion to the gradient: unscaled and clipped, not as it came."""
    values = {**config.model_dump(), "optim": "SGD", "lrate": 0.1, "grad_clip": 0.1}
    runs = []
    for use_amp in (False, True):
        t = trainer(parse_config(values), use_amp)
        assert t.scaler.is_enabled() == use_amp
        before = copy.deepcopy(t.denoiser.net.state_dict())
        t.train_step()
        runs.append(t)
    plain, scaled = (t.denoiser.net.state_dict() for t in runs)
    moved = largest_change(runs[0], before)
    assert moved > 1e-4
    assert max((plain[name] - scaled[name]).abs().max().item() for name in plain) < 0.05 * moved


def test_an_overflow_of_the_scaled_gradients_only_lowers_the_scale(config, float16):
    run = new_run(config, use_amp=True)
    t = run.trainer
    t.train_step()
    norm = t.window.sums["grad_norm"].item()
    before = copy.deepcopy(t.denoiser.net.state_dict())
    t.scaler.update(2.0**60)
    t.train_step()
    assert t.scaler.get_scale() == 2.0**59
    assert largest_change(t, before) == 0
    values = run.read_window()
    assert values["skipped"] == 0  # the loss was fine
    assert values["grad_norm"] == norm > 0  # of the step that has one
    mend = break_loss(t)
    t.train_step()
    assert run.read_window()["skipped"] == 1
    mend()
    t.scaler.update(2.0**10)
    t.train_step()
    assert largest_change(t, before) > 0


def test_the_scale_is_resumed(config, float16):
    whole, first = trainer(config, True), trainer(config, True)
    for t in (whole, first):
        # from here it falls, step by step
        t.scaler.load_state_dict({**t.scaler.state_dict(), "scale": 2.0**60})
        for _ in range(3):
            t.train_step()
    second = trainer(config, True)
    second.resume(copy.deepcopy(first.full_state()))
    for t in (whole, second):
        t.train_step()
    assert second.scaler.get_scale() == whole.scaler.get_scale() == 2.0**56
    assert_same(state_of(second), state_of(whole))


def test_a_run_without_a_scaler_goes_on_with_a_new_one(config, float16):
    first = trainer(config)
    first.train_step()
    second = trainer(config, use_amp=True)
    second.resume(copy.deepcopy(first.full_state()))
    second.train_step()
    assert second.step == 2
    assert second.full_state()["resume"]["scaler"]
