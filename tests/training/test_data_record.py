"""A checkpoint remembers what it was trained on, and another training set is noticed."""

import importlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

import checkpoint
import export
from datasets import Dataset
from evaluation import data_record as records
from evaluation.data_record import data_record, refuse_other_data
from support.errors import UserError


def some_data(n: int) -> Dataset:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8)
    return Dataset("digits", "train", images, np.arange(n) // 10, ["a", "b", "c", "d"])


def changed_pixel(data: Dataset) -> Dataset:
    images = data.images.copy()
    images[7, 0, 0, 0] ^= 1
    return replace(data, images=images)


@pytest.mark.parametrize(("change", "says"), [
    (lambda d: d.take(slice(39)), "images: 39, not 40"),
    (lambda d: replace(d, class_names=["b", "a", "c", "d"]), "classes: 0 is b, not a, 1 is a"),
    (lambda d: replace(d, class_names=["a", "b", "c"]), "classes: 3, not 4"),
    (lambda d: replace(d, labels=d.labels[::-1]), "other numbers of them, or in another order"),
    (lambda d: replace(d, images=d.images[:, :, :4]), r"their shape: \[1, 4, 8\], not \[1, 8, 8\]"),
    (changed_pixel, "pixels: other ones, in as many images"),
])  # fmt: skip
def test_what_has_changed_is_named(tmp_path, change, says, messages):
    data = some_data(40)
    before, now = data_record(data), data_record(change(data))
    with pytest.raises(UserError, match=rf"(?s){says}.*--allow_changed_data.*--restart"):
        refuse_other_data(tmp_path, before, now, allowed=False)
    refuse_other_data(tmp_path, before, now, allowed=True)
    assert "the data of" in messages[0]
    refuse_other_data(tmp_path, before, data_record(data), allowed=False)
    refuse_other_data(tmp_path, None, now, allowed=False)  # of before there were records


def test_of_many_images_some_are_read(monkeypatch):
    monkeypatch.setattr(records, "SAMPLE", 3)
    data, read = some_data(40), []

    class Watched(np.ndarray):
        def __getitem__(self, index):
            read.append(index)
            return np.asarray(self)[index]

    data_record(replace(data, images=data.images.view(Watched)))
    assert read[0].tolist() == [0, 19, 39]


@pytest.fixture
def run(tree, tiny_yaml):
    """Calls a job on the class folders of `tree`."""
    values = json.loads(tiny_yaml.read_text())
    network = {"image_shape": [3, 8, 8], "n_channels": 32, "ch_mults": [1], "is_attn": [False]}
    values |= {"dataset": "folder", "classes": 2, "network": network, "batch_size": 3}
    values |= {"n_step": 2, "diffusion": {"n_T": 4, "betas": [0.1, 0.9]}}
    tiny_yaml.write_text(json.dumps(values))

    def call(job: str, *more: str) -> None:
        argv = ["--config", str(tiny_yaml), "--device", "cpu", "--data_dir", str(tree), *more]
        importlib.import_module(job).main(argv)

    return call


def test_a_folder_that_grew_under_a_run(run, tree, tmp_path, mistake, capsys):
    run("train")
    for name in "345":
        shutil.copy(tree / "folder/train/cat/0.png", tree / f"folder/train/cat/{name}.png")
    latest = tmp_path / "run" / "ckpts" / "latest.pth"
    before = latest.read_bytes()
    with mistake("images: 9, not 6"):
        run("train", "--set", "n_step=4")
    assert latest.read_bytes() == before
    run("train", "--set", "n_step=4", "--allow_changed_data")
    state = checkpoint.load(latest)
    assert (state["step"], state["data"]["images"]) == (4, 9)
    assert "has changed: images: 9, not 6" in capsys.readouterr().err


def test_a_checkpoint_without_a_record_goes_on(run, tmp_path):
    run("train")
    latest = tmp_path / "run" / "ckpts" / "latest.pth"
    state = checkpoint.load_latest(latest)
    del state["data"]
    checkpoint.save(latest, state)
    run("train", "--set", "n_step=3")
    assert checkpoint.load(latest)["step"] == 3


@pytest.mark.parametrize("job", ["linear", "contrastive", "visualize_features", "finetune"])
def test_other_classes_are_noted_where_a_model_is_judged(job, run, tree, capsys, monkeypatch):
    run("train")
    for split in ("train", "test"):
        (tree / "folder" / split / "cat").rename(tree / "folder" / split / "eel")
    monkeypatch.setattr("visualize_features.MIN_IMAGES", 2)
    run(job, *{
        "linear": ["--protocol", "cached", "--timestep", "1", "--blockname", "out_1"],
        "contrastive": ["--timestep", "1"],
        "visualize_features": ["--timestep", "1", "--blockname", "out_1", "--n", "4"],
        "finetune": ["--epochs", "1", "--warm_epochs", "0", "--batch_size", "3", "--timestep", "1"],
    }[job])  # fmt: skip
    assert "classes: 0 is dog, not cat, 1 is eel, not dog" in capsys.readouterr().err


def test_released_weights_remember_it_too(run, tmp_path):
    run("train")
    export.main(["--ckpt", str(tmp_path / "run/ckpts/model_0.pth"), "--output_dir", str(tmp_path)])
    about = checkpoint.load_denoiser(tmp_path).about
    assert about["data"]["classes"] == ["cat", "dog"]
