"""What a run shows of itself: its log as a table, its curves, its samples."""

import csv
import json
import shutil
import threading

import matplotlib
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
from support.errors import UserError
from training import pictures
from training.run_log import RunLog


@pytest.fixture
def model(tiny_config, tmp_path):
    config = parse_config({**tiny_config.model_dump(), "classes": 3, "cond_drop_prob": 0.1})
    torch.manual_seed(0)
    return TrainedModel(build_denoiser(config).eval(), config, 4, tmp_path / "none.pth")


def test_the_table_has_a_column_per_value_and_the_lines_of_the_whole_run(tmp_path):
    log = RunLog(tmp_path, -1, 0)
    log.write("train", 5, {"epoch": 0, "loss": 0.5, "loss_by_t": [1.0, None]})
    log.write("test", 5, {"epoch": 0, "loss": 0.4})
    log.close()
    log = RunLog(tmp_path, 0, 5)
    values = {"loss": None, "loss_by_t": [2.0, 3.0], "param_norm": 7.0}
    log.write("train", 9, {"epoch": 1, **values})
    log.write_csv()
    log.close()
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    common = {"loss_by_t_0": "1.0", "loss_by_t_1": "", "param_norm": ""}
    assert rows[0] == {"kind": "train", "step": "5", "epoch": "0", "loss": "0.5", **common}
    test = {"kind": "test", "step": "5", "epoch": "0", "loss": "0.4"}
    assert rows[1] == {**test, **common, "loss_by_t_0": ""}
    assert rows[2] == {
        "kind": "train", "step": "9", "epoch": "1", "loss": "", "loss_by_t_0": "2.0",
        "loss_by_t_1": "3.0", "param_norm": "7.0",
    }  # fmt: skip
    assert [json.loads(line)["step"] for line in log.path.open()] == [5, 5, 9]


GOOD = '{"kind": "train", "step": 5, "epoch": 0, "loss": 0.5}'
BAD = ["", "half a li", "[3]", "null", '{"kind": "train"}', '{"kind": 3, "step": 5, "epoch": 0}',
       '{"kind": "train", "step": "5", "epoch": 0}', '{"kind": "train", "step": 5}', "\0\0\0",
       "[" * 100_000, "\ufffd"]  # fmt: skip


