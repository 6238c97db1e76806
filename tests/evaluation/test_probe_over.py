"""A probe over seeds and over the checkpoints of a run: figures, and what is kept."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import save_model

import linear
from config.schema import Linear
from datasets import Dataset
from evaluation.probe import over_seeds as seeds
from evaluation.probe.features import FeatureSource
from evaluation.probe.probe import CellResult, Outcome, Probe
from utils import seed_everything


@pytest.fixture
def probe(tmp_path) -> Probe:
    draw = np.random.default_rng(0)
    labels = np.arange(60) % 2
    images = draw.integers(0, 200, (60, 1, 8, 8)) + 20 * labels[:, None, None, None]
    train = Dataset("toy", "train", images.astype(np.uint8), labels, ["x", "y"])
    test = dataclasses.replace(train, split="test")
    cpu = torch.device("cpu")
    return Probe(
        "cached", train, test, [1], ["a"], False, Linear(), False, cpu, 512, tmp_path
    )  # fmt: skip


def toy_source(fingerprint="toy"):
    def noisy_pixels(x0, t, noise, blocks):
        return {"a": (x0 + noise).flatten(1)[:, :5]}

    return FeatureSource(noisy_pixels, ["a"], range(1, 11), (1,), fingerprint)


def test_a_finished_probe_is_kept_until_a_setting_changes(probe, monkeypatch):
    first = probe.kept(toy_source(), seed=0)
    asked = []

    def counting(self, source, seed):
        asked.append((source.fingerprint, seed, self.protocol, self.timesteps))
        return first

    monkeypatch.setattr(Probe, "__call__", counting)
    assert probe.kept(toy_source(), seed=0) == first
    assert asked == []
    probe.kept(toy_source("other weights"), seed=0)
    probe.kept(toy_source(), seed=1)
    dataclasses.replace(probe, timesteps=[2]).kept(toy_source(), seed=0)
    flipped = dataclasses.replace(probe.train, labels=1 - probe.train.labels)
    dataclasses.replace(probe, train=flipped).kept(toy_source(), seed=0)
    dataclasses.replace(probe, protocol="knn").kept(toy_source(), seed=0)
    dataclasses.replace(probe, recipe=Linear(n_epoch=1)).kept(toy_source(), seed=0)  # not paper's
    assert len(asked) == 5


def test_seeds_draw_other_noise_and_the_same_one_again(probe):
    outcomes = seeds.probe_seeds(probe, toy_source(), [0, 1, 2, 1])
    assert list(outcomes) == [0, 1, 2]
    assert len({outcome.results[0].test_accuracy for outcome in outcomes.values()}) > 1
    assert probe(toy_source(), 1).results == outcomes[1].results


def test_spreads_are_of_n_minus_1_and_the_cell_is_picked_by_mean_validation(tmp_path):
    def outcome(*accuracies):
        cells = zip("ab", accuracies, strict=True)
        return Outcome([CellResult(1, b, 8, v, t, (0, 1)) for b, (v, t) in cells], 1.0, None)

    outcomes = {
        3: outcome((0.70, 0.60), (0.60, 0.80)),
        4: outcome((0.50, 0.62), (0.61, 0.81)),
        9: outcome((0.70, 0.67), (0.62, 0.85)),
    }
    a, b = seeds.spreads(outcomes)
    assert a.validation_mean == pytest.approx(1.9 / 3)
    assert a.test_std == pytest.approx(np.std([0.60, 0.62, 0.67], ddof=1))
    assert b.test_mean == pytest.approx(0.82)
    about = {"n_validation": 10, "n_test": 20}
    printed = seeds.summary(outcomes, "title", about)
    assert "picked on the held-out images: a at t=1: test 63.00 ± 3.61 % over 3 seeds" in printed
    assert "b at t=1: test 82.00 ± 2.65 %" in printed
    seeds.write(tmp_path / "s", outcomes, "title", about)
    record = json.loads((tmp_path / "s.json").read_text())
    assert record["headline"]["block"] == "a"
    assert [run["seed"] for run in record["runs"]] == [3, 4, 9]


# --- over epochs


@pytest.fixture
def three_epochs(tiny_config, tiny_yaml, tmp_path):
    for epoch in (0, 1, 4):
        save(tiny_config, epoch, "weights of", epoch)

    def call(*more):
        linear.main(["--config", str(tiny_yaml), "--device", "cpu", "--protocol", "knn", *more])
        return tmp_path / "run"

    return call


def save(config, epoch: int, *key):
    seed_everything(*key)
    save_model(config, epoch)


def test_epochs_go_on_where_they_were_killed(three_epochs, tiny_config, monkeypatch, capsys):
    probed, probe_it = [], Probe.__call__

    def dies_at_second(self, source, seed):
        if len(probed) == 1:
            raise KeyboardInterrupt
        probed.append(source.fingerprint)
        return probe_it(self, source, seed)

    with monkeypatch.context() as patch:
        patch.setattr(Probe, "__call__", dies_at_second)
        with pytest.raises(SystemExit):
            three_epochs("--epochs", "all")

    def counting(self, source, seed):
        probed.append(source.fingerprint)
        return probe_it(self, source, seed)

    monkeypatch.setattr(Probe, "__call__", counting)
    folder = three_epochs("--epochs", "all")
    assert len(set(probed)) == len(probed) == 3
    record = json.loads((folder / "linear_epochs_out_2_t21_knn.json").read_text())
    assert [row["epoch"] for row in record["epochs"]] == [0, 1, 4]
    assert [row["fingerprint"] for row in record["epochs"]] == probed
    accuracies = [row["headline"]["validation_accuracy"] for row in record["epochs"]]
    best = record["epochs"][int(np.argmax(accuracies))]
    assert record["best_epoch"] == best["epoch"]
    printed = capsys.readouterr().out
    accuracy = 100 * best["headline"]["test_accuracy"]
    k = best["headline"]["k"]
    assert f"epoch {best['epoch']}, out_2 at t=21, k={k}: test {accuracy:.2f} %" in printed
    assert (folder / "linear_epochs_out_2_t21_knn.png").stat().st_size > 10_000

    save(tiny_config, 1, "trained anew")
    three_epochs("--epochs", "0,1")
    assert len(probed) == 4
    monkeypatch.undo()
    three_epochs("--epoch", "4")  # one epoch alone says the same
    single = json.loads((folder / "linear_out_2_t21_knn.json").read_text())
    assert single["headline"] == record["epochs"][2]["headline"]


def test_an_absent_epoch_is_refused_before_any_is_probed(three_epochs, monkeypatch, capsys):
    monkeypatch.setattr(Probe, "__call__", None)
    with pytest.raises(SystemExit) as stop:
        three_epochs("--epochs", "0,2")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "model_2.pth: no such checkpoint. There are: model_0.pth, model_1.pth" in error
