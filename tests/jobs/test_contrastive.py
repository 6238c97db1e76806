"""Alignment and uniformity against closed forms and scikit-learn; contrastive.py on digits."""

import json

import numpy as np
import pytest
import torch
from conftest import save_model
from PIL import Image
from scipy.special import hyp0f1
from sklearn.metrics.pairwise import paired_distances, pairwise_distances
from sklearn.preprocessing import normalize

import contrastive
from datasets import read_dataset
from evaluation.alignment import alignment, measure, on_sphere, uniformity
from evaluation.plots import curve_panels
from evaluation.probe.features import Extractor, network_source
from model.models import build_denoiser
from utils import derive_seed, seed_everything

CPU = torch.device("cpu")


def directions(n: int, width: int, name: str) -> torch.Tensor:
    """n independent uniform points of the sphere in `width` dimensions."""
    draw = torch.Generator().manual_seed(derive_seed(name))
    return on_sphere(torch.randn(n, width, generator=draw).numpy(), CPU)


# --- the metrics


def test_alignment_of_identical_opposite_and_independent_views():
    x, y = directions(4000, 16, "x"), directions(4000, 16, "y")
    assert alignment(x, x) == 0
    assert alignment(x, -x) == pytest.approx(4)
    # |x - y|^2 = 2 - 2 cos, of mean 2 and variance 4 / 16
    assert alignment(x, y) == pytest.approx(2, abs=5 * np.sqrt(4 / 16 / 4000))


def test_uniformity_of_one_point_and_of_two_poles():
    x = directions(1, 8, "x")
    assert uniformity(x.repeat(1500, 1)) == pytest.approx(0, abs=1e-12)
    assert uniformity(torch.cat([x, -x])) == pytest.approx(-8)  # |x - (-x)|^2 = 4


@pytest.mark.parametrize("width", [2, 3, 32, 512])
def test_uniformity_of_uniform_points_is_the_closed_form(width):
    # E exp(k cos) = 0F1(; d/2; k^2 / 4) on the sphere, and -2 |x - y|^2 = 4 cos - 4
    expected = np.log(hyp0f1(width / 2, 4.0)) - 4
    assert uniformity(directions(3000, width, "points")) == pytest.approx(expected, abs=0.01)


def test_both_equal_scikit_learn_over_several_chunks_of_rows(monkeypatch):
    monkeypatch.setattr("evaluation.alignment.ROWS", 7)
    rng = np.random.default_rng(0)
    a, b = (rng.normal(0.5, 1, (40, 5)).astype(np.float32) for _ in range(2))
    x, y = (normalize(v.astype(np.float64)) for v in (a, b))
    squared = pairwise_distances(x)[np.triu_indices(40, k=1)] ** 2
    assert uniformity(on_sphere(a, CPU)) == pytest.approx(np.log(np.exp(-2 * squared).mean()))
    aligned = (paired_distances(x, y) ** 2).mean()
    assert alignment(on_sphere(a, CPU), on_sphere(b, CPU)) == pytest.approx(aligned)


def test_the_length_of_a_feature_does_not_count():
    a = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    scaled = a * np.linspace(0.1, 90, 50, dtype=np.float32)[:, None]
    assert uniformity(on_sphere(scaled, CPU)) == pytest.approx(uniformity(on_sphere(a, CPU)))


# --- of a network


@pytest.fixture
def source(tiny_config):
    seed_everything("contrastive")
    return network_source(build_denoiser(tiny_config).eval(), "weights", use_amp=False)


@pytest.fixture
def images(tiny_config):
    return contrastive.some_images(read_dataset(tiny_config, "data", "test"), 100, seed=0)


def test_the_two_views_are_the_extractors_features_at_two_seeds(source, images):
    values = measure(source, images, 500, ["out_2"], CPU, seed=3, batch_size=64)
    seeds = [derive_seed(3, "view", view) for view in (0, 1)]
    x, y = (
        normalize(Extractor(source, CPU, seed)(images, [500], ["out_2"])[500, "out_2"])
        for seed in seeds
    )
    expected = (paired_distances(x, y) ** 2).mean()
    assert expected > 1e-4
    assert values["alignment"]["out_2"] == pytest.approx(expected, rel=1e-4)


