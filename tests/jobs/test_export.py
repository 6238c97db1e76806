"""export.py, and that the jobs read what it writes."""

import hashlib
import json

import pytest
import torch
import yaml
from conftest import save_model

import checkpoint
import export
import linear
import sample
import visualize_features
from config import parse_config
from model.models import build_denoiser


@pytest.fixture
def exported(tiny_checkpoint, tmp_path, capsys):
    """Calls export.py on the tiny checkpoint; returns its folder and what it printed."""

    def call(*more):
        folder = tmp_path / "out"
        export.main(["--ckpt", str(tiny_checkpoint), "--output_dir", str(folder), *more])
        return folder, capsys.readouterr().out

    return call


def accuracies(job_folder):
    record = json.loads((job_folder / "linear_out_2_t21_ep1_cached.json").read_text())
    return record["headline"]["test_accuracy"]


def test_every_kind_of_name_is_read_and_float16_reads_as_well(exported, tiny_checkpoint, tmp_path):
    folder, _ = exported()
    probed = {}
    for name, path in (("pth", tiny_checkpoint), ("folder", folder)):
        out = tmp_path / name
        linear.main(["--ckpt", str(path), "--protocol", "cached", "--output_dir", str(out)])
        probed[name] = accuracies(out)
    assert probed["pth"] > 0.5
    assert abs(probed["pth"] - probed["folder"]) <= 0.001
    file = str(folder / "model.safetensors")
    sample.main(["--ckpt", file, "--n", "2", "--steps", "2", "--output_dir", str(tmp_path / "s")])
    assert len(list((tmp_path / "s" / "pngs").glob("*.png"))) == 2
    cell = ["--timestep", "21", "--blockname", "out_2", "--n", "10"]
    visualize_features.main(["--ckpt", str(folder), *cell, "--output_dir", str(tmp_path / "t")])
    assert (tmp_path / "t" / "tsne_ep1_t21_out_2.png").exists()


def test_features_of_float16_weights_are_near(exported, tiny_checkpoint):
    folder, _ = exported()
    x, noise = torch.rand(8, 1, 8, 8) * 2 - 1, torch.randn(8, 1, 8, 8)
    exact, near = (
        checkpoint.load_denoiser(path).denoiser.features(x, 21, noise, ["out_2"])["out_2"]
        for path in (tiny_checkpoint, folder)
    )
    assert not torch.equal(near, exact)
    assert (near - exact).norm() < 2e-3 * exact.norm()


