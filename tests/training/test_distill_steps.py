"""What self-distillation does to a training step, to a run, and over several processes."""

import copy
import io
import math
import os
import subprocess
import sys

import distill_jobs
import numpy as np
import pytest
import torch
from conftest import ROOT
from distill_jobs import CPU, RUNS, dataset, trainer

from config import parse_config
from datasets import Dataset
from model.models import build_denoiser
from support import distributed
from training.distill import dispersive, dispersive_cosine, infonce, regression
from training.run import Run
from training.trainer import Trainer


def parts_of(state: dict) -> dict[str, torch.Tensor]:
    """All tensors of a full state by name."""
    found = {}

    def add(name, value):
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                add(f"{name}.{key}", inner)

    add("", {key: state[key] for key in ("net", "ema", "resume")})
    return found


@pytest.mark.parametrize("loss", RUNS)
def test_gradients_are_those_of_the_two_losses_and_none_reaches_the_teacher(loss):
    """By hand: the student's features from a pass of their own, the teacher's as they are."""
    t = trainer(loss, distill={"weight": 0.7, "block": "out_2", "queue": 20})
    for _ in range(2):  # keys in the queue
        t.train_step()
    theirs = {k: v.clone() for k, v in t.ema.ema_model.state_dict().items()}
    student, projector = copy.deepcopy(t.denoiser), copy.deepcopy(t.distill.projector)
    drawn = t._draw_images()
    x0, noise = drawn["x0"], drawn["noise"]
    sigma = t.denoiser.training_sigma(drawn["u"])
    t.optimizer.zero_grad()
    looked = t.distill.look(t.step, sigma)
    t._backward(x0, sigma, noise, {}, looked.get("keys"))
    for parameter in t.ema.ema_model.parameters():
        assert parameter.grad is None
    assert all(torch.equal(v, theirs[k]) for k, v in t.ema.ema_model.state_dict().items())
    z = projector(student.features(x0, student.t(sigma), noise, ["out_2"])["out_2"])
    keys, place, settings = t.distill._keys, torch.arange(len(z)), t.config.distill
    extra = {
        "infonce": lambda: infonce(
            z, torch.cat([keys, t.distill.queue]), place, settings.temperature
        ).mean(),
        "regression": lambda: regression(z, keys).mean(),
        "dispersive": lambda: dispersive(z, settings.tau),
        "dispersive_cosine": lambda: dispersive_cosine(z, settings.temperature),
    }[loss]()
    assert len(t.distill.queue) == (20 if loss == "infonce" else 0)
    assert keys is None or not keys.requires_grad
    student.zero_grad()
    projector.zero_grad()
    (student.loss(x0, sigma, noise).mean() + 0.7 * extra).backward()
    expected = [*student.parameters(), *projector.parameters()]
    assert len(expected) == len(t.parameters)
    for ours, by_hand in zip(t.parameters, expected, strict=True):
        torch.testing.assert_close(ours.grad, by_hand.grad, rtol=1e-3, atol=1e-6)
    t.distill.keep(torch.tensor(False), 0.9)
    assert t.distill.read_and_reset() is not None


@pytest.mark.parametrize("loss", RUNS)
def test_a_loss_of_almost_no_weight_leaves_the_training_what_it_is(loss):
    """It draws nothing that the denoising loss draws, and adds nothing to the network."""
    with_it = distill_jobs.trained(loss, distill={"weight": 1e-20})
    plain = trainer(loss, distill={"loss": None})
    for _ in range(distill_jobs.STEPS):
        plain.train_step()
    state = plain.full_state()
    assert plain.distill is None
    assert "distill" not in state["resume"]
    assert with_it["net"].keys() == state["net"].keys() == with_it["ema"].keys()
    for part in ("net", "ema"):
        for key, value in state[part].items():
            torch.testing.assert_close(with_it[part][key], value, rtol=0, atol=1e-7)


@pytest.mark.parametrize("loss", RUNS)
def test_resumed_equals_uninterrupted_bit_for_bit(loss):
    optim, views = "Adam", {"teacher_color": 0.5, "teacher_augment": 0.5}
    whole, first = (trainer(loss, optim=optim, distill=views) for _ in range(2))
    for _ in range(4):
        whole.train_step()
    for _ in range(2):
        first.train_step()
    file = io.BytesIO()
    torch.save(first.full_state(), file)
    file.seek(0)
    second = trainer(loss, optim=optim, distill=views)
    second.resume(torch.load(file, weights_only=True))
    for _ in range(2):
        second.train_step()
    ours, theirs = parts_of(second.full_state()), parts_of(whole.full_state())
    assert ours.keys() == theirs.keys()
    assert ".resume.distill.queue" in ours
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_the_queue_is_shorter_than_an_epoch():
    t = trainer("infonce", accumulate=1, distill={"queue": 4096})
    for _ in range(2 * t.batches.steps_per_epoch):
        t.train_step()
    assert len(t.distill.queue) == 9 * 8