def test_neither_depends_on_the_batch_size(source, images):
    one, other = (
        measure(source, images, 300, source.block_names, CPU, 0, size) for size in (7, 512)
    )
    for metric in ("alignment", "uniformity"):
        assert other[metric] == pytest.approx(one[metric], rel=1e-4, abs=1e-9)


def test_more_noise_pulls_the_views_apart(source, images):
    little, much = (
        measure(source, images, t, ["out_1"], CPU, 0, 512)["alignment"]["out_1"] for t in (1, 600)
    )
    assert 0 < 10 * little < much


# --- the job


@pytest.fixture
def save_epoch(tiny_config):
    """Writes model_<epoch>.pth with weights of their own."""

    def save(epoch: int, name: str = "first"):
        seed_everything(name, epoch)
        return save_model(tiny_config, epoch)

    return save


@pytest.fixture
def run(tiny_yaml, tmp_path, monkeypatch):
    """Calls the job on 40 images; returns its record and the blocks of each measurement made."""

    def call(*argv, config=True):
        made = []

        def counted(source, dataset, t, blocks, *more):
            made.append(list(blocks))
            return measure(source, dataset, t, blocks, *more)

        monkeypatch.setattr(contrastive, "measure", counted)
        start = ["--config", str(tiny_yaml)] if config else []
        contrastive.main([*start, "--device", "cpu", "--n", "40", *argv])
        return json.loads((tmp_path / "run" / "contrastive.json").read_text()), made

    return call


def test_table_file_and_figure_of_a_run(run, save_epoch, tmp_path, capsys):
    for epoch in (0, 1, 2):
        save_epoch(epoch)
    record, made = run("--epoch_interval", "2")
    assert [row["epoch"] for row in record["measurements"]] == [0, 2]
    assert len(made) == 2
    row = record["measurements"][1]
    assert (row["t"], row["split"], row["n_images"]) == (21, "test", 40)
    assert list(row["alignment"]) == ["out_1", "out_2", "out_3", "out_4"]
    assert all(0 < value < 4 for value in row["alignment"].values())
    assert all(-8 <= value < 0 for value in row["uniformity"].values())
    printed = capsys.readouterr().out
    assert f"{row['uniformity']['out_3']:.5f}" in printed
    assert f"{row['alignment']['out_4']:.5f}" in printed
    assert Image.open(tmp_path / "run" / "contrastive.png").width > 1500


def test_only_what_is_new_is_computed(run, save_epoch):
    save_epoch(0)
    first, made = run("--blocks", "out_2")
    assert made == [["out_2"]]
    save_epoch(1)
    _, made = run("--blocks", "out_2,out_4")
    assert made == [["out_4"], ["out_2", "out_4"]]
    record, made = run("--blocks", "out_2,out_4")
    assert made == []
    kept = record["measurements"][0]
    assert kept["alignment"]["out_2"] == first["measurements"][0]["alignment"]["out_2"]
    _, made = run("--blocks", "out_2", "--timestep", "30")
    assert len(made) == 2
    save_epoch(1, "trained anew")
    record, made = run("--blocks", "out_2")
    assert made == [["out_2"]]
    assert len(record["measurements"]) == 5


def test_what_another_process_measured_meanwhile_stays(run, save_epoch, monkeypatch, tmp_path):
    save_epoch(0)
    run("--blocks", "out_2")
    path = tmp_path / "run" / "contrastive.json"
    other = json.loads(path.read_text())["measurements"][0] | {"seed": 99}

    def meanwhile(*args):
        rows = json.loads(path.read_text())["measurements"]
        path.write_text(json.dumps({"measurements": [*rows, other]}))
        return compute(*args)

    compute = Extractor._compute
    monkeypatch.setattr(Extractor, "_compute", meanwhile)
    record, _ = run("--blocks", "out_4")
    seeds = [row["seed"] for row in record["measurements"]]
    assert set(seeds) == {0, 99}
    assert {*record["measurements"][seeds.index(0)]["alignment"]} == {"out_2", "out_4"}


