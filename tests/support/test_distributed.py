"""Two processes do what one does; a rank that dies takes the others with it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import distributed_jobs
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image

import checkpoint
import reproduce
from config import parse_config
from support import distributed
from support.errors import UserError
from training.trainer import Trainer
from utils import pick_device, progress

SEVERAL = {
    **TINY,
    "network": {**TINY["network"], "dropout": 0.0},
    "batch_size": 8,
    "accumulate": 2,  # ten steps an epoch
    "flip": True,
    "n_sample": 5,  # an odd number: the shares differ
    "sample_every": 2,
    "linear": {"n_epoch": 1, "batch_size": 33},
}


def as_rank(monkeypatch, rank: int, world_size: int) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)


@pytest.mark.parametrize(("n", "world_size"), [(10, 1), (10, 4), (3, 4), (50_000, 8)])
def test_shares_are_consecutive_and_nearly_equal(monkeypatch, n, world_size):
    shares = []
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        shares.append(distributed.share(n))
    assert [i for share in shares for i in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_batch_that_does_not_divide_is_refused(monkeypatch):
    as_rank(monkeypatch, 1, 4)
    assert distributed.share_of_batch(8) == slice(2, 4)
    for size in (2, 6):
        with pytest.raises(UserError, match=f"batch_size {size} is not divisible by the 4 proc"):
            distributed.share_of_batch(size)


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    as_rank(monkeypatch, 1, 2)
    monkeypatch.setattr(distributed, "local_rank", lambda: 77)
    with pytest.raises(UserError, match="cuda:77: not usable here"):
        pick_device("cuda")
    with pytest.raises(UserError, match="--device cuda:0: several processes take cuda"):
        pick_device("cuda:0")
    assert pick_device("cpu").type == "cpu"


def test_the_chain_is_not_started_by_torchrun(monkeypatch, mistake):
    as_rank(monkeypatch, 0, 2)
    with mistake("start it with python, not torchrun"):
        reproduce.main([])


def test_what_the_ranks_draw_is_cut_from_what_one_process_draws(monkeypatch, tmp_path):
    config = parse_config({
        **TINY, "save_dir": str(tmp_path), "model_type": "EDM", "batch_size": 8, "flip": True,
        "cond_drop_prob": 0.5, "diffusion": {"augment_prob": 0.5},
        "network": {**TINY["network"], "augment_dim": 9},
    })  # fmt: skip
    data = distributed_jobs.some_digits(config, "data", "train", False)

    def drawn(rank: int, world_size: int) -> tuple[dict, int]:
        as_rank(monkeypatch, rank, world_size)
        trainer = Trainer(config, data, torch.device("cpu"), use_amp=False)
        trainer.step = 3
        tensors = trainer._draw_images()
        tensors["u"] = tensors["u"][trainer.part]
        return tensors, torch.initial_seed()

    whole, seed = drawn(0, 1)
    (first, first_seed), (second, second_seed) = drawn(0, 2), drawn(1, 2)
    assert whole.keys() == {"x0", "u", "noise", "augment", "y"}
    for name, value in whole.items():
        assert torch.equal(torch.cat([first[name], second[name]]), value), name
    assert seed == first_seed != second_seed  # of dropout


def test_only_rank_0_shows_bars(monkeypatch, capsys):
    list(progress(range(3), "shown", shared=True))
    as_rank(monkeypatch, 1, 2)
    list(progress(range(3), "hidden"))
    as_rank(monkeypatch, 0, 2)
    list(progress(range(3), "of both", shared=True))
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "hidden" not in shown
    assert "6/6" in shown


def torchrun(*arguments: object) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, "--nproc_per_node=2", "tests/distributed_jobs.py", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder with the runs of one and of two processes, and what torchrun printed."""
    folder = tmp_path_factory.mktemp("runs")
    yaml = str(folder / "several.yaml")
    Path(yaml).write_text(json.dumps(SEVERAL))
    with pytest.MonkeyPatch.context() as patch:
        distributed_jobs.make_small(patch.setattr)

        def alone(name: str, *more: str) -> None:
            distributed_jobs.training(yaml, "--set", f"save_dir={folder}/{name}", *more)

        alone("one", "--set", "n_epoch=1")
        shutil.copytree(folder / "one", folder / "one_then_two")
        distributed_jobs.evaluation(f"{folder}/one/ckpts/model_0.pth", folder / "one_evaluated")
        alone("one")
        assert not torch.distributed.is_initialized()  # plain python starts no process group
        done = torchrun(yaml, folder)
        assert "stopped with" in done.stdout, done.stderr
        alone("stopped")
    return folder, done


