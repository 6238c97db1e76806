"""What a run shows of itself: its log as a table, its curves, its samples."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoint import TrainedModel
from config import parse_config
from datasets import Dataset
from evaluation.samples.trajectories import Trajectory
from model.models import build_denoiser
from sampling import sample, sampler_settings
from training import pictures
from training.run_log import RunLog


@pytest.fixture
def model(tiny_config, tmp_path):
    config = parse_config({**tiny_config.model_dump(), "classes": 3, "cond_drop_prob": 0.1})
    torch.manual_seed(0)
    return TrainedModel(build_denoiser(config).eval(), config, 4, tmp_path / "none.pth")


def test_the_table_has_a_column_per_value_and_the_lines_of_the_whole_run(tmp_path):
    log = RunLog(tmp_path, 0)
    log.write("train", 5, {"loss": 0.5, "loss_by_t": [1.0, None]})
    log.write("test", 5, {"loss": 0.4})
    log.close()
    log = RunLog(tmp_path, 5)
    log.write("train", 9, {"loss": None, "loss_by_t": [2.0, 3.0], "param_norm": 7.0})
    log.write_csv()
    log.close()
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    common = {"loss_by_t_0": "1.0", "loss_by_t_1": "", "param_norm": ""}
    assert rows[0] == {"kind": "train", "step": "5", "loss": "0.5", **common}
    assert rows[1] == {"kind": "test", "step": "5", "loss": "0.4", **common, "loss_by_t_0": ""}
    assert rows[2] == {
        "kind": "train", "step": "9", "loss": "", "loss_by_t_0": "2.0", "loss_by_t_1": "3.0",
        "param_norm": "7.0",
    }  # fmt: skip
    assert [json.loads(line)["step"] for line in log.path.open()] == [5, 5, 9]


@pytest.mark.parametrize(("process", "first", "last"), [
    ({"model_type": "DDPM"}, "t 1–100, ", "t 901–1000, "),
    ({"model_type": "EDM"}, "t 1–", "–18, "),
])  # fmt: skip
def test_buckets_are_named_by_the_noise_levels_that_fall_into_them(process, first, last):
    shape = {"image_shape": [1, 8, 8], "n_channels": 32, "ch_mults": [1], "is_attn": [False]}
    denoiser = build_denoiser(parse_config({**process, "network": shape}))
    names = pictures.bucket_names(denoiser)
    assert names[0].startswith(first)
    assert last in names[-1]
    assert len(set(names)) == 10


def test_smoothing_keeps_a_level_and_takes_out_noise():
    assert pictures.smoothed([2.0]) == [2.0]
    assert pictures.smoothed([2.0] * 90) == [2.0] * 90
    noise = np.random.default_rng(0).standard_normal(400)
    assert np.std(pictures.smoothed(list(noise))) < 0.3


def test_curves_show_every_loss_there_is(model, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(pictures, "loss_curve", lambda *args: drawn.update(curve=args))
    monkeypatch.setattr(pictures, "loss_by_bucket", lambda *args: drawn.update(buckets=args))
    by_t = [0.5, None, *[1.0] * 8]
    lines = [
        {"kind": "train", "step": 5, "loss": 0.5, "loss_by_t": by_t},
        {"kind": "test", "step": 5, "loss": 0.4},
        {"kind": "train", "step": 9, "loss": None, "loss_by_t": [None] * 10},
        {"kind": "train", "step": 10, "loss": 0.3, "loss_by_t": by_t},
    ]
    pictures.draw_losses(tmp_path, model, lines)
    _, steps, raw, _, test, title = drawn["curve"]
    assert (steps, raw, test) == ([5, 10], [0.5, 0.3], {5: 0.4})
    assert title == "digits: loss up to epoch 4"
    _, steps, parts, _ = drawn["buckets"]
    assert steps == [5, 10]
    np.testing.assert_array_equal(list(parts.values())[:2], [[0.5, 0.5], [np.nan, np.nan]])


def test_pictures_of_a_class_conditional_run(model, tmp_path):
    """Seven images of three classes in turn: a row for each class, below them real ones."""
    settings, trajectory = sampler_settings(model.denoiser, steps=4), Trajectory(2)
    samples = sample(model.denoiser, settings, list(range(7)), 0, (1, 8, 8), watch=trajectory.watch)
    real = np.full((5, 1, 8, 8), 77, np.uint8)
    test = Dataset("digits", "test", real, np.zeros(5, np.int64), ["0", "1", "2"])
    lines = [
        {"kind": "train", "step": 5, "loss": 0.5, "loss_by_t": [0.5] * 10},
        {"kind": "test", "step": 5, "loss": 0.4},
    ]
    grid = pictures.draw_pictures(tmp_path, model, lines, samples, settings, trajectory, test)
    cells = torch.from_numpy(grid[0, 16::8, 16::8]).unfold(0, 8, 10).unfold(1, 8, 10)
    assert cells.shape == (4, 2, 8, 8)
    for row, column in ((0, 0), (0, 1), (1, 0), (2, 1)):
        assert torch.equal(cells[row, column], samples[row + 3 * column, 0])
    assert (cells[3] == 77).all()
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [
        "denoise_trajectory.png", "loss_by_timestep_bucket.png", "loss_curve.png",
        "samples_ep4.png",
    ]  # fmt: skip
    for name in files:
        assert min(Image.open(tmp_path / name).size) > 150
    table = trajectory.table(samples)
    assert table.shape == (2, 5, 1, 8, 8)
    assert torch.equal(table[:, -1], samples[:2])
    assert trajectory.titles(model.denoiser)[0].startswith("t = 751\n")
