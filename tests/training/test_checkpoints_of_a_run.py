"""What a run saves: the best, and nothing that is ruined."""

import math

import pytest
import torch
from training_helpers import assert_same, break_loss, dataset, metric_lines, new_run, trainer

import checkpoint
from config import parse_config
from datasets import Dataset
from evaluation.samples.trajectories import Trajectory
from model.DDPM import DDPM
from sampling import sample, sampler_settings
from support.errors import UserError
from training.held_out_loss import held_out_loss
from training.run import Run

CPU = torch.device("cpu")


@pytest.fixture
def config(tiny_config):
    return parse_config({**tiny_config.model_dump(), "batch_size": 8, "n_epoch": 3})


def test_a_loss_that_is_not_finite_changes_no_weight(config):
    run = new_run(config)
    t = run.trainer
    t.train_step()
    before = {k: v.clone() for k, v in t.denoiser.net.state_dict().items()}
    moments = [s["exp_avg"].clone() for s in t.optimizer.state.values()]
    mend = break_loss(t)
    t.train_step()
    assert_same(before, t.denoiser.net.state_dict())
    after = [s["exp_avg"] for s in t.optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    mend()
    t.train_step()
    values = run.read_window()
    assert values["skipped"] == 1
    assert math.isfinite(values["loss"])
    assert all(p.isfinite().all() for p in t.denoiser.parameters())


def one_saved_step(config, test: Dataset) -> Run:
    run = Run(trainer(config), test)
    run.trainer.train_step()
    run.kept.save(1, run.trainer.full_state())
    return run


def test_a_loss_that_rises_far_is_said_once(config, messages, monkeypatch):
    monkeypatch.setattr(DDPM, "default_steps", 1)
    monkeypatch.setattr("training.run.LOG_EVERY", 1)
    run = new_run(config)
    real = run.trainer.loss
    run.trainer.loss = lambda *args: real(*args) * (1 if run.trainer.step < 7 else 100)
    run.run()
    (said,) = [message for message in messages if "diverged" in message]
    assert said.startswith("step 8: the loss is ")
    assert "lower lrate, and start anew with --restart" in said


def test_ten_losses_in_a_row_that_are_not_finite_end_the_run(config):
    """Here those of the training images alone: the weights stay good, and are saved."""
    run = one_saved_step(config, dataset(8))
    good = checkpoint.load(run.kept.path)["net"]
    real = run.trainer.loss
    run.trainer.loss = lambda *args: real(*args) * math.nan
    with pytest.raises(UserError, match=f"step 15: 10 losses in .*{run.kept.path} holds step 10;"):
        run.run()
    assert_same(checkpoint.load(run.kept.path)["net"], good)


@pytest.mark.parametrize("step", [5, 3])  # that ends the epoch, that a save by the clock is after
@pytest.mark.parametrize("ruined", [math.nan, 1e30])  # these are finite, but no loss can be
def test_ruined_weights_replace_no_good_ones(config, step, ruined):
    """The step that ruins them has itself a finite loss."""
    run = one_saved_step(config, dataset(8))
    run.kept.every_s = 1e9 if step == 5 else 0
    good = run.kept.path.read_bytes()
    train_step = run.trainer.train_step

    def ruins():
        train_step()
        if run.trainer.step == step:
            for weight in run.trainer.denoiser.parameters():
                weight.data.fill_(ruined)

    run.trainer.train_step = ruins
    saved = 1 if step == 5 else step - 1
    with pytest.raises(UserError) as error:
        run.run()
    assert f"stopped at step {step}: the network's loss is no longer finite" in str(error.value)
    assert f"latest.pth holds step {saved};" in str(error.value)
    state = checkpoint.load(run.kept.path)
    assert state["step"] == saved
    assert all(weight.isfinite().all() for weight in state["net"].values())
    assert (run.kept.path.read_bytes() == good) == (step == 5)
    assert [path.name for path in run.ckpts.iterdir()] == ["latest.pth"]


def test_samples_are_drawn_as_many_at_a_time_as_are_trained_on(config, monkeypatch):
    monkeypatch.setattr(DDPM, "default_steps", 4)
    drawn, whole = [], sample

    def counting(denoiser, settings, indices, *more):
        drawn.append(len(indices))
        return whole(denoiser, settings, indices, *more)

    monkeypatch.setattr("training.run.sample", counting)
    run = new_run(parse_config({**config.model_dump(), "n_sample": 19}))
    denoiser, trajectory = run.trainer.ema_denoiser, Trajectory(4)
    settings = sampler_settings(denoiser)
    images = run._draw_samples(settings, trajectory)
    assert drawn == [8, 8, 3]
    shape = config.network.image_shape
    at_once = whole(denoiser, settings, list(range(19)), config.seed, shape)
    assert (images.int() - at_once.int()).abs().max() <= 1
    assert trajectory.table(images).shape[0] == 4


def test_nothing_at_an_epochs_end_takes_more_images_at_once_than_a_step(config, monkeypatch):
    monkeypatch.setattr(DDPM, "default_steps", 1)
    sizes = []
    run = new_run(parse_config({**config.model_dump(), "n_epoch": 1, "n_sample": 19}))
    run.test = dataset(20)
    for denoiser in (run.trainer.denoiser, run.trainer.ema_denoiser):
        denoiser.net.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    run.run()
    assert max(sizes) == 8
    assert len(sizes) >= 5 + 3 + 3 + 3  # steps, two losses, samples


@pytest.mark.parametrize("save_model", [True, False])
def test_best_is_the_epoch_of_the_lowest_loss_and_only_it_need_be_kept(
    config, save_model, monkeypatch
):
    """Three epochs of five steps; before the last the EMA weights are spoilt."""
    monkeypatch.setattr(DDPM, "default_steps", 4)  # of the samples
    run = new_run(parse_config({**config.model_dump(), "save_model": save_model}))
    train_step = run.trainer.train_step

    def spoils():
        train_step()
        if run.trainer.step == 11:
            for weight in run.trainer.ema.ema_model.parameters():
                weight.data.mul_(3)

    run.trainer.train_step = spoils
    run.run()
    tests = [line for line in metric_lines(run.save_dir) if line["kind"] == "test"]
    losses = {line["epoch"]: line["loss"] for line in tests}
    lowest = min(losses, key=losses.get)
    assert sorted(losses) == [0, 1, 2]
    assert lowest != 2
    best = checkpoint.load(run.ckpts / "best.pth")
    assert best["epoch"] == best["metrics"]["best_epoch"] == lowest
    assert best["metrics"]["best_loss"] == losses[lowest]
    model = checkpoint.load_denoiser(run.ckpts / "best.pth", CPU)
    assert held_out_loss(model.denoiser, run.test, 8) == pytest.approx(losses[lowest])
    kept = {path.name for path in run.ckpts.iterdir()}
    models = {"model_0.pth", "model_1.pth", "model_2.pth"} if save_model else set()
    assert kept == {"latest.pth", "best.pth"} | models
