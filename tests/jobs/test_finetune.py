"""finetune.py and its recipe: what is trained, on which draws, and that a kill changes nothing."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch import nn

import finetune
from datasets import read_dataset
from evaluation.classifiers.finetuning import RECIPE, Classifier, accuracy, fine_tuning
from evaluation.classifiers.supervised import SupervisedTraining
from model.models import build_denoiser
from support.errors import Stopped, UserError
from utils import generator

T, BLOCK = 21, "out_2"


@pytest.fixture
def digits(tiny_config):
    """160 training and 100 test images."""
    train, test = (read_dataset(tiny_config, "data", split) for split in ("train", "test"))
    return train.take(slice(160)), test.take(slice(100))


@pytest.fixture
def start(tiny_config, digits, tmp_path):
    """Begins a run in a folder of tmp_path, from the same weights every time."""

    def begin(folder, block=BLOCK) -> SupervisedTraining:
        torch.manual_seed(0)
        classifier = Classifier(build_denoiser(tiny_config), T, block, digits[0], seed=0)
        chosen = replace(RECIPE, epochs=2, batch_size=50, lr=2e-3)
        path = tmp_path / folder / "state.pth"
        return fine_tuning(classifier, *digits, chosen, path, seed=0, flip=False, use_amp=False)

    return begin


# --- the recipe


@pytest.mark.parametrize("block", ["out_1", "out_3"])
def test_trained_is_exactly_what_the_logits_depend_on(start, block):
    classifier = start("a", block).classifier.eval()
    x0, noise = torch.randn(2, 1, 1, 8, 8)
    assert classifier(x0, noise).isfinite().all()
    for weight in classifier.parameters():
        kept = weight.detach().clone()
        weight.data.fill_(math.nan)
        assert classifier(x0, noise).isnan().all() == weight.requires_grad
        weight.data.copy_(kept)
    frozen = {n for n, weight in classifier.named_parameters() if not weight.requires_grad}
    assert "denoiser.net.final.weight" in frozen
    assert not any(name.startswith("denoiser.net.down") for name in frozen)


def test_a_step_is_adamws_on_the_batch_and_the_noise_of_its_number(start, tiny_config, digits):
    run = start("a")
    run.classifier.denoiser.net.apply(lambda m: m.eval() if isinstance(m, nn.Dropout) else None)
    torch.manual_seed(0)
    oracle = Classifier(build_denoiser(tiny_config), T, BLOCK, digits[0], seed=0).eval()
    groups = [
        {"params": [p for p in oracle.parameters() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in oracle.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups)
    for step, lr in enumerate([2e-3 / 4, 4e-3 / 4]):  # 3 batches of warm-up
        run.train_step()
        x0, y = run.batches[step]
        noise = torch.randn(x0.shape, generator=generator("cpu", 0, "finetune", step))
        for group in adam.param_groups:
            group["lr"] = lr
        adam.zero_grad()
        nn.functional.cross_entropy(oracle(x0, noise), y).backward()
        adam.step()
    for ours, theirs in zip(run.classifier.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_accuracy_is_without_dropout_and_of_noise_by_the_image(start, digits):
    classifier, test = start("a").classifier.eval(), digits[1]
    noise = [
        torch.randn(64, 1, 8, 8, generator=generator("cpu", 0, "features", "test", T, chunk))
        for chunk in (0, 1)
    ]
    x0 = torch.from_numpy(test.images).float() / 127.5 - 1
    with torch.no_grad():
        labels = classifier(x0, torch.cat(noise)[:100]).argmax(1).numpy()
    test = replace(test, labels=np.where(np.arange(100) < 83, labels, labels ^ 1))
    assert accuracy(classifier, test, seed=0, use_amp=False) == pytest.approx(0.83)


class Killed(Exception):
    pass


def test_an_interrupted_run_goes_on_bit_for_bit(start, monkeypatch):
    whole = start("whole")
    history = whole.run()
    assert [epoch["epoch"] for epoch in history] == [1, 2]

    step = SupervisedTraining.train_step
    for killed_at in (1, 3, 4):  # in the first epoch, at its end, in the second

        def dies(self, at=killed_at):
            if self.step == at:
                raise Killed
            step(self)

        killed = start(f"killed {killed_at}")
        killed.kept.every_s = 0
        with monkeypatch.context() as patch:
            patch.setattr(SupervisedTraining, "train_step", dies)
            with pytest.raises(Killed):
                killed.run()
        resumed = start(f"killed {killed_at}")
        assert resumed.step == killed_at
        assert resumed.run() == history
        ours, theirs = resumed.classifier.state_dict(), whole.classifier.state_dict()
        for name in theirs:
            assert torch.equal(ours[name], theirs[name]), name


def test_a_signal_lets_the_step_end_and_saves(start, monkeypatch):
    step = SupervisedTraining.train_step

    def told(self):
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self)

    monkeypatch.setattr(SupervisedTraining, "train_step", told)
    with pytest.raises(Stopped, match="stopped at batch 2 of 6 and saved"):
        start("a").run()
    assert start("a").step == 2


def test_a_loss_that_is_not_finite_ends_the_run(start):
    run = start("a")
    run.classifier.head.bias.data.fill_(math.nan)
    with pytest.raises(UserError, match="lower --lr"):
        run.run()


# --- the job


def defaults(yaml) -> list[str]:
    argv = ["--config", str(yaml), "--device", "cpu", "--epochs", "2", "--batch_size", "50"]
    return [*argv, "--lr", "3e-3", "--warm_epochs", "0.5"]


@pytest.fixture
def run(tiny_yaml, tiny_checkpoint, tmp_path):
    """Calls the job; returns the folder of its results."""

    def call(*more):
        finetune.main([*defaults(tiny_yaml), *more])
        return tmp_path / "run"

    return call


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_both_starts_stand_side_by_side(run, capsys, monkeypatch):
    folder = run("--n_train", "200")
    alone = capsys.readouterr().out
    assert "from epoch 1 " in alone
    assert "scratch" not in alone
    run("--n_train", "200", "--scratch")
    printed = capsys.readouterr().out
    trained = read(folder, "finetune_out_2_t21_n200.json")
    scratch = read(folder, "finetune_out_2_t21_n200_scratch.json")
    for name, record in (("from epoch 1 ", trained), ("from scratch", scratch)):
        (line,) = (line for line in printed.splitlines() if line.startswith(name))
        assert f"{record['parameters_trained']:,}" in line
        assert f"{100 * record['test_accuracy']:.2f} (" in line
        low, high = record["test_interval"]
        assert low < record["test_accuracy"] == record["history"][-1]["test_accuracy"] < high
    assert (trained["n_train"], trained["n_test"], len(trained["history"])) == (200, 360, 2)
    assert trained["fingerprint"] != scratch["fingerprint"]
    assert scratch["checkpoint"] is None
    assert scratch["history"][1]["train_loss"] < scratch["history"][0]["train_loss"]
    assert Image.open(folder / "finetune_out_2_t21_n200.png").width > 800

    def must_not_run(*_):
        raise AssertionError("this run is over")

    monkeypatch.setattr(SupervisedTraining, "train_step", must_not_run)
    run("--n_train", "200")
    assert read(folder, "finetune_out_2_t21_n200.json") == trained
    assert capsys.readouterr().out.splitlines()[:-1] == printed.splitlines()[:-1]


def test_a_start_with_another_recipe_is_not_shown(run, capsys):
    run("--n_train", "100", "--batch_size", "100", "--use_amp")
    capsys.readouterr()
    run("--n_train", "100", "--batch_size", "50", "--use_amp", "--scratch")
    said = capsys.readouterr()
    assert "of another recipe: not shown" in said.err
    assert "from scratch" in said.out
    assert "from epoch" not in said.out


@pytest.mark.slow
def test_two_processes_train_as_one(run, tiny_yaml, tmp_path):
    argv = ["--scratch", "--set", "network.dropout=0", "--n_train", "200"]
    whole = read(run(*argv), "finetune_out_2_t21_n200_scratch.json")
    folder = tmp_path / "two"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    argv += ["--output_dir", str(folder)]
    subprocess.run(
        [*torchrun, "--nproc_per_node=2", "finetune.py", *defaults(tiny_yaml), *argv],
        cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    two = read(folder, "finetune_out_2_t21_n200_scratch.json")
    for ours, theirs in zip(two["history"], whole["history"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(("argv", "message"), [
    (["--blockname", "out_9"], "no block 'out_9': there are out_1"),
    (["--timestep", "0"], "timestep 0: outside 1..1000"),
    (["--scratch", "--epoch", "1"], "--scratch and --epoch exclude each other"),
    (["--epochs", "0"], "--epochs and --batch_size must be at least 1"),
    (["--batch_size", "2000"], "--batch_size 2000 is more than the 1437 training images"),
    (["--weight_decay", "-1"], "--weight_decay"),
    (["--epochs", "1", "--set", "flip=True", "--n_train", "5"], "--n_train 5: give 10"),
])  # fmt: skip
def test_mistakes(run, argv, message, mistake, tmp_path):
    with mistake(message):
        run(*argv)
    assert not list((tmp_path / "run").glob("finetune*"))


def test_the_warm_up_must_end(tiny_yaml, mistake):
    with mistake("--warm_epochs 1"):
        finetune.main(["--config", str(tiny_yaml), "--epochs", "1"])
