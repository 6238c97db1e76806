"""--compile changes speed alone: losses, names of weights, what a run can go on from."""

import pytest
import torch
from distill_jobs import CPU, config, dataset

import checkpoint
import linear
import sample
import train
from evaluation.samples.grids import load_png
from support.errors import UserError
from support.files import read_json
from training.trainer import Trainer
from utils import compiled


def trainer(compiles: bool) -> Trainer:
    changes = {"accumulate": 1, "distill": {"block": "out_2"}}
    return Trainer(config("infonce", **changes), dataset(40), CPU, False, compiles)


@pytest.mark.slow
def test_a_compiled_training_is_the_plain_one_within_rounding():
    plain, fast = trainer(compiles=False), trainer(compiles=True)
    for _ in range(3):
        plain.train_step()
        fast.train_step()
    a, b = plain.full_state(), fast.full_state()
    for part in ("net", "ema"):
        assert list(a[part]) == list(b[part])  # no _orig_mod. in any name
        for name in a[part]:
            torch.testing.assert_close(a[part][name], b[part][name], rtol=1e-3, atol=1e-5)
    losses = [float(state["resume"]["window"]["loss"]) for state in (a, b)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
def test_jobs_with_and_without(tiny_yaml, tmp_path):
    job = ["--config", str(tiny_yaml), "--device", "cpu"]
    train.main([*job, "--compile", "--set", "n_epoch=1"])
    train.main([*job, "--set", "n_epoch=2"])  # a resumed run may switch
    state = checkpoint.load(tmp_path / "run" / "ckpts" / "latest.pth")
    assert state["step"] == 44
    grids, images = [], []
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        folder = ["--output_dir", str(tmp_path / name)]
        grid = ["--grid", "--protocol", "cached", "--timesteps", "21", "--n_train", "200"]
        linear.main([*job, *more, *grid, *folder])
        sample.main([*job, *more, "--n", "4", "--steps", "5", *folder])
        grids.append(read_json(next((tmp_path / name).glob("linear_grid*.json"))))
        pngs = sorted((tmp_path / name / "pngs").iterdir())
        images.append(torch.stack([load_png(path) for path in pngs]).float())
    assert grids[0]["fingerprint"] == grids[1]["fingerprint"]
    assert (images[0] - images[1]).abs().max() <= 1  # of 255


def test_without_a_compiler_the_answer_says_so(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UserError, match=r"--compile.*No working C\+\+ compiler.*leave"):
        compiled(torch.neg, CPU)
