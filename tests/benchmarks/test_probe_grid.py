"""benchmarks/probe_grid.py: the grid of linear probes three ways."""

import dataclasses
from collections import Counter

import pytest
import torch

from benchmarks import probe_grid
from benchmarks.probe_ways import WAYS, Race, forwards
from checkpoint import untrained
from datasets import read_dataset, stratified
from evaluation.probe.cells import cells_of
from evaluation.probe.features import model_source, pixel_source
from support.errors import UserError
from support.files import read_json

N_TRAIN, N_TEST = 200, 40


@pytest.fixture
def race(tiny_config):
    """Of two timesteps and two blocks; `counted` has its forwards."""
    source = model_source(untrained(tiny_config, torch.device("cpu")), False)
    counted = Counter()

    def features(x0, *args):
        counted["images"] += len(x0)
        return source.features(x0, *args)

    train, test = (
        stratified(read_dataset(tiny_config, "data", split), n, 0)
        for split, n in (("train", N_TRAIN), ("test", N_TEST))
    )
    race = Race(
        source=dataclasses.replace(source, features=features), train=train, test=test,
        cells=cells_of(source, [[1], [21]], [["out_1"], ["out_2"]]), recipe=tiny_config.linear,
        flip=False, device=torch.device("cpu"), batch_size=64, seed=0,
    )  # fmt: skip
    return race, counted


def test_the_count_of_forwards_is_that_of_the_network(race):
    race, counted = race
    expected = forwards(4, 2, race.recipe.n_epoch, N_TRAIN, N_TEST)
    for way in WAYS:
        counted.clear()
        race.timed(way)
        more = 2 if way == "one pass" else 0  # an image per timestep, for the widths of the heads
        assert counted["images"] == pytest.approx(expected[way] + more, abs=2 * 10), way


def test_forwards_of_the_main_experiment():
    found = forwards(24, 3, 15, 50_000, 10_000)
    assert found["reference"] == 3 * 760_000
    assert found["cell by cell"] == 8 * found["reference"]
    assert found["reference"] / found["cached"] > 12


def test_heads_stepped_apart_learn_what_those_of_one_pass_learn(race):
    """On the pixels themselves, which take no time."""
    race, _ = race
    recipe = race.recipe.model_copy(update={"n_epoch": 30, "lrate": 1e-2, "batch_size": 32})
    source = pixel_source()
    race = dataclasses.replace(race, source=source, cells=cells_of(source), recipe=recipe)
    apart, together = race.timed("reference")[1], race.timed("one pass")[1]
    assert list(apart) == list(together) == list(race.cells)
    for cell in race.cells:
        assert apart[cell] > 0.7
        assert apart[cell] == pytest.approx(together[cell], abs=0.15)


def test_cached_is_at_the_optimum(race):
    race, _ = race
    found, optimum = race.timed("cached")[1], race.optimum()
    for cell in race.cells:
        assert found[cell] == pytest.approx(optimum[cell], abs=1.5 / N_TEST)


def test_the_record_holds_what_is_printed(tiny_yaml, tmp_path, capsys):
    argv = ["--config", str(tiny_yaml), "--device", "cpu", "--baseline", "random"]
    argv += ["--n_train", "150", "--epochs", "1", "--timesteps", "11", "--blocks", "out_1,out_2"]
    assert probe_grid.main([*argv, "--rounds", "2", "--output_dir", str(tmp_path / "out")]) == 0
    (path,) = (tmp_path / "out").glob("probe_grid_*.json")
    record = read_json(path)
    assert (record["n_train"], record["n_test"], record["epochs"]) == (150, 30, 1)
    assert record["probed"] == "untrained network"
    for row in record["ways"].values():
        assert len(row["seconds"]) == 2
        assert len(row["accuracies"]) == 2
    assert record["ways"]["reference"]["times_reference"] == 1
    printed = capsys.readouterr().out
    assert all(f"\n{way} " in printed for way in WAYS)
    assert f"{record['forwards_of_cifar10']['one pass']:,}" in printed


def test_side_by_side_is_refused():
    with pytest.raises(UserError, match="none side by side"):
        probe_grid.parse_args(["--blocks", "out_1+out_2"])
