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
from evaluation.probe.cells import Cell, CellResult, Outcome, cells_of
from evaluation.probe.features import FeatureSource
from evaluation.probe.over_seeds import SeedTable, probe_seeds
from evaluation.probe.probe import Probe, Protocol
from utils import log, seed_everything


@pytest.fixture
def probe(tmp_path) -> Probe:
    draw = np.random.default_rng(0)
    labels = np.arange(60) % 2
    images = draw.integers(0, 200, (60, 1, 8, 8)) + 20 * labels[:, None, None, None]
    train = Dataset("toy", "train", images.astype(np.uint8), labels, ["x", "y"])
    test = dataclasses.replace(train, split="test")
    return Probe(
        train=train, test=test, cells=cells_of(toy_source(), [[1]], [["a"]]),
        protocol=Protocol("cached", Linear(), flip=False),
        device=torch.device("cpu"), batch_size=512, folder=tmp_path,
    )  # fmt: skip


def toy_source(fingerprint="toy"):
    def noisy_pixels(x0, t, noise, blocks):
        return {"a": (x0 + noise).flatten(1)[:, :5]}

    return FeatureSource(noisy_pixels, ["a"], range(1, 11), (1,), fingerprint)


@pytest.mark.parametrize("other", ["", "[]", '{"results": [{"t": 1}], "seconds": 1}'])
def test_a_kept_probe_of_another_form_is_made_anew(probe, caplog, monkeypatch, other):
    monkeypatch.setattr(log, "propagate", True)
    first = probe.kept(toy_source(), seed=0)
    (path,) = (probe.folder / "probes").iterdir()
    path.write_text(other)
    assert probe.kept(toy_source(), seed=0).results == first.results
    assert f"{path} is damaged, or of something else" in caplog.text
    assert json.loads(path.read_text())["results"] == first.record()["results"]


def test_a_finished_probe_is_kept_until_a_setting_changes(probe, monkeypatch):
    first = probe.kept(toy_source(), seed=0)
    asked = []

    def counting(self, source, seed):
        asked.append((source.fingerprint, seed, self.protocol, self.cells))
        return first

    monkeypatch.setattr(Probe, "__call__", counting)
    assert probe.kept(toy_source(), seed=0) == first
    assert asked == []
    probe.kept(toy_source("other weights"), seed=0)
    probe.kept(toy_source(), seed=1)
    for timesteps in ([1, 2],), ([2],):
        cells = cells_of(toy_source(), timesteps, [["a"]])
        dataclasses.replace(probe, cells=cells).kept(toy_source(), seed=0)
    flipped = dataclasses.replace(probe.train, labels=1 - probe.train.labels)
    dataclasses.replace(probe, train=flipped).kept(toy_source(), seed=0)
    for protocol in Protocol("knn", Linear(), False), Protocol("cached", Linear(n_epoch=1), False):
        dataclasses.replace(probe, protocol=protocol).kept(toy_source(), seed=0)
    assert len(asked) == 6  # not the last: the recipe is the paper's protocol's alone


def test_seeds_draw_other_noise_and_the_same_one_again(probe):
    outcomes = probe_seeds(probe, toy_source(), [0, 1, 2, 1])
    assert list(outcomes) == [0, 1, 2]
    assert len({outcome.results[0].test_accuracy for outcome in outcomes.values()}) > 1
    assert probe(toy_source(), 1).results == outcomes[1].results