def test_damaged_lines_of_the_log_are_dropped_with_a_note(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("utils.log.propagate", True)
    path = tmp_path / "metrics.jsonl"
    after_a_power_cut = "\0" * 50 + GOOD.replace("5,", "6,", 1)  # the data is there, behind zeros
    lines = [GOOD, *BAD, after_a_power_cut, GOOD.replace("5,", "7,", 1)]
    path.write_bytes(b"\xff\xfe\n" + "\n".join(lines).encode())  # the last one is cut
    log = RunLog(tmp_path, 0, 6)
    assert f"{len(BAD) + 1} damaged lines left out" in caplog.text
    log.write("train", 9, {"epoch": 1, "loss": 0.25})
    log.close()
    assert [json.loads(line)["step"] for line in path.open()] == [5, 6, 9]
    caplog.clear()
    assert [line["step"] for line in RunLog(tmp_path, 1, 9).lines()] == [5, 6, 9]
    assert not caplog.text


@pytest.mark.parametrize(("goes_on_from", "kept"), [
    ((-1, 0), 0),
    ((0, 700), 2),  # a model_0.pth
    ((1, 44), 3), ((1, 50), 3), ((1, 60), 4),  # latest.pth in the middle of an epoch
    ((1, 30), 2),
])  # fmt: skip
def test_lines_of_lost_work_are_dropped_also_where_epochs_had_more_steps(
    tmp_path, goes_on_from, kept
):
    """Epoch 0 had 700 steps, those after it 22, as `load_epoch` with another batch_size makes."""
    steps = [(0, 650), (0, 700), (1, 44), (1, 55), (2, 66)]
    log = RunLog(tmp_path, -1, 0)
    for epoch, step in steps:
        log.write("train", step, {"epoch": epoch, "loss": 0.5})
    log.close()
    lines = RunLog(tmp_path, *goes_on_from).lines()
    assert [(line["epoch"], line["step"]) for line in lines] == steps[:kept]


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_a_log_that_cannot_be_written_is_named(tmp_path, name):
    path = tmp_path / name
    path.mkdir() if name == "metrics.jsonl" else path.write_text("in the way")
    with pytest.raises(UserError, match=name):
        RunLog(tmp_path, -1, 0)


def test_a_log_that_can_no_longer_be_written_shows_no_traceback(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(threading, "excepthook", shown.append)
    log = RunLog(tmp_path / "run", -1, 0)
    log.write("train", 1, {"loss": 0.5})
    shutil.rmtree(tmp_path / "run")
    for what in (lambda: log.write("train", 2, {"loss": 0.4}), log.close):
        with pytest.raises(UserError, match="tensorboard: could not be written"):
            what()
    assert not shown


def test_a_log_of_another_program_draws_no_curve_and_stops_nothing(model, tmp_path):
    lines = [{"kind": "train", "step": 1}, {"kind": "test", "step": 1, "loss": "low"},
             {"kind": "train", "step": 2, "loss": 0.5, "loss_by_t": [0.5] * 10}]  # fmt: skip
    for left in (lines, []):
        pictures.draw_losses(tmp_path / str(len(left)), model, left)
        assert len(list((tmp_path / str(len(left))).glob("*.png"))) == 2


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


def line(step: int, loss: float | None, first_part: float | None = 0.5) -> dict:
    """Of the training log."""
    return {
        "kind": "train", "step": step, "loss": loss, "loss_by_t": [first_part, None, *[1.0] * 8],
    }  # fmt: skip


@pytest.fixture
def curves(model, tmp_path):
    """Draws lines of a log; returns the pixels of loss_curve and loss_by_timestep_bucket."""

    def draw(*lines) -> tuple[np.ndarray, np.ndarray]:
        pictures.draw_losses(tmp_path, model, list(lines))
        names = ("loss_curve.png", "loss_by_timestep_bucket.png")
        return tuple(np.array(Image.open(tmp_path / name).convert("RGB")) for name in names)

    return draw


def pixels_of(colour: tuple[float, ...], image: np.ndarray) -> int:
    distance = np.abs(image - 255 * np.array(colour[:3])).max(axis=-1)
    return int((distance < 12).sum())


def test_curves_show_every_loss_and_leave_out_what_has_none(curves):
    test = {"kind": "test", "step": 5, "loss": 0.4}
    whole = line(5, 0.5), test, line(10, 0.3)
    curve, parts = curves(*whole)
    with_gap = curves(*whole[:2], line(9, None, None), whole[2])
    assert np.array_equal(with_gap[0], curve)
    assert np.array_equal(with_gap[1], parts)
    other = curves(line(5, 0.5), test, line(10, 0.2, 0.7))
    assert not np.array_equal(other[0], curve)
    assert not np.array_equal(other[1], parts)


def test_a_test_loss_is_a_point_of_its_own(curves):
    orange = matplotlib.colormaps["tab10"].colors[1]
    train = line(5, 0.5), line(10, 0.3), line(15, 0.3)
    points = [{"kind": "test", "step": step, "loss": 0.4} for step in (5, 10, 15)]
    in_legend, one, three = (pixels_of(orange, curves(*train, *points[:n])[0]) for n in (0, 1, 3))
    assert in_legend > 20
    assert one - in_legend == pytest.approx(in_legend, rel=0.3)
    assert three - in_legend == pytest.approx(3 * in_legend, rel=0.3)


def test_a_noise_level_without_images_has_no_curve(curves):
    _, parts = curves(line(5, 0.5), line(10, 0.3))
    first, second = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, 10))[:2]
    assert pixels_of(first, parts) > 5 * pixels_of(second, parts)  # which is in the legend alone


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