def lines_of(run) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("images_per_s", "peak_memory_mb")}
        for line in lines
    ]


@pytest.mark.parametrize("name", ["one_then_two", "stopped"])
def test_losses_and_weights_are_those_of_one_process(runs, name):
    """One run goes on with two processes after an epoch, the other with one after four steps."""
    folder, _ = runs
    lines = lines_of(folder / name)
    assert [line["kind"] for line in lines].count("train") == 2
    assert lines[-1]["kind"] == "test"
    whole = {(line["kind"], line["epoch"]): line for line in lines_of(folder / "one")}
    for line in lines:
        expected = whole[line.pop("kind"), line["epoch"]]
        for key, value in line.items():
            assert value == pytest.approx(expected[key], rel=1e-4), key
    weights, whole = (
        checkpoint.load(folder / run / "ckpts" / "model_1.pth")["ema"] for run in (name, "one")
    )
    for key in whole:
        torch.testing.assert_close(weights[key], whole[key], rtol=0, atol=2e-3)


def test_all_ranks_stop_at_one_step(runs):
    _, done = runs
    assert "stopped at step 4 of 20" in done.stderr
    assert "stopped with 143 on rank 1" in done.stdout
    assert "stopped with 143 on rank 0" in done.stdout


def test_images_are_those_of_one_process(runs):
    folder, _ = runs
    found = {}
    for run in ("one_evaluated", "two_evaluated"):
        (pngs,) = (folder / run).glob("EMAgenerated*/pngs")
        assert sorted(p.name for p in pngs.iterdir()) == [f"{i}.png" for i in range(5)]
        found[run] = np.stack([np.array(Image.open(pngs / f"{i}.png")) for i in range(5)])
        assert json.loads((pngs.parent / "samples.json").read_text())["n"] == 5
        assert (pngs.parent / "grid.png").exists()
    assert np.abs(found["one_evaluated"].astype(int) - found["two_evaluated"]).max() <= 1


def test_features_and_probes_are_those_of_one_process(runs):
    folder, _ = runs
    one, two = folder / "one_evaluated", folder / "two_evaluated"
    files = sorted(path.relative_to(one) for path in (one / "features").rglob("*.npy"))
    assert len(files) >= 16  # four blocks, two timesteps, train and test
    assert files == sorted(path.relative_to(two) for path in (two / "features").rglob("*.npy"))
    for file in files:
        np.testing.assert_allclose(np.load(two / file), np.load(one / file), atol=1e-5)
    for name in ("linear_grid_ep*_cached.json", "linear_out_2_t21_ep*.json"):
        files = [file for run in (one, two) for file in run.glob(name)]
        cells, theirs = (json.loads(file.read_text())["cells"] for file in files)
        assert cells == theirs


def test_there_is_one_log_and_one_bar(runs):
    _, done = runs
    assert done.stderr.count("epoch 1: test loss") == 1
    assert done.stderr.count("| 10/20 [00:00<?") == 1
    assert done.stderr.count("error: batch_size 15 is not divisible by the 2 processes") == 1
    assert done.stdout.count("5 images in") == 1


def test_a_rank_that_dies_ends_the_run_with_its_traceback(runs):
    folder, done = runs
    assert done.returncode != 0
    assert "RuntimeError: rank 1 has a bug" in done.stderr
    assert "in fail" in done.stderr
    assert not (folder / "failed" / "ckpts").exists()