def test_the_queue_holds_the_newest_keys_and_the_projector_of_keys_is_an_average():
    t = trainer("infonce", distill={"queue": 24})
    keys, average = [], None
    for _ in range(3):
        t.train_step()
        keys.insert(0, t.distill._keys)
        decay, newest = t.ema.get_current_decay(), t.distill.projector[1].weight.detach().clone()
        average = newest if average is None else decay * average + (1 - decay) * newest
    assert torch.equal(t.distill.queue, torch.cat(keys)[:24])
    torch.testing.assert_close(t.distill.key_projector[1].weight, average)
    torch.testing.assert_close(t.distill.queue.norm(dim=1), torch.ones(24))


@pytest.mark.parametrize("loss", ["infonce", "regression"])
def test_several_batches_per_step_are_one_large_batch(loss):
    large, small = (
        parts_of(distill_jobs.trained(loss, batch_size=16 // n, accumulate=n)) for n in (1, 4)
    )
    for name, value in large.items():
        torch.testing.assert_close(small[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_the_log_gets_its_mean_without_the_skipped_steps(tmp_path):
    run = Run(trainer("regression", save_dir=str(tmp_path)), dataset(8))
    distill, losses = run.trainer.distill, []
    for step in range(4):
        run.trainer.train_step()
        if step == 2:  # as if the optimizer had skipped it
            distill.sums -= torch.tensor([distill._loss.item(), 1.0])
        else:
            losses.append(distill._loss.item())
    assert run.read_window()["distill_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert distill.read_and_reset() is None
    distill._loss += math.nan
    distill.keep(torch.tensor(True), 0.9)
    assert distill.sums.tolist() == [0, 0]
    plain = Run(trainer("regression", distill={"loss": None}), dataset(8))
    plain.trainer.train_step()
    assert "distill_loss" not in plain.read_window()


def test_the_student_learns_to_tell_images_apart():
    """Sixteen images, each of one grey, at the noise that EDM trains: -log 1/16 is chance."""
    config = distill_jobs.config(
        "infonce", optim="Adam", lrate=3e-3, diffusion={"time": "lognormal"},
        distill={"queue": 0, "weight": 1.0},
    )  # fmt: skip
    greys = np.arange(16, dtype=np.uint8).reshape(16, 1, 1, 1) * 17 + np.zeros((1, 8, 8), np.uint8)
    t = Trainer(config, Dataset("digits", "train", greys, np.arange(16), ["0"]), CPU, False)
    losses = [(t.train_step(), t.distill._loss.item())[1] for _ in range(40)]
    assert losses[0] == pytest.approx(math.log(16), abs=0.3)
    assert np.mean(losses[-5:]) < math.log(16) - 0.5


def test_a_checkpoint_of_the_run_is_one_of_a_plain_network(tmp_path):
    state = distill_jobs.trained("infonce")
    inside = parse_config(state["config"])
    assert inside.distill.loss == "infonce"
    net = build_denoiser(inside).net
    assert net.state_dict().keys() == state["ema"].keys()
    net.load_state_dict(state["ema"])


# --- several processes


def test_what_the_ranks_compare_with_is_cut_from_what_one_process_has(monkeypatch):
    views = {"teacher_color": 0.5, "teacher_augment": 0.5}

    def keys(rank, world_size):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: world_size)
        t = trainer("regression", distill=views)
        t.distill.look(1, torch.full((16 // world_size,), 0.5))
        return t.distill._keys

    torch.testing.assert_close(torch.cat([keys(0, 2), keys(1, 2)]), keys(0, 1))


def test_two_processes_do_what_one_does(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*launcher, "--nproc_per_node=2", "tests/distill_jobs.py", str(tmp_path)],
        cwd=ROOT, check=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for loss in RUNS:
        alone = parts_of(distill_jobs.trained(loss))
        together = parts_of(torch.load(tmp_path / f"{loss}.pth", weights_only=True))
        assert alone.keys() == together.keys()
        for name, value in alone.items():
            torch.testing.assert_close(together[name], value, rtol=1e-3, atol=1e-5, msg=name)
