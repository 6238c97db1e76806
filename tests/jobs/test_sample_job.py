"""sample.py: one set of images per folder, drawn by index, continued and never mixed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample
from benchmarks.fault_compare import differences


@pytest.fixture
def call(tiny_yaml, tiny_checkpoint):
    def call(*more: str) -> int:
        return sample.main(
            ["--config", str(tiny_yaml), "--device", "cpu", "--steps", "4", "--n", "5", *more]
        )

    return call


@pytest.fixture
def folder(tiny_config) -> Path:
    return Path(tiny_config.save_dir) / "EMAgenerated_ep1_ddim_steps4_eta0.0"


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {p.name: np.array(Image.open(p)).astype(int) for p in (folder / "pngs").iterdir()}


def test_writes_images_a_grid_and_what_made_them(call, folder):
    assert call() == 0
    images = pixels(folder)
    assert sorted(images) == [f"{i}.png" for i in range(5)]
    assert all(image.shape == (8, 8) for image in images.values())
    assert np.array(Image.open(folder / "grid.png")).shape[-1] == 3
    facts = json.loads((folder / "samples.json").read_text())
    assert (facts["n"], facts["sampler"], facts["steps"], facts["eta"]) == (5, "ddim", 4, 0.0)
    assert facts["seconds"] > 0
    assert facts["images_per_s"] > 0
    assert facts["peak_memory_mb"] > 0


def test_batch_size_changes_no_image(call, folder, tmp_path):
    call()
    call("--batch_size", "2", "--output_dir", str(tmp_path / "other"))
    other = pixels(tmp_path / "other")
    for name, image in pixels(folder).items():
        assert np.abs(image - other[name]).max() <= 1


def test_an_interrupted_set_is_continued(call, folder):
    call()
    whole = pixels(folder)
    stamp = (folder / "pngs" / "0.png").stat().st_mtime_ns
    for i in (1, 3):
        (folder / "pngs" / f"{i}.png").unlink()
    call()
    again = pixels(folder)
    assert all(np.abs(again[name] - image).max() <= 1 for name, image in whole.items())
    assert (folder / "pngs" / "0.png").stat().st_mtime_ns == stamp
    facts = json.loads((folder / "samples.json").read_text())
    assert facts["drawn_in_last_call"] == 2
    (folder / "grid.png").unlink()
    call()  # draws none: the times of those that did stay
    assert json.loads((folder / "samples.json").read_text()) == facts
    assert (folder / "grid.png").exists()


def test_a_set_whose_call_ended_before_the_grid_is_described_as_any_other(
    call, folder, tmp_path, monkeypatch
):
    call("--output_dir", str(tmp_path / "whole"))
    with monkeypatch.context() as killed:
        killed.setattr(sample, "finish", killed_here)
        with pytest.raises(Killed):
            call()
    assert len(pixels(folder)) == 5
    call()  # draws none
    assert differences(tmp_path / "whole", folder) == []
    assert json.loads((folder / "samples.json").read_text())["versions"]["torch"]


def test_a_call_for_fewer_images_changes_nothing_of_the_set(call, folder):
    call()
    before = json.loads((folder / "samples.json").read_text()), (folder / "grid.png").read_bytes()
    call("--n", "2")
    after = json.loads((folder / "samples.json").read_text()), (folder / "grid.png").read_bytes()
    assert after == before


def test_a_set_has_the_images_that_are_there_not_those_once_asked_for(call, folder, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr(sample, "finish", killed_here)
        with pytest.raises(Killed):
            call("--n", "9")
    assert json.loads((folder / "samples.json").read_text())["n"] == 9
    for i in (7, 8):
        (folder / "pngs" / f"{i}.png").unlink()
    call()
    assert json.loads((folder / "samples.json").read_text())["n"] == 7


class Killed(BaseException):
    """In place of a SIGKILL."""


def killed_here(*arguments: object) -> None:
    raise Killed


def test_damaged_images_of_a_set_are_drawn_anew(call, folder, capsys):
    call()
    whole, pngs = pixels(folder), folder / "pngs"
    (pngs / "1.png").write_bytes((pngs / "1.png").read_bytes()[:60])  # after a power cut
    (pngs / "2.png").write_bytes(b"")
    (pngs / "3.png").write_bytes(bytes(100))
    (pngs / f".5.png.{2**22 + 1}.tmp").write_bytes(b"half")  # no process has so high a number
    capsys.readouterr()
    call()
    assert "3 images are damaged and are drawn anew" in capsys.readouterr().err
    again = pixels(folder)
    assert sorted(again) == sorted(whole)
    assert all(np.abs(again[name] - image).max() <= 1 for name, image in whole.items())


@pytest.mark.parametrize("text", ["[]", "{}", '{"n": "five"}', "\0\0"])
def test_a_damaged_record_of_a_set_is_named_with_the_way_out(call, folder, mistake, text):
    call()
    (folder / "samples.json").write_text(text)
    with mistake("choose another --output_dir"):
        call()


def test_more_images_extend_a_set(call, folder):
    call()
    call("--num_samples", "7")
    assert len(pixels(folder)) == 7
    facts = json.loads((folder / "samples.json").read_text())
    assert (facts["n"], facts["drawn_in_last_call"]) == (7, 2)


@pytest.mark.parametrize(("change", "names"), [
    (("--seed", "3"), "seed: 3, not 0"),
    (("--no_clip", "--output_dir", "{folder}"), "clip: False, not True"),
    (("--mode", "DDPM", "--output_dir", "{folder}"), "sampler: ddpm, not ddim"),
])  # fmt: skip
def test_two_ways_do_not_mix(call, folder, capsys, change, names):
    call()
    before = pixels(folder)
    with pytest.raises(SystemExit) as stop:
        call(*(part.format(folder=folder) for part in change))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert names in error
    assert "--output_dir" in error
    after = pixels(folder)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_images_of_unknown_origin_are_left_alone(call, folder, mistake):
    (folder / "pngs").mkdir(parents=True)
    (folder / "pngs" / "0.png").write_bytes(b"mine")
    with mistake("no samples.json"):
        call()
    assert (folder / "pngs" / "0.png").read_bytes() == b"mine"


def test_a_checkpoint_alone_is_enough(tiny_checkpoint, tmp_path, call, folder):
    call()
    moved = tmp_path / "elsewhere.pth"
    shutil.copy(tiny_checkpoint, moved)
    code = sample.main(["--ckpt", str(moved), "--device", "cpu", "--steps", "4", "--n", "2",
                        "--output_dir", str(tmp_path / "alone")])  # fmt: skip
    assert code == 0
    mine, theirs = pixels(tmp_path / "alone"), pixels(folder)
    assert np.abs(mine["1.png"] - theirs["1.png"]).max() <= 1


@pytest.mark.parametrize(("wrong", "message"), [
    (("--n", "0"), "at least 1"), (("--steps", "1001"), "--steps 1001, spacing"),
    (("--epoch", "5"), "model_5.pth: no such checkpoint"),
])  # fmt: skip
def test_mistakes(call, wrong, message, mistake):
    with mistake(message):
        call(*wrong)
