"""Guidance, classes, trajectories, interpolation and neighbours."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_model
from PIL import Image

import checkpoint
import sample
from config import parse_config
from datasets import read_dataset
from evaluation.samples.neighbours import nearest, save_neighbours
from evaluation.samples.trajectories import slerp
from model.models import build_denoiser
from model.samplers import guided
from sampling import sample as draw
from sampling import sampler_settings


@pytest.fixture
def call(tiny_yaml, tiny_checkpoint, tmp_path):
    def call(*more: str) -> Path:
        return drawn(tmp_path / "out", 3, "--config", tiny_yaml, "--steps", "4", *more)

    return call


def drawn(folder: Path, n: int, *options) -> Path:
    argv = [*map(str, options), "--device", "cpu", "--output_dir", str(folder)]
    if "--interpolate" not in options:
        argv = ["--n", str(n), *argv]
    assert sample.main(argv) == 0
    return folder


@pytest.fixture
def conditional(tiny_config):
    """A denoiser whose labels matter: their embedding is far from small."""
    torch.manual_seed(0)
    config = parse_config({**tiny_config.model_dump(), "cond_drop_prob": 0.1})
    return build_denoiser(config).eval().requires_grad_(False)


def test_guidance_is_linear_in_w_between_no_class_and_the_class():
    def D(x, sigma, y):
        return x + (0 if y is None else torch.where(y < 0, 0, 1 + y).view(-1, 1, 1, 1))

    x, sigma, y = torch.zeros(2, 1, 1, 1), torch.ones(2), torch.tensor([0, 4])
    for w in (0.0, 0.5, 1.0, 3.0):
        assert guided(D, y, w)(x, sigma).flatten().tolist() == [w * 1, w * 5]


def test_classes_go_round_by_index_and_guidance_0_ignores_them(conditional):
    def images(indices, **options):
        settings = sampler_settings(conditional, steps=3, **options)
        return draw(conditional, settings, indices, 0, (1, 8, 8)).int()

    threes = images([0, 1, 2, 3], classes=[3])
    mixed = images([0, 1, 2, 3], classes=[3, 5])
    assert (threes - mixed)[[0, 2]].abs().max() <= 1
    assert (threes - mixed)[[1, 3]].abs().max() > 1
    ignored = images([0, 1], classes=[3], guidance=0.0)
    assert (ignored - images([0, 1], classes=[5], guidance=0.0)).abs().max() == 0
    assert (ignored - threes[:2]).abs().max() > 1


@pytest.mark.parametrize(("options", "message"), [
    (("--guidance", "2"), "without labels"), (("--classes", "1"), "without labels"),
    (("--interpolate", "0", "1", "--eta", "0.5"), "deterministic"),
    (("--interpolate", "0", "1", "--interp_steps", "1"), "at least 2"),
    (("--interpolate", "0", "1", "--neighbours"), "exclude each other"),
    (("--interpolate", "0", "1", "--n", "3"), "exclude each other"),
    (("--interp_steps", "5"), "--interp_steps: of --interpolate"),
])  # fmt: skip
def test_what_cannot_be_is_refused(call, mistake, options, message):
    with mistake(message):
        call(*options)


@pytest.fixture
def call_conditional(tiny_config, conditional, tmp_path):
    config = parse_config({**tiny_config.model_dump(), "cond_drop_prob": 0.1})
    path = save_model(config, 0, conditional.net.state_dict())

    def call(*more: str) -> Path:
        return drawn(tmp_path / "out", 6, "--ckpt", path, "--steps", "2", *more)

    return call


@pytest.mark.parametrize(("options", "message"), [
    (("--classes", "3,5,3"), "name each class once"),
    (("--classes", "10"), "give 0 to 9"),
    (("--guidance", "nan"), "give 0 or more"),
    (("--guidance", "-1"), "give 0 or more"),
    (("--interpolate", "0", "1"), "name the one class"),
])  # fmt: skip
def test_labels_that_cannot_be_are_refused(call_conditional, mistake, options, message):
    with mistake(message):
        call_conditional(*options)


def test_all_classes_are_named_in_samples_json(call_conditional):
    facts = json.loads((call_conditional() / "samples.json").read_text())
    assert facts["classes"] == list(range(10))


def test_a_grid_has_a_row_for_each_class(call_conditional):
    out = call_conditional("--classes", "0,3,5", "--guidance", "2")
    facts = json.loads((out / "samples.json").read_text())
    assert (facts["guidance"], facts["classes"]) == (2.0, [0, 3, 5])
    grid = np.array(Image.open(out / "grid.png"))[..., 0]
    zoom, cell = 8, 10 * 8
    assert grid.shape == (3 * cell + 2 * zoom, 2 * cell + 2 * zoom)
    second_row_first = grid[cell + 2 * zoom : 2 * cell : zoom, 2 * zoom : cell : zoom]
    assert np.array_equal(second_row_first, np.array(Image.open(out / "pngs" / "1.png")))


def test_trajectories_end_in_the_image(call):
    out = call("--show_intermediate", "--save_x0")
    for prefix in ("", "x0_"):
        last = np.array(Image.open(out / "intermediate" / f"{prefix}1_4.png"))
        assert np.array_equal(last, np.array(Image.open(out / "pngs" / "1.png")))
    first = np.array(Image.open(out / "intermediate" / "1_0.png")).astype(float)
    assert first.std() > 60  # noise of variance 1, clipped to [-1, 1]
    assert (out / "trajectory.png").exists()
    assert (out / "trajectory_x0.png").exists()
    facts = json.loads((out / "samples.json").read_text())
    assert facts["ms_per_image"] > 0
    assert 0 < facts["pixel_variance"] < 1


def test_interpolation_begins_and_ends_in_the_two_images(call):
    out = call()
    call("--interpolate", "0", "2", "--interp_steps", "5")
    strip = np.array(Image.open(out / "interpolation_0_2.png"))[..., 0].astype(int)
    zoom, cell = 8, 10 * 8
    for place, index in ((0, 0), (4, 2)):
        left = place * cell + 2 * zoom
        shown = strip[2 * zoom : cell : zoom, left : left + 8 * zoom : zoom]
        image = np.array(Image.open(out / "pngs" / f"{index}.png")).astype(int)
        assert np.abs(shown - image).max() <= 1


def test_a_strip_of_one_class_joins_a_set_of_all(call_conditional):
    out = call_conditional()
    call_conditional("--interpolate", "0", "1", "--classes", "3")
    assert (out / "interpolation_0_1.png").exists()


def test_a_strip_of_other_images_does_not_join_a_set(call, mistake):
    out = call()
    with mistake("seed: 3, not 0"):
        call("--interpolate", "0", "1", "--seed", "3")
    assert not list(out.glob("interpolation*"))


def test_slerp_keeps_the_length_of_noise():
    a, b = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    between = slerp(a, b, torch.linspace(0, 1, 5))
    torch.testing.assert_close(between[0], a)
    torch.testing.assert_close(between[-1], b)
    assert between[2].std().item() == pytest.approx(1, abs=0.05)
    assert ((a + b) / 2).std().item() < 0.75


def test_nearest_finds_the_rows_whatever_the_parts():
    train = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    samples = train[[7, 31]] + 1e-3
    d, rows = nearest(samples[None], train.split(8), k=3)
    assert rows[:, 0].tolist() == [7, 31]
    expected, order = (samples[:, None] - train).norm(dim=2).sort()
    torch.testing.assert_close(d, expected[:, :3])
    assert torch.equal(rows, order[:, :3])
    d, rows = nearest(torch.stack([samples + 9, samples]), train.split(8), k=1)  # the nearer view
    torch.testing.assert_close(d, expected[:, :1])
    assert torch.equal(rows, order[:, :1])
    assert nearest(samples[None], [train[:2]], k=3)[1].shape == (2, 2)  # there are no more


def test_a_copy_of_a_training_image_is_its_own_neighbour(tiny_config, tiny_checkpoint, tmp_path):
    train = read_dataset(tiny_config, tmp_path, "train")
    model = checkpoint.load_denoiser(tiny_checkpoint, torch.device("cpu"))
    copies = torch.from_numpy(np.array(train.images[[5, 90]]))
    save_neighbours(tmp_path / "neighbours.png", copies, train, model, use_amp=False)
    found = json.loads((tmp_path / "neighbours.json").read_text())
    assert [rows[0] for rows in found["pixels"]["indices"]] == [5, 90]
    assert found["pixels"]["distances"][0][0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("flip", [False, True])
def test_a_mirrored_copy_is_found_where_training_flips(tiny_config, tmp_path, flip):
    config = parse_config({**tiny_config.model_dump(), "flip": flip})
    train = read_dataset(config, tmp_path, "train")
    model = checkpoint.untrained(config, torch.device("cpu"))
    mirrored = torch.from_numpy(np.array(train.images[[5, 90]])).flip(-1)
    save_neighbours(tmp_path / "neighbours.png", mirrored, train, model, use_amp=False)
    pixels = json.loads((tmp_path / "neighbours.json").read_text())["pixels"]
    assert ([rows[0] for rows in pixels["indices"]] == [5, 90]) == flip
    assert (pixels["distances"][0][0] < 1e-5) == flip