def test_spreads_are_of_n_minus_1_and_the_cell_is_picked_by_mean_validation(tmp_path):
    def outcome(*accuracies):
        cells = zip("ab", accuracies, strict=True)
        results = [CellResult(Cell(1, b, ((1, b),)), 8, v, t, (0, 1)) for b, (v, t) in cells]
        return Outcome([*results, combined(*accuracies[0])], 1.0, None)

    def combined(validation, test):
        cell = Cell(1, "a+b", ((1, "a"), (1, "b")))
        return CellResult(cell, 16, validation + 0.2, test + 0.2, (0, 1))

    outcomes = {
        3: outcome((0.70, 0.60), (0.60, 0.80)),
        4: outcome((0.50, 0.62), (0.61, 0.81)),
        9: outcome((0.70, 0.67), (0.62, 0.85)),
    }
    about = {"n_validation": 10, "n_test": 20}
    table = SeedTable(outcomes, "title", about)
    a, b, both = table.spreads
    assert a.validation_mean == pytest.approx(1.9 / 3)
    assert a.test_std == pytest.approx(np.std([0.60, 0.62, 0.67], ddof=1))
    assert b.test_mean == pytest.approx(0.82)
    assert table.headline == a
    assert table.headline_combined == both
    printed = table.text()
    assert "picked on the held-out images: a at t=1: test 63.00 ± 3.61 % over 3 seeds" in printed
    assert "b at t=1: test 82.00 ± 2.65 %" in printed
    assert "a+b at t=1, 16 wide: test 83.00 ± 3.61 % over 3 seeds" in printed
    table.save(tmp_path / "s")
    record = json.loads((tmp_path / "s.json").read_text())
    assert record["headline"]["block"] == "a"
    assert record["headline_combined"]["block"] == "a+b"
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
    single = json.loads((folder / "linear_out_2_t21_ep4_knn.json").read_text())
    assert single["headline"] == record["epochs"][2]["headline"]


def test_combined_cells_have_a_curve_of_their_own(three_epochs, capsys):
    folder = three_epochs("--epochs", "0,4", "--grid", "--timesteps", "21", "--blocks", "out_2,all")
    record = json.loads((folder / "linear_epochs_grid_knn.json").read_text())
    for row in record["epochs"]:
        assert row["headline"]["block"] == "out_2"
        assert row["headline_combined"]["block"] == "all"
    best = max(record["epochs"], key=lambda row: row["headline_combined"]["validation_accuracy"])
    assert record["best_epoch_combined"] == best["epoch"]
    cell = best["headline_combined"]
    closing = (
        f"features side by side, picked on the held-out images: epoch {best['epoch']}, all at "
        f"t=21, k={cell['k']}, {cell['width']} wide: test {100 * cell['test_accuracy']:.2f} %"
    )
    assert closing in capsys.readouterr().out
    assert closing in (folder / "linear_epochs_grid_knn.md").read_text()


def test_the_curve_begins_with_the_untrained_network_where_its_grid_is_there(three_epochs, capsys):
    cell = ("--timesteps", "21", "--blocks", "out_2")
    folder = three_epochs("--epochs", "0,1")
    record = json.loads((folder / "linear_epochs_out_2_t21_knn.json").read_text())
    assert record["untrained"] == []
    assert "untrained" not in capsys.readouterr().out
    three_epochs("--baseline", "random", "--grid", "--timesteps", "1,21")
    untrained = json.loads((folder / "linear_grid_knn_random.json").read_text())["cells"]
    of_cell = [c for c in untrained if (c["t"], c["block"]) == (21, "out_2")]
    best = max(of_cell, key=lambda c: c["validation_accuracy"])
    capsys.readouterr()
    for argv, stem in ((), "out_2_t21"), (("--grid", *cell), "grid"):
        three_epochs("--epochs", "0,1", *argv)
        record = json.loads((folder / f"linear_epochs_{stem}_knn.json").read_text())
        assert record["untrained"] == of_cell
        assert [row["epoch"] for row in record["epochs"]] == [0, 1]
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        (row,) = [row for row in rows if row[:1] == ["untrained"]]
        assert row[1:3] == [f"{100 * best[f'{on}_accuracy']:.2f}" for on in ("validation", "test")]
        assert rows[rows.index(row) + 1][0] == "0"


def test_an_absent_epoch_is_refused_before_any_is_probed(three_epochs, monkeypatch, mistake):
    monkeypatch.setattr(Probe, "__call__", None)
    with mistake("model_2.pth: no such checkpoint. There are: model_0.pth, model_1.pth"):
        three_epochs("--epochs", "0,2")
