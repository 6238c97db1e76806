"""Grids of several protocols, epochs and baselines side by side, and the headline of one."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import save_model

import linear
import visualize_features
from checkpoint import load_denoiser
from evaluation.probe.cells import Cell, CellResult, Outcome
from evaluation.probe.grid import Grid
from evaluation.probe.grid_files import (
    best_cell,
    file_stem,
    find_grid,
    gain_rows,
    untrained_results,
)
from support.errors import UserError
from support.files import write_json
from utils import seed_everything

CPU = torch.device("cpu")


def result(block, validation, test, *timesteps, k=None):
    parts = tuple((t, part) for t in timesteps for part in block.split("+"))
    t = timesteps[0] if len(timesteps) == 1 else "+".join(map(str, timesteps))
    cell = Cell(t, block, parts, k=k)
    return CellResult(cell, 8 * len(parts), validation, test, (test - 0.01, test + 0.01))


def read_results(path):
    return [CellResult.from_record(cell) for cell in json.loads(path.read_text())["cells"]]


ABOUT = {"grid": True, "n_validation": 100, "n_test": 200}
SINGLES = [result("a", 0.6, 0.9, 1), result("b", 0.7, 0.5, 1)]
COMBINED = [result("a+b", 0.8, 0.95, 1), result("a+b", 0.9, 0.93, 1, 2)]


def test_combined_cells_have_a_headline_and_a_table_of_their_own(tmp_path, monkeypatch):
    grid = Grid(Outcome([*SINGLES, *COMBINED], 1.0, None), "title", ABOUT)
    assert (grid.outcome.best(), grid.outcome.best(combined=True)) == (SINGLES[1], COMBINED[1])
    lines = grid.text().splitlines()
    assert "picked on the held-out images: b at t=1: test 50.00 % (49.0-51.0)" in lines
    assert "picked on the test set, as published figures are: a at t=1: test 90.00 %" in lines
    closing = (
        "features side by side, picked on the held-out images: "
        "a+b at t=1+2, 32 wide: test 93.00 % (92.0-94.0)"
    )
    assert lines[-1] == closing
    assert "a+b at t=1+2     32     90.00  93.00 (92.0-94.0)" in lines
    drawn = {}
    monkeypatch.setattr(
        "evaluation.probe.grid.heat_map",
        lambda _, tables, rows, levels, *__, marked: drawn.update(
            rows=rows, levels=levels, marked=marked
        ),
    )
    paths = grid.save(tmp_path / "grid")
    assert drawn == {"rows": ["a", "b"], "levels": ["t=1"], "marked": (1, 0)}
    assert [path.suffix for path in paths] == [".json", ".csv", ".md", ".png"]
    record = json.loads(paths[0].read_text())
    assert record["headline"]["block"] == "b"
    assert record["headline_combined"]["t"] == "1+2"
    assert record["headline_combined"]["width"] == 32
    assert record["picked_on_test"]["block"] == "a"
    assert read_results(paths[0]) == [*SINGLES, *COMBINED]
    assert f"- {closing}" in paths[2].read_text()
    assert "| a+b at t=1 | 16 | 80.00 | 95.00 (94.0-96.0) |" in paths[2].read_text()


def test_combined_cells_alone_have_no_heat_map_and_no_single_headline(tmp_path):
    grid = Grid(Outcome(COMBINED, 1.0, None), "title", ABOUT)
    (tmp_path / "grid.png").write_text("of an earlier grid")
    paths = grid.save(tmp_path / "grid")
    assert [path.suffix for path in paths] == [".json", ".csv", ".md"]
    assert not (tmp_path / "grid.png").exists()
    record = json.loads(paths[0].read_text())
    assert record["headline"] is record["picked_on_test"] is None
    assert record["headline_combined"]["test_accuracy"] == 0.93


def test_the_epoch_is_in_the_name_but_for_a_baseline():
    cell = Cell("1+2", "a+b", ())
    assert file_stem(None, "paper", None, epoch=59) == "linear_grid_ep59"
    assert file_stem(None, "cached", None, epoch=59) == "linear_grid_ep59_cached"
    assert file_stem(None, "cached", "random") == "linear_grid_cached_random"
    assert file_stem(cell, "knn", None, epoch=3) == "linear_a+b_t1+2_ep3_knn"


# --- beside the untrained network


def test_the_gain_is_that_of_the_same_cell():
    trained = [*SINGLES, result("b", 0.1, 0.8, 1, k=20), COMBINED[1]]
    untrained = [
        result("a+b", 0.9, 0.61, 1, 2), result("b", 0.7, 0.55, 1), result("a", 0.6, 0.25, 1),
        result("a", 0.6, 0.99, 2), result("b", 0.1, 0.4, 1, k=20),
    ]  # fmt: skip
    assert gain_rows(trained, untrained) == [
        ["cell", "trained", "untrained", "gain"],
        ["a at t=1", "90.00 (89.0-91.0)", "25.00", "+65.00"],
        ["b at t=1", "50.00 (49.0-51.0)", "55.00", "-5.00"],
        ["b at t=1, k=20", "80.00 (79.0-81.0)", "40.00", "+40.00"],
        ["a+b at t=1+2, 32 wide", "93.00 (92.0-94.0)", "61.00", "+32.00"],
    ]


@pytest.mark.parametrize(("protocol", "compares"), [("paper", False), ("cached", True)])
def test_heads_that_were_fitted_otherwise_are_not_compared(tmp_path, protocol, compares):
    def about(n_epoch):
        return ABOUT | {
            "protocol": protocol, "dataset": "digits", "n_train": 9, "seed": 0, "baseline": None,
            "use_amp": False, "data": ["a", "b"],
            "config": {"network": {}, "flip": True, "linear": {"n_epoch": n_epoch}},
        }  # fmt: skip

    record = about(15) | {
        "baseline": "random", "epoch": None, "fingerprint": "0-float32", "headline": None,
        "cells": [result.record() for result in SINGLES],
    }  # fmt: skip
    write_json(tmp_path / "linear_grid_random.json", record)
    assert untrained_results(tmp_path, about(15), SINGLES) == SINGLES
    assert bool(untrained_results(tmp_path, about(1), SINGLES)) == compares
    for other in ({"data": ["a", "c"]}, {"use_amp": True}, {"n_train": 8}):
        assert untrained_results(tmp_path, about(15) | other, SINGLES) == []
    (tmp_path / "linear_grid_random.json").write_text("{}")
    assert untrained_results(tmp_path, about(15), SINGLES) == []


# --- of one folder with grids of several


@pytest.fixture
def probe(tiny_config, tiny_yaml, tmp_path):
    """Probes one cell of a block and t as a grid; there are epochs 0 and 1."""
    for epoch in (0, 1):
        seed_everything("weights of", epoch)
        save_model(tiny_config, epoch)

    def call(protocol, t, block, *more):
        linear.main([
            "--config", str(tiny_yaml), "--device", "cpu", "--grid", "--protocol", protocol,
            "--timesteps", str(t), "--blocks", block, *more,
        ])  # fmt: skip
        return tmp_path / "run"

    return call


def test_the_cell_shown_is_that_of_the_model_asked_for_whatever_is_newest(probe, tiny_yaml, capsys):
    probe("cached", 3, "out_1", "--epoch", "1")
    probe("knn", 4, "out_2", "--epoch", "1")
    probe("cached", 5, "out_3", "--epoch", "0")
    probe("paper", 7, "out_2", "--epoch", "0", "--n_train", "20")
    folder = probe("cached", 6, "out_4", "--baseline", "random")
    models = [load_denoiser(folder / "ckpts" / f"model_{epoch}.pth", CPU) for epoch in (0, 1)]

    def found(model, *protocol):
        path, best = best_cell(folder, model, *protocol)
        return path.name, best.cell.t, best.cell.block

    assert found(models[0]) == ("linear_grid_ep0_cached.json", 5, "out_3")
    assert found(models[1]) == ("linear_grid_ep1_cached.json", 3, "out_1")
    assert found(models[1], "knn") == ("linear_grid_ep1_knn.json", 4, "out_2")
    assert find_grid(folder, models[0], "knn") is None
    with pytest.raises(UserError) as error:
        best_cell(folder, models[0], "knn")
    for words in (
        "no linear_grid*.json of these weights (epoch 0, protocol knn)",
        "linear_grid_ep0_cached.json (epoch 0, protocol cached)",
        "linear_grid_ep1_knn.json (epoch 1, protocol knn, other weights)",
    ):
        assert words in str(error.value)
    assert "random" not in str(error.value)

    def show(*argv):
        common = ["--config", str(tiny_yaml), "--device", "cpu", "--n", "10"]
        capsys.readouterr()
        visualize_features.main([*common, *argv])
        return Path(capsys.readouterr().out.split()[1]).name

    assert show("--epoch", "0") == "tsne_ep0_t5_out_3.png"
    assert show() == "tsne_ep1_t3_out_1.png"
    assert show("--protocol", "knn") == "tsne_ep1_t4_out_2.png"
    beside = ("--output_dir", str(folder / "beside"))
    assert show(*beside) == "tsne_ep1_t3_out_1.png"
    probe("cached", 2, "out_4", "--epoch", "1", *beside)
    assert show(*beside) == "tsne_ep1_t2_out_4.png"


def test_weights_trained_anew_are_not_shown_by_the_old_grid(probe, tiny_config, tiny_yaml, mistake):
    folder = probe("cached", 3, "out_1", "--epoch", "1")
    seed_everything("trained anew")
    save_model(tiny_config, 1)
    with mistake("linear_grid_ep1_cached.json (epoch 1, protocol cached, other weights)"):
        visualize_features.main(["--config", str(tiny_yaml), "--device", "cpu"])
    assert (folder / "linear_grid_ep1_cached.json").exists()


def test_the_untrained_grid_in_the_folder_stands_beside_the_trained_one(probe, capsys):
    cells = ("1,21,1+21", "out_1,all")
    folder = probe("cached", *cells, "--baseline", "random")
    assert "gain" not in capsys.readouterr().out
    probe("cached", *cells, "--epoch", "1")
    printed = capsys.readouterr().out
    files = [folder / f"linear_grid_{name}.json" for name in ("ep1_cached", "cached_random")]
    trained, untrained = map(read_results, files)
    for ours, theirs in zip(trained, untrained, strict=True):
        gain = 100 * (ours.test_accuracy - theirs.test_accuracy)
        row = [ours.name, ours.on_test, f"{100 * theirs.test_accuracy:.2f}", f"{gain:+.2f}"]
        assert f"| {' | '.join(row)} |" in files[0].with_suffix(".md").read_text()
        assert row in [re.split(" {2,}", line) for line in printed.splitlines()]
    probe("cached", "1,11", "out_1", "--epoch", "1")  # a cell that the untrained grid lacks
    assert "gain" not in capsys.readouterr().out
    probe("cached", "1", "out_1", "--epoch", "1", "--seed", "5")  # other noise
    assert "gain" not in capsys.readouterr().out
    schedule = ("--set", "diffusion.schedule=cosine")  # the untrained network at other levels
    probe("cached", *cells, "--baseline", "random", *schedule)
    assert read_results(files[1]) != untrained
    capsys.readouterr()
    probe("cached", *cells, "--epoch", "1")
    assert "gain" not in capsys.readouterr().out
