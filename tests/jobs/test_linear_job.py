"""linear.py and visualize_features.py on digits with a tiny checkpoint."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import linear
import visualize_features
from evaluation.probe.features import Extractor


@pytest.fixture
def run(tiny_yaml, tiny_checkpoint, tmp_path):
    """Calls a job; returns the folder of its results."""

    def call(job, *more):
        job.main(["--config", str(tiny_yaml), "--device", "cpu", *more])
        return tmp_path / "run"

    return call


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_cached_grid_then_one_cell_then_the_picture(run, capsys, monkeypatch, tmp_path):
    npz = tmp_path / "features.npz"
    folder = run(
        linear, "--grid", "--protocol", "cached", "--timesteps", "1,21", "--save_features", str(npz)
    )
    record = read(folder, "linear_grid_ep1_cached.json")
    cells = {(cell["t"], cell["block"]): cell for cell in record["cells"]}
    assert len(cells) == 8
    assert record["headline"]["validation_accuracy"] == max(
        cell["validation_accuracy"] for cell in cells.values()
    )
    low, high = record["headline"]["test_interval"]
    assert 0.5 < low < record["headline"]["test_accuracy"] < high < 1
    assert (record["n_train"], record["n_validation"], record["n_test"]) == (1437, 142, 360)
    printed = capsys.readouterr().out
    assert f"test {100 * record['headline']['test_accuracy']:.2f} %" in printed
    assert "picked on the test set" in printed

    with open(folder / "linear_grid_ep1_cached.csv") as file:
        for row in csv.DictReader(file):
            cell = cells[int(row["t"]), row["block"]]
            assert float(row["test_accuracy"]) == cell["test_accuracy"]
    with np.load(npz) as arrays:
        assert arrays["train_t21_out_2"].shape == (1437, cells[21, "out_2"]["width"])
        assert arrays["test_labels"].shape == (360,)

    def must_not_run(*_):
        raise AssertionError("these features are on the disk")

    monkeypatch.setattr(Extractor, "_compute", must_not_run)
    run(linear, "--protocol", "cached")
    single = read(folder, "linear_out_2_t21_ep1_cached.json")
    assert single["headline"] == cells[21, "out_2"]

    run(visualize_features, "--n", "100", "--output_dir", str(tmp_path / "elsewhere"))
    best = record["headline"]
    stem = f"tsne_ep1_t{best['t']}_{best['block']}"
    with np.load(tmp_path / "elsewhere" / f"{stem}.npz") as arrays:
        assert arrays["points"].shape == (100, 2)
        assert np.isfinite(arrays["points"]).all()
    assert Image.open(tmp_path / "elsewhere" / f"{stem}.png").width > 800
    assert Image.open(folder / "linear_grid_ep1_cached.png").width > 800


def test_paper_grid_and_baselines_keep_to_their_own_files(run):
    folder = run(linear, "--grid", "--timesteps", "1", "--blocks", "out_1,out_2")
    first = read(folder, "linear_grid_ep1.json")
    run(linear, "--grid", "--timesteps", "1", "--blocks", "out_1", "--baseline", "random")
    run(linear, "--grid", "--baseline", "pixels", "--protocol", "cached")
    assert read(folder, "linear_grid_ep1.json") == first
    assert first["protocol"] == "paper"
    assert [cell["block"] for cell in first["cells"]] == ["out_1", "out_2"]
    random = read(folder, "linear_grid_random.json")
    assert random["fingerprint"] != first["fingerprint"]
    assert random["checkpoint"] is None
    pixels = read(folder, "linear_grid_cached_pixels.json")
    assert pixels["headline"]["width"] == 64
    assert pixels["headline"]["test_accuracy"] > 0.93  # a linear classifier of digits' pixels


def test_knn_of_noise_levels_given_as_sigma(run, capsys):
    folder = run(
        linear, "--grid", "--protocol", "knn", "--sigmas", "0.0227967,0.03", "--blocks", "out_1"
    )
    record = read(folder, "linear_grid_ep1_knn.json")
    cells = {(cell["sigma"], cell["k"]): cell for cell in record["cells"]}
    assert list(cells) == [(0.0227967, 20), (0.0227967, 200), (0.03, 20), (0.03, 200)]
    assert cells[0.0227967, 20]["t"] == 4  # so that its features are those of --timestep 4
    assert 6 < cells[0.03, 200]["t"] < 7
    assert record["headline"] == max(cells.values(), key=lambda c: c["validation_accuracy"])
    assert "sigma=0.0227967" in capsys.readouterr().out
    table = (folder / "linear_grid_ep1_knn.md").read_text()
    assert "| block | sigma=0.0227967 | sigma=0.03 |" in table
    assert f"| out_1, k=200 | {100 * cells[0.0227967, 200]['validation_accuracy']:.2f}" in table

    run(linear, "--protocol", "knn", "--timestep", "4", "--blockname", "out_1")
    single = read(folder, "linear_out_1_t4_ep1_knn.json")
    assert single["cells"][0]["test_accuracy"] == cells[0.0227967, 20]["test_accuracy"]
    assert "at t=4, k=" in capsys.readouterr().out
    run(linear, "--protocol", "cached", "--sigmas", "0.03", "--blockname", "out_1")
    assert read(folder, "linear_out_1_sigma0.03_ep1_cached.json")["headline"]["sigma"] == 0.03
    run(linear, "--grid", "--protocol", "knn", "--sigmas", "0.03", "--blocks", "out_1,out_2")
    best = read(folder, "linear_grid_ep1_knn.json")["headline"]
    run(visualize_features, "--n", "20")  # the best cell of that grid
    assert (folder / f"tsne_ep1_t{best['t']}_{best['block']}.png").exists()


def test_seeds_of_a_grid(run, capsys):
    folder = run(
        linear, "--grid", "--protocol", "cached", "--timesteps", "21", "--seeds", "0,5",
        "--blocks", "out_1,out_2",
    )  # fmt: skip
    record = read(folder, "linear_seeds_grid_ep1_cached.json")
    assert [cell["block"] for cell in record["cells"]] == ["out_1", "out_2"]
    assert [run["seed"] for run in record["runs"]] == [0, 5]
    assert record["runs"][0]["results"] != record["runs"][1]["results"]
    assert " % over 2 seeds" in capsys.readouterr().out
    assert "±" in (folder / "linear_seeds_grid_ep1_cached.md").read_text()


def test_features_side_by_side_are_those_of_the_single_cells(run, monkeypatch, capsys):
    argv = ["--grid", "--protocol", "cached", "--timesteps", "1,21", "--blocks", "out_1,out_2"]
    folder = run(linear, *argv)
    alone = read(folder, "linear_grid_ep1_cached.json")
    monkeypatch.setattr(Extractor, "_compute", None)  # these features are on the disk
    argv[4:] = ["1,21,1+21", "--blocks", "out_1,out_2,out_1+out_2"]
    run(linear, *argv)
    both = read(folder, "linear_grid_ep1_cached.json")
    assert both["headline"] == alone["headline"]
    assert both["picked_on_test"] == alone["picked_on_test"]
    combined = {(c["t"], c["block"]): c for c in both["cells"] if "parts" in c}
    widths = {(c["t"], c["block"]): c["width"] for c in alone["cells"]}
    assert combined["1+21", "out_2"]["width"] == 2 * widths[1, "out_2"]
    assert combined["1+21", "out_1+out_2"]["width"] == sum(widths.values())
    assert both["headline_combined"] == max(
        combined.values(), key=lambda cell: cell["validation_accuracy"]
    )
    capsys.readouterr()

    run(linear, "--protocol", "cached", "--timesteps", "1+21", "--blocks", "out_1+out_2")
    single = read(folder, "linear_out_1+out_2_t1+21_ep1_cached.json")
    assert single["headline"] is None
    assert single["headline_combined"] == combined["1+21", "out_1+out_2"]
    accuracy = 100 * single["headline_combined"]["test_accuracy"]
    assert f"out_1+out_2 at t=1+21, {sum(widths.values())} wide: test {accuracy:.2f} %" in (
        capsys.readouterr().out
    )


def test_all_blocks_of_an_untrained_network_over_seeds(run, capsys):
    folder = run(
        linear, "--protocol", "cached", "--blocks", "all", "--baseline", "random",
        "--seeds", "0,5",
    )  # fmt: skip
    record = read(folder, "linear_seeds_all_t21_cached_random.json")
    assert record["headline"] is None
    (cell,) = record["cells"]
    assert [block for _, block in cell["parts"]] == ["out_1", "out_2", "out_3", "out_4"]
    assert record["headline_combined"] == cell
    assert f"all at t=21, {cell['width']} wide: test " in capsys.readouterr().out


def test_pixels_need_no_checkpoint(run, tiny_checkpoint):
    tiny_checkpoint.unlink()
    folder = run(linear, "--baseline", "pixels", "--protocol", "cached")
    assert (folder / "linear_pixels_t0_cached_pixels.json").exists()


@pytest.mark.parametrize(("argv", "message"), [
    (["--grid", "--blocks", "out_1,out_9"], "no block 'out_9': there are out_1, out_2, out_3"),
    (["--grid", "--timesteps", "1,1001"], "timestep 1001: outside 1..1000"),
    (["--grid", "--timesteps", "0"], "timestep 0: outside 1..1000"),
    (["--grid", "--blockname", "out_1"], "--grid takes --timesteps and --blocks"),
    (["--timesteps", "1,11"], "add --grid"),
    (["--blocks", "out_1,out_2"], "add --grid"),
    (["--blocks", "out_1+out_9"], "no block 'out_9'"),
    (["--timesteps", "1+1001"], "timestep 1001: outside 1..1000"),
    (["--timesteps", "1+a"], "argument --timesteps: '1+a': expected whole numbers"),
    (["--timesteps", "1", "--timestep", "1"], "--timesteps and --timestep exclude each other"),
    (["--blocks", "all", "--blockname", "out_1"], "--blocks and --blockname exclude each other"),
    (["--grid", "--baseline", "pixels", "--timesteps", "1"], "outside 0..0"),
    (["--batch_size", "0"], "--batch_size 0"),
    (["--grid", "--timesteps", "1,a"], "argument --timesteps: '1,a': expected whole numbers"),
    (["--sigmas", "a"], "argument --sigmas: 'a': expected numbers, as in 1,2,1+2"),
    (["--sigmas", "0.02,0.03"], "add --grid"),
    (["--sigmas", "0.02", "--timestep", "0"], "--sigmas and --timestep exclude each other"),
    (["--baseline", "random", "--epoch", "7"], "--baseline and --epoch exclude each other"),
    (["--grid", "--sigmas", "0.02", "--timesteps", "1"], "--sigmas and --timesteps exclude"),
    (["--sigmas", "0.001"], "sigma 0.001: outside 0.0100005..157.407"),
    (["--sigmas", "0.1", "--baseline", "pixels"], "no noise on pixels"),
    (["--epochs", "all", "--epoch", "1"], "--epochs and --epoch exclude each other"),
    (["--epochs", "all", "--seeds", "0,1"], "--epochs and --seeds exclude each other"),
    (["--epochs", "all", "--baseline", "random"], "--epochs and --baseline exclude"),
    (["--epochs", "0,-1"], "--epochs -1: give at least 0"),
    (["--seeds", "0,1", "--seed", "3"], "--seeds and --seed exclude each other"),
    (["--seeds", "0,1", "--save_features", "x.npz"], "--seeds and --save_features exclude"),
    (["--seeds", "1,1"], "two that differ"),
    (["--seeds", "0,1", "--baseline", "pixels", "--protocol", "knn"], "draws nothing"),
])  # fmt: skip
def test_mistakes(run, argv, message, mistake, tmp_path):
    with mistake(message):
        run(linear, *argv)
    assert not list((tmp_path / "run").glob("linear*"))


@pytest.mark.parametrize(("argv", "message"), [
    ([], "There are: none. Run linear.py --grid"),
    (["--timestep", "1"], "give both"),
    (["--timestep", "1", "--blockname", "out_1", "--protocol", "knn"], "--protocol and --timestep"),
    (["--n", "3"], "--n 3: give at least 10"),
])  # fmt: skip
def test_mistakes_of_the_picture(run, argv, message, mistake):
    with mistake(message):
        run(visualize_features, *argv)


@pytest.mark.parametrize("text", ['{"basel', '{"baseline": null}'])
def test_a_damaged_grid_is_named_and_left_aside(run, tmp_path, capsys, text):
    (tmp_path / "run" / "linear_grid.json").write_text(text)
    with pytest.raises(SystemExit):
        run(visualize_features)
    error = capsys.readouterr().err
    assert "linear_grid.json is damaged, or of something else, and is left aside" in error
    assert "There are: none" in error


def test_a_seed_beyond_scikit_learns_range_is_taken(run):
    folder = run(visualize_features, "--timestep", "1", "--blockname", "out_1", "--n", "20",
                 "--seed", str(2**32 + 5))  # fmt: skip
    with np.load(folder / "tsne_ep1_t1_out_1.npz") as kept:
        assert kept["points"].shape == (20, 2)
        assert np.isfinite(kept["points"]).all()


def test_amp_runs(run, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    seen = set()

    def note(module, _, output):
        if isinstance(module, nn.Conv2d):
            seen.add(output.dtype)

    with register_module_forward_hook(note):
        folder = run(linear, "--protocol", "cached", "--use_amp", "--blockname", "out_1")
    assert seen == {torch.bfloat16}
    record = read(folder, "linear_out_1_t21_ep1_cached.json")
    assert record["fingerprint"].endswith("-bfloat16")
    assert record["headline"]["test_accuracy"] > 0.5
    assert torch.isfinite(torch.tensor(record["images_per_s"]))


def test_a_part_of_the_training_images_has_files_of_its_own(run):
    argv = ("--grid", "--timesteps", "1", "--blocks", "out_1", "--protocol", "cached")
    folder = run(linear, *argv)
    run(linear, *argv, "--n_train", "100")
    run(linear, *argv, "--n_train", "100", "--baseline", "random")
    whole, part = (read(folder, f"linear_grid_ep1_cached{name}.json") for name in ("", "_n100"))
    assert (whole["n_train"], part["n_train"]) == (1437, 100)
    assert whole["n_test"] == part["n_test"]
    assert part["headline"]["test_accuracy"] < whole["headline"]["test_accuracy"]
    assert (folder / "linear_grid_cached_n100_random.json").is_file()
    run(linear, *argv, "--n_train", "100")
    assert "untrained" in (folder / "linear_grid_ep1_cached_n100.md").read_text()
