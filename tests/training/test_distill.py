"""Self-distillation: its losses against NumPy, and what it does to a training step."""

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
from conftest import ROOT, standard_normal
from distill_jobs import RUNS, dataset
from scipy.spatial.transform import Rotation

from config import parse_config
from datasets import Dataset
from model.models import build_denoiser
from support import distributed
from support.errors import UserError
from training.augmentation import augment
from training.distill import dispersive, infonce, jitter_color, regression
from training.run import Run
from training.trainer import Trainer
from utils import generator

CPU = torch.device("cpu")


def trainer(loss, **changes) -> Trainer:
    return Trainer(distill_jobs.config(loss, **changes), dataset(40), CPU, use_amp=False)


def rows(name, *shape):
    return standard_normal(name, shape)


# --- the losses


def test_infonce_is_the_cross_entropy_of_cosines_over_the_batch_and_the_queue():
    q, k, temperature = rows("q", 5, 7), rows("k", 9, 7), 0.3
    place = np.array([3, 1, 0, 4, 2])
    expected = []
    for i in range(5):
        cosines = [q[i] @ key / np.linalg.norm(q[i]) / np.linalg.norm(key) for key in k]
        e = np.exp(np.array(cosines) / temperature)
        expected.append(-np.log(e[place[i]] / e.sum()))
    found = infonce(*map(torch.from_numpy, (q, k, place)), temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_regression_is_quadratic_up_to_its_border_and_linear_beyond():
    z, target = rows("z", 6, 5), rows("target", 6, 5)
    z[0] = target[0] + 0.01
    d = np.abs(z - target)
    expected = np.where(d < 0.05, d**2 / 0.1, d - 0.025).mean(1)
    found = regression(torch.from_numpy(z), torch.from_numpy(target))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert expected[0] == pytest.approx(0.001, rel=1e-3)


def test_dispersive_is_the_log_of_a_mean_over_pairs():
    z, tau = 50 + rows("z", 6, 5), 0.7
    pairs = [np.exp(-((a - b) ** 2).sum() / (5 * tau)) for a in z for b in z]
    assert dispersive(torch.from_numpy(z), tau) == pytest.approx(np.log(np.mean(pairs)), rel=1e-3)


def test_dispersive_ends_at_0_where_all_are_the_same_and_at_minus_log_n_where_all_are_far():
    z = torch.ones(8, 3, requires_grad=True)
    loss = dispersive(z, 0.5)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.equal(z.grad, torch.zeros(8, 3))
    assert dispersive(1e3 * torch.eye(8), 0.5).item() == pytest.approx(-math.log(8))


# --- the teacher's view


def test_colours_are_turned_scaled_and_made_grey_as_in_numpy():
    n, strength = 40, 0.7
    x = torch.from_numpy(0.3 * standard_normal("colours", (n, 3, 4, 4))).clamp(-1, 1)
    found = jitter_color(x, strength, generator("cpu", 3), n, slice(None))
    u = torch.rand(6, n, generator=generator("cpu", 3)).double().numpy()
    kinds = set()
    for i in range(n):
        brightness, contrast, saturation = 1 + 0.8 * strength * (2 * u[:3, i] - 1)
        grey, changed = u[4, i] < 0.2, u[5, i] < 0.8
        kinds.add((bool(grey), bool(changed)))
        turn = 2 * np.pi * 0.2 * strength * (2 * u[3, i] - 1)
        matrix = Rotation.from_rotvec(turn * np.ones(3) / np.sqrt(3)).as_matrix()
        lights = brightness * (x[i].double().numpy().reshape(3, -1) + 1) / 2
        mean = np.broadcast_to(lights.mean(0), lights.shape)
        lights = mean + (0 if grey else saturation) * (matrix @ (lights - mean))
        lights = mean.mean() + contrast * (lights - mean.mean())
        expected = np.clip(2 * lights - 1, -1, 1) if changed else x[i].numpy().reshape(3, -1)
        np.testing.assert_allclose(found[i].reshape(3, -1), expected, atol=1e-5)
    assert len(kinds) == 4


def test_grey_images_stay_grey_and_parts_are_cut_from_the_whole():
    x = torch.rand(8, 1, 4, 4) - 0.5
    whole = jitter_color(x, 1.0, generator("cpu", 0), 8, slice(None))
    colored = jitter_color(x.expand(8, 3, 4, 4), 1.0, generator("cpu", 0), 8, slice(None))
    torch.testing.assert_close(colored, whole.expand(8, 3, 4, 4))
    part = jitter_color(x[2:5], 1.0, generator("cpu", 0), 8, slice(2, 5))
    assert torch.equal(part, whole[2:5])


@pytest.mark.parametrize("process", ["DDPM", "EDM"])
def test_the_teacher_sees_another_view_at_no_more_noise_and_computes_no_more_than_asked(
    process, monkeypatch
):
    t = trainer("infonce", model_type=process, distill={"block": "out_2", "queue": 20})
    batch, labels = t.batches[0]
    view, same_labels = t.distill.views[0]
    assert torch.equal(labels, same_labels)
    assert not torch.equal(batch, view)
    seen, layers = [], []
    for i, layer in enumerate(t.ema_denoiser.net.up):
        layer.register_forward_hook(lambda *_, i=i: layers.append(i))
    real = t.ema_denoiser.features

    def features(x0, timestep, *more):
        seen.append((x0, timestep))
        return real(x0, timestep, *more)

    monkeypatch.setattr(t.ema_denoiser, "features", features)
    sigma = t.ema_denoiser.sigma(torch.linspace(1, 5, 16))
    t.distill.look(0, sigma)
    x0, timesteps = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert torch.equal(x0, view)
    low, high = t.distill.timesteps
    assert (low, high) == (t.denoiser.probe_timesteps[0], t.denoiser.probe_timesteps[-1])
    students = torch.linspace(1, 5, 16)
    assert (timesteps < students + 1e-4).all()
    assert (timesteps <= high).all()
    assert (timesteps > students - 1e-4).any()  # where more was drawn than the student's image has
    assert (timesteps < students - 0.1).any()
    assert set(layers) == {0, 1}


def test_its_geometric_view_is_told_to_a_network_that_is_told_such_things(monkeypatch):
    for told in (True, False):
        network = {**distill_jobs.config("regression").network.model_dump()}
        network["augment_dim"] = 9 if told else 0
        t = trainer("regression", network=network, distill={"teacher_augment": 0.9})
        labels = []
        real = t.ema_denoiser.net.time_emb.forward

        def forward(c_noise, augment, y, real=real, labels=labels):
            labels.append(augment)
            return real(c_noise, augment, y)

        monkeypatch.setattr(t.ema_denoiser.net.time_emb, "forward", forward)
        t.distill.look(0, torch.ones(16))
        assert all((label is not None) == told for label in labels)
        if told:
            expected = augment(torch.zeros(16, 1, 8, 8), 0.9, generator("cpu", 0), 16)[1]
            assert torch.cat(labels).shape == expected.shape
            assert torch.cat(labels).any()


# --- the step


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
    x0, u, noise, _ = t._draw_images()
    sigma = t.denoiser.training_sigma(u)
    t.optimizer.zero_grad()
    t.distill.look(t.step, sigma)
    t._backward(x0, sigma, noise, {})
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


# --- mistakes


@pytest.mark.parametrize(("changes", "message"), [
    ({"distill": {"block": "out_9"}}, "distill.block: no block 'out_9': there are out_1, .*out_4"),
    ({"distill": {"teacher_timesteps": [1, 1001]}}, "teacher_timesteps: 1001 is outside 1..1000"),
    ({"distill": {"teacher_timesteps": [3, 19]}, "model_type": "EDM"}, "19 is outside 1..18"),
    ({"distill": {"teacher_timesteps": [9, 3]}}, "must be the lowest t and the highest"),
    ({"distill": {"loss": "dispersive"}, "accumulate": 2}, "set accumulate to 1"),
])  # fmt: skip
def test_mistakes(changes, message):
    with pytest.raises(UserError, match=message):
        trainer("infonce", **changes)


def test_a_checkpoint_of_the_run_is_one_of_a_plain_network(tmp_path):
    state = distill_jobs.trained("infonce")
    inside = parse_config(state["config"])
    assert inside.distill.loss == "infonce"
    net = build_denoiser(inside).net
    assert net.state_dict().keys() == state["ema"].keys()
    net.load_state_dict(state["ema"])