def test_the_card_and_what_is_printed(exported, tiny_checkpoint):
    run = tiny_checkpoint.parent.parent
    grid = ["--grid", "--timesteps", "21", "--protocol", "cached", "--output_dir", str(run)]
    linear.main(["--ckpt", str(tiny_checkpoint), *grid])
    linear.main(["--ckpt", str(tiny_checkpoint), *grid, "--n_train", "100"])  # not on the card
    linear.main(["--ckpt", str(tiny_checkpoint), *grid, "--baseline", "random"])
    sample.main(["--ckpt", str(tiny_checkpoint), "--n", "2", "--steps", "2", "--no_clip"])
    folder, printed = exported("--dtype", "float32")
    data = (folder / "model.safetensors").read_bytes()
    description = json.loads((folder / "config.json").read_text())
    assert description["sha256"] == hashlib.sha256(data).hexdigest()
    assert description["dtype"] == "float32"
    card = (folder / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "mit"
    best, untrained = (
        json.loads((run / f"linear_grid{name}.json").read_text())
        for name in ("_ep1_cached", "_cached_random")
    )
    headline = best["headline"]
    there = {cell["block"]: cell["test_accuracy"] for cell in untrained["cells"]}
    gain = 100 * (headline["test_accuracy"] - there[headline["block"]])
    (row,) = [line for line in body.splitlines() if line.startswith("| cached")]
    assert f"| {headline['block']} at t=21 | {100 * headline['test_accuracy']:.2f} (" in row
    assert f"| {gain:+.2f} | not measured |" in row
    assert f'D.features(x0, 21, noise, ["{headline["block"]}"])' in body
    assert description["sha256"] in body
    assert (folder / "samples.png").exists()
    assert "python sample.py --ckpt out --n 16 --sampler ddim --steps 2 --eta 0.0 --no_clip" in body
    assert "probes by cached" in printed
    assert f"python sample.py --ckpt {folder} --n 16" in printed
    (run / "EMAgenerated_ep1_ddim_steps2_eta0.0_noclip" / "grid.png").unlink()
    exported()  # over an earlier export
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    assert not (folder / "samples.png").exists()


@pytest.mark.parametrize(("changes", "shown"), [
    ({}, True), ({"dataset": "mnist"}, False), ({"data": ["other", "images"]}, False),
])  # fmt: skip
def test_the_pixels_on_the_card_are_those_of_the_same_images(
    exported, tiny_checkpoint, changes, shown
):
    run = tiny_checkpoint.parent.parent
    grid = ["--grid", "--protocol", "cached", "--output_dir", str(run)]
    linear.main(["--ckpt", str(tiny_checkpoint), *grid, "--timesteps", "21"])
    linear.main(["--dataset", "digits", *grid, "--baseline", "pixels"])
    path = run / "linear_grid_cached_pixels.json"
    pixels = json.loads(path.read_text())
    path.write_text(json.dumps(pixels | changes))
    card = (exported()[0] / "README.md").read_text()
    assert (f"| {100 * pixels['headline']['test_accuracy']:.2f} |" in card) == shown


def test_a_killed_export_is_done_again_by_the_same_command(exported, tmp_path):
    folder, _ = exported()
    for left in ("README.md", "model.safetensors"):
        (folder / left).unlink()
        exported()
        assert (folder / left).exists()
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip


def test_the_release_shows_the_cell_asked_for_and_the_training_that_was(exported):
    cell = ["--set", "linear.timestep=11", "--set", "linear.blockname=out_1"]
    folder, _ = exported(*cell, "--seed", "5")
    config = json.loads((folder / "config.json").read_text())["config"]
    assert (config["linear"]["timestep"], config["linear"]["blockname"]) == (11, "out_1")
    assert config["seed"] == 0  # of the training
    assert 'D.features(x0, 11, noise, ["out_1"])  #' in (folder / "README.md").read_text()


def test_grids_of_other_weights_are_not_on_the_card(exported, tiny_config, tiny_checkpoint):
    run = tiny_checkpoint.parent.parent
    grid = ["--grid", "--timesteps", "21", "--protocol", "cached", "--output_dir", str(run)]
    linear.main(["--ckpt", str(tiny_checkpoint), *grid])
    save_model(tiny_config, 1, build_denoiser(tiny_config).net.state_dict())
    folder, printed = exported()
    assert "no probe of these weights" in printed
    assert "Not measured" in (folder / "README.md").read_text()


def test_what_is_no_earlier_export_is_not_replaced(exported, tmp_path, mistake):
    (tmp_path / "out").mkdir()
    readme = tmp_path / "out" / "README.md"
    readme.write_text("mine")
    with mistake("README.md: there already, and of no earlier export"):
        exported()
    (tmp_path / "out" / "config.json").write_text('{"model_type": "bert"}')
    with mistake("of something else than an export"):
        exported()
    assert readme.read_text() == "mine"


def test_the_card_says_where_the_run_began_and_how_it_distilled(exported, tiny_config):
    more = {
        "start_from": "there/weights",
        "n_step": 44,
        "distill": {"loss": "infonce", "weight": 0.25},
    }
    save_model(parse_config({**tiny_config.model_dump(), **more}), 1)
    card = (exported()[0] / "README.md").read_text()
    assert "| began with the weights of | there/weights, whose images come on top |" in card
    assert "| epochs | 2 |" in card
    assert "| distill.loss | infonce |" in card
    assert "| distill.weight | 0.25 |" in card
    assert "before the end" not in card
    save_model(parse_config({**tiny_config.model_dump(), **more, "n_step": 50}), 1)
    assert "saved 6 optimizer steps before the end" in (exported()[0] / "README.md").read_text()