def test_an_interrupted_run_goes_on(run, save_epoch, monkeypatch):
    for epoch in (0, 1):
        save_epoch(epoch)
    compute = Extractor._compute
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:  # in the second view of the second checkpoint
            raise KeyboardInterrupt
        return compute(*args)

    monkeypatch.setattr(Extractor, "_compute", interrupted)
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 130
    record, made = run()
    assert len(made) == 1
    assert [row["epoch"] for row in record["measurements"]] == [0, 1]


def test_a_checkpoint_alone(run, save_epoch):
    save_epoch(0)
    path = save_epoch(3)
    record, _ = run("--ckpt", str(path), "--split", "train", config=False)
    assert [(row["epoch"], row["split"]) for row in record["measurements"]] == [(3, "train")]
    by_epoch, made = run("--epoch", "3", "--split", "train")
    assert made == []
    assert by_epoch["measurements"] == record["measurements"]


@pytest.mark.parametrize(("saved", "interval", "expected"), [
    ([], 1, []),
    ([7], 3, [7]),
    ([0, 1, 2, 3], 1, [0, 1, 2, 3]),
    ([9, 19, 29, 39, 49, 59], 20, [9, 29, 49, 59]),
    ([9, 19, 29], 100, [9, 29]),
    ([*range(0, 2000, 100), 1999], 400, [0, 400, 800, 1200, 1600, 1999]),
])  # fmt: skip
def test_the_interval_chooses_epochs(saved, interval, expected):
    assert contrastive.at_interval(saved, interval) == expected


def test_some_images_keep_their_order_and_labels(tiny_config):
    dataset = read_dataset(tiny_config, "data", "test")
    chosen = contrastive.some_images(dataset, 50, seed=1)
    place = {image.tobytes(): i for i, image in enumerate(dataset.images)}
    places = [place[image.tobytes()] for image in chosen.images]
    assert places == sorted(set(places))
    assert (chosen.labels == dataset.labels[places]).all()
    assert contrastive.some_images(dataset, None, 0) is dataset


@pytest.mark.parametrize(("argv", "message"), [
    (["--n", "1"], "at least 2"),
    (["--epoch_interval", "0"], "--epoch_interval"),
    (["--epoch", "0", "--epoch_interval", "5"], "--epoch and --epoch_interval exclude"),
    (["--ckpt", "a.pth", "--epoch_interval", "5"], "--ckpt and --epoch_interval exclude"),
    (["--timestep", "1001"], "timestep 1001: outside 1..1000"),
    (["--blocks", "out_1,out_9"], "no block 'out_9'"),
    (["--epoch", "7"], "model_7.pth: no such checkpoint. There are: model_0.pth"),
])  # fmt: skip
def test_mistakes(run, save_epoch, argv, message, mistake, tmp_path):
    save_epoch(0)
    with mistake(message):
        run(*argv)
    assert not (tmp_path / "run" / "contrastive.json").exists()


@pytest.mark.parametrize(("text", "message"), [
    ('{"measurem', "contrastive.json: not valid JSON; delete it"),
    ('{"measurements": [{"epoch": 0}]}', "contrastive.json: not what this program writes there"),
])  # fmt: skip
def test_a_damaged_file_is_named(run, save_epoch, tmp_path, mistake, text, message):
    save_epoch(0)
    (tmp_path / "run" / "contrastive.json").write_text(text)
    with mistake(message):
        run()


def test_panels_stand_side_by_side(tmp_path):
    path = tmp_path / "panels.png"
    lines = {"a": [1.0, 2.0], "b": [2.0, 1.0]}
    curve_panels(path, [0, 1], {"one": lines, "two": lines, "three": lines}, "title", "epoch")
    width, height = Image.open(path).size
    assert width > 3 * height / 1.3
