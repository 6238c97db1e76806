"""benchmarks/guidance.py: the share of samples that are of the class asked for."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import guidance
from benchmarks import guidance_judge as judging
from benchmarks.guidance_judge import agreement, answers, variation
from checkpoint import versions
from datasets import read_dataset
from evaluation.samples.grids import save_png
from support.files import write_json


class Brightness(nn.Module):
    """Class 0 for dark images, 1 for bright ones."""

    def forward(self, x0):
        mean = x0.mean(dim=(1, 2, 3))
        return torch.stack([-mean, mean], dim=1)


def test_answers_do_not_depend_on_batches(monkeypatch):
    images = np.repeat(np.arange(0, 256, 5, dtype=np.uint8), 16).reshape(-1, 1, 4, 4)
    whole = answers(Brightness(), images, torch.device("cpu"), False)
    assert np.array_equal(whole, images[:, 0, 0, 0] > 127.5)
    monkeypatch.setattr(judging, "SCORE_BATCH", 7)
    assert np.array_equal(answers(Brightness(), images, torch.device("cpu"), False), whole)


def test_the_share_is_counted_by_class():
    found = agreement(np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0]))
    assert found["share"] == 3 / 5
    assert found["by_class"] == {0: 0.5, 1: pytest.approx(2 / 3)}
    low, high = found["interval"]
    assert 0 < low < 0.6 < high < 1


def test_variation_is_within_classes():
    images = np.array([0, 255, 10, 10], dtype=np.uint8).reshape(4, 1, 1, 1)
    assert variation(images, np.array([0, 0, 1, 1])) == pytest.approx(0.5)  # of 1 and 0
    crossed = ((10 / 255) ** 2 + (245 / 255) ** 2) / 2  # of 0 and 10, and of 255 and 10
    assert variation(images, np.array([0, 1, 0, 1])) == pytest.approx(crossed)


@pytest.fixture
def real_sets(tiny_config, tmp_path):
    """Sets of "samples" that are real images, of the class asked for, or of the next one."""
    test = read_dataset(tiny_config, "data", "test")

    def write(name: str, shift: int, **record) -> str:
        folder = tmp_path / name
        (folder / "pngs").mkdir(parents=True)
        for i in range(40):
            candidates = np.flatnonzero(test.labels == (i % 10 + shift) % 10)
            image = torch.from_numpy(np.array(test.images[candidates[i // 10]]))
            save_png(folder / "pngs" / f"{i}.png", image)
        settings = {
            "guidance": 3.0 - shift, "classes": list(range(10)), "n": 40, "dataset": "digits",
            "weights": "abc", "sampler": "ddim", "steps": 100, "eta": 0.0, "spacing": None,
            "clip": True, "seed": 0,
        }  # fmt: skip
        write_json(folder / "samples.json", settings | record | {"versions": versions()})
        return str(folder)

    return write


def test_real_images_are_of_their_class_and_others_are_not(tiny_yaml, tmp_path, real_sets, capsys):
    argv = ["--config", str(tiny_yaml), "--epochs", "6", "--device", "cpu"]
    argv += [real_sets("right", 0), real_sets("wrong", 1), "--output_dir", str(tmp_path / "out")]
    assert guidance.main(argv) == 0
    record = json.loads((tmp_path / "out" / "guidance.json").read_text())
    right, wrong = record["sets"]
    assert record["real"]["share"] > 0.8
    assert right["share"] > 0.8
    assert wrong["share"] < 0.2
    assert 0.5 < right["variation"] / record["real"]["variation"] < 1.5
    text = capsys.readouterr().out
    assert f"{100 * right['share']:.2f}" in text
    assert f"{100 * right['share']:.2f}" in (tmp_path / "out" / "guidance.md").read_text()
    with Image.open(tmp_path / "out" / "guidance.png") as picture:
        assert picture.size[0] > 400

    judge = next((tmp_path / "out").glob("guidance_judge_*.pth"))
    written = judge.stat().st_mtime_ns
    assert guidance.main(argv) == 0  # the judge is only read
    assert judge.stat().st_mtime_ns == written
    assert json.loads((tmp_path / "out" / "guidance.json").read_text()) == record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance": None}, "without labels"),
        ({"dataset": "mnist"}, "images of mnist"),
        ({"n": 41}, "40.png: no such file"),
        ({"classes": [3, 4]}, "good in classes: draw both alike"),
        ({"n": 19}, "19 images of 10 classes"),
        ({"weights": "other", "steps": 20}, "in weights, steps"),
    ],
)
def test_a_set_that_cannot_be_judged_is_refused(tiny_yaml, real_sets, mistake, change, message):
    good, bad = real_sets("good", 0), real_sets("bad", 0, **change)
    with mistake(message):
        guidance.main(["--config", str(tiny_yaml), good, bad])


def test_a_folder_without_samples_is_named(tiny_yaml, tmp_path, mistake):
    with mistake(str(tmp_path / "samples.json")):
        guidance.main(["--config", str(tiny_yaml), str(tmp_path)])
