"""Self-distillation: its losses against NumPy, the teacher's view, and mistakes in the config."""

import math

import distill_jobs
import numpy as np
import pytest
import torch
from conftest import standard_normal
from distill_jobs import trainer
from scipy.spatial.transform import Rotation

from support.errors import UserError
from training.augmentation import augment
from training.distill import dispersive, dispersive_cosine, infonce, jitter_color, regression
from utils import generator


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


def test_dispersive_cosine_is_that_of_directions():
    z, temperature = rows("z", 6, 5), 0.3
    u = z / np.linalg.norm(z, axis=1, keepdims=True)
    expected = np.log(np.exp((u @ u.T - 1) / temperature).mean())
    assert dispersive_cosine(torch.from_numpy(7 * z), temperature) == pytest.approx(expected)


def test_dispersive_ends_at_0_where_all_are_the_same_and_at_minus_log_n_where_all_are_far():
    z = torch.ones(8, 3, requires_grad=True)
    loss = dispersive(z, 0.5)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.equal(z.grad, torch.zeros(8, 3))
    assert dispersive(1e3 * torch.eye(8), 0.5).item() == pytest.approx(-math.log(8))


def test_dispersive_is_within_its_bounds_however_large_the_features():
    near = torch.from_numpy(rows("near", 4, 128)).float()
    z = (1e6 * torch.from_numpy(rows("far", 4, 128)).float()).repeat(2, 1)
    z[4:] += near  # four pairs, each near to one another and far from all else
    z.requires_grad_()
    loss = dispersive(z, 0.5)
    squares = (z[:4] - z[4:]).detach().double().square().mean(1) / 0.5
    assert loss.item() == pytest.approx(math.log((8 + 2 * (-squares).exp().sum()) / 64))
    loss.backward()
    assert z.grad[:4].equal(-z.grad[4:])
    assert z.grad.isfinite().all()
    assert z.grad.any()


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


def test_of_the_jittered_images_one_in_five_becomes_grey():
    n = 20_000
    x = torch.tensor([0.5, 0.0, -0.5]).view(1, 3, 1, 1).expand(n, 3, 1, 1)
    found = jitter_color(x, 0.5, generator("cpu", 0), n, slice(None))
    grey = (found.amax(1) - found.amin(1)).flatten() < 1e-6
    assert grey.float().mean().item() == pytest.approx(0.16, abs=0.01)
    assert (found != x).flatten(1).any(1).float().mean().item() == pytest.approx(0.8, abs=0.01)


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
    real = t.distill.seen_by_teacher

    def features(x0, timestep, *more):
        seen.append((x0, timestep))
        return real(x0, timestep, *more)

    monkeypatch.setattr(t.distill, "seen_by_teacher", features)
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
        network["augment_dim"] = 9
        probability = {"augment_prob": 0.1 if told else 0.0}  # at 0 it learns no label
        settings = {"network": network, "diffusion": probability}
        t = trainer("regression", **settings, distill={"teacher_augment": 0.9})
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


@pytest.mark.parametrize("flip", [True, False])
def test_its_geometric_view_is_mirrored_only_where_the_students_may_be(monkeypatch, flip):
    t = trainer("regression", flip=flip, distill={"teacher_augment": 1e-9})  # flips alone
    mirrored = []

    def seen(x0, *args, **options):
        x, labels = augment(x0, *args, **options)
        mirrored.append(not torch.equal(x, x0))
        return x, labels

    monkeypatch.setattr("training.distill.augment", seen)
    t.distill.look(0, torch.ones(16))
    assert mirrored == [flip]


def test_its_timesteps_are_those_of_a_short_process():
    t = trainer("regression", diffusion={"n_T": 10, "betas": [1e-2, 0.9]})
    assert t.distill.timesteps == (1, 1)


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
