"""FID and KID: against closed forms, scipy, a direct double sum, and pytorch-fid itself."""

import errno
import inspect
import json
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import yaml
from conftest import save_model
from pytorch_fid import fid_score
from pytorch_fid import inception as theirs

import fid
from config import parse_config
from evaluation.fid.frechet import (
    Gaussian,
    fit_gaussian,
    frechet_distance,
    kernel_distance,
    reference_statistics,
    score_name,
)
from evaluation.fid.image_sets import export_images
from evaluation.fid.inception import WEIGHTS_URL, find_weights, inception_features, load_inception
from support.errors import UserError

CPU = torch.device("cpu")
TINY = {
    "dataset": "folder",
    "classes": 2,
    "diffusion": {"n_T": 10},
    "network": {
        "image_shape": [3, 8, 8], "n_channels": 32, "ch_mults": [1], "is_attn": [False],
    },
}  # fmt: skip


def rng(seed=0):
    return np.random.default_rng(seed)


def random_spd(d, seed):
    a = rng(seed).normal(size=(d, 2 * d))
    return a @ a.T / (2 * d)


def textures(n, size, seed, smooth):
    """Random images; `smooth` sets how much of each is one flat colour, so that sets differ."""
    r = rng(seed)
    noise = r.normal(size=(n, 3, size, size)) * 40
    flat = r.normal(size=(n, 3, 1, 1)) * 40
    return (128 + smooth * flat + (1 - smooth) * noise).clip(0, 255).astype(np.uint8)


# --- the distances


def test_frechet_of_commuting_gaussians_is_the_closed_form():
    basis = np.linalg.qr(rng().normal(size=(40, 40)))[0]
    a, b = rng(1).uniform(0.1, 3, 40), rng(2).uniform(0.1, 3, 40)
    mu_a, mu_b = rng(3).normal(size=(2, 40))
    expected = ((mu_a - mu_b) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    ours = frechet_distance(
        Gaussian(mu_a, basis * a @ basis.T, 1), Gaussian(mu_b, basis * b @ basis.T, 1)
    )
    assert ours == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_frechet_matches_scipy_sqrtm(seed):
    s, t = random_spd(30, seed), random_spd(30, seed + 10)
    mu = rng(seed).normal(size=30)
    root = np.asarray(scipy.linalg.sqrtm(s @ t)).real
    expected = mu @ mu + np.trace(s + t - 2 * root)
    ours = frechet_distance(Gaussian(mu, s, 1), Gaussian(np.zeros(30), t, 1))
    assert ours == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [20, 400])
def test_a_set_is_at_distance_0_from_itself_also_when_rank_deficient(n):
    gaussian = fit_gaussian(rng().normal(size=(n, 100)).astype(np.float32))
    assert frechet_distance(gaussian, gaussian) == pytest.approx(0, abs=1e-5)


def test_statistics_equal_numpy_over_several_chunks(monkeypatch):
    monkeypatch.setattr("evaluation.fid.frechet.CHUNK", 7)
    features = (rng().normal(size=(50, 5)) + 1000).astype(np.float32)
    gaussian = fit_gaussian(features)
    assert gaussian.n == 50
    np.testing.assert_allclose(gaussian.mean, features.astype(np.float64).mean(0), rtol=1e-13)
    np.testing.assert_allclose(gaussian.covariance, np.cov(features.T.astype(float)), rtol=1e-9)
    with pytest.raises(ValueError, match="at least 2"):
        fit_gaussian(features[:1])


def test_kid_of_whole_sets_is_the_double_sum():
    x, y = rng(1).normal(size=(2, 6, 4))
    y = y + 0.5

    def k(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / 4 + 1) ** 3

    n = 6
    expected = sum(
        (k(x[i], x[j]) + k(y[i], y[j])) / (n * (n - 1))
        for i in range(n) for j in range(n) if i != j
    ) - 2 * sum(k(x[i], y[j]) for i in range(n) for j in range(n)) / n**2  # fmt: skip
    kid = kernel_distance(x, y, subsets=3)
    assert kid.subset_size == 6
    assert kid.mean == pytest.approx(expected, rel=1e-10)
    assert kid.std == pytest.approx(0, abs=1e-10)


def test_kid_is_near_0_for_one_distribution_and_not_for_two():
    x, y = rng(1).normal(size=(2, 2000, 16))
    same = kernel_distance(x, y, subsets=40, subset_size=200)
    other = kernel_distance(x, y + 0.3, subsets=40, subset_size=200)
    assert abs(same.mean) < 0.005 < 0.05 < other.mean
    assert kernel_distance(x, y, subsets=40, subset_size=200) == same
    assert kernel_distance(x, y, seed=1, subsets=40, subset_size=200) != same


@pytest.mark.parametrize(
    ("n", "name"),
    [(5000, "FID-5k"), (10_000, "FID-10k"), (50_000, "FID"), (256, "FID (256 images)"),
     (5001, "FID (5,001 images)")],
)  # fmt: skip
def test_score_name(n, name):
    assert score_name(n) == name


# --- Inception and its weights


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory):
    """Random Inception weights where torch.hub keeps the real ones: the new TORCH_HOME.

    He initialisation keeps the activations' scale through the layers; the last block's gain makes
    scores as large as usual ones, so that an agreement to 1e-3 means something.
    """
    home = tmp_path_factory.mktemp("torch_home")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
        net = theirs.fid_inception_v3()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    for module in net.Mixed_7c.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(module.weight, 5)
    place = home / "hub" / "checkpoints" / Path(WEIGHTS_URL).name
    place.parent.mkdir(parents=True)
    torch.save(net.state_dict(), place)
    return place


@pytest.fixture
def torch_home(random_weights, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(random_weights.parents[2]))
    return random_weights


def test_features_equal_those_of_pytorch_fid_on_pngs(torch_home, tmp_path):
    images = textures(7, 12, seed=0, smooth=0.5)
    export_images(images, tmp_path / "pngs")
    model = load_inception(find_weights(), CPU)
    ours = inception_features(model, images, batch_size=3)
    files = sorted((tmp_path / "pngs").iterdir())
    expected = fid_score.get_activations(files, theirs.InceptionV3(), 7, num_workers=0)
    assert ours.std(axis=0).mean() > 0.01
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    gray = inception_features(model, images[:2, :1])
    np.testing.assert_allclose(
        gray, inception_features(model, images[:2, :1].repeat(3, axis=1)), rtol=1e-5, atol=1e-5
    )


def test_missing_weights_say_where_to_get_them_and_where_to_put_them(
    experiment, tmp_path, monkeypatch, capsys
):
    def no_network(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    with pytest.raises(SystemExit) as exit_:
        fid.main([*experiment, "--samples", str(tmp_path / "samples")])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    place = tmp_path / "empty" / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    for part in ("no route to host", WEIGHTS_URL, str(place), "--inception"):
        assert part in message
    assert "Traceback" not in message


class RunsCode:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize("content", ["garbage", "truncated", "foreign", "list", "code"])
def test_bad_weights_are_named_and_run_nothing(random_weights, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    if content == "garbage":
        path.write_bytes(b"<html>404</html>" * 100)
    elif content == "truncated":
        path.write_bytes(random_weights.read_bytes()[:1_000_000])
    else:
        other = {"foreign": {"fc.weight": torch.zeros(2)}, "list": [1, 2], "code": RunsCode()}
        torch.save(other[content], path)
    with pytest.raises(UserError, match=r"weights\.pth") as error:
        load_inception(path, CPU)
    assert WEIGHTS_URL in str(error.value)
    assert not Path("ran").exists()


def test_a_named_file_of_weights_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        find_weights(tmp_path / "nothing.pth")


# --- the reference's statistics


def test_the_reference_is_computed_once_and_again_when_damaged(tmp_path):
    features = rng().normal(size=(5, 2048)).astype(np.float32)
    calls = []

    def compute():
        calls.append(1)
        return features

    def get(kid=False):
        return reference_statistics(tmp_path / ".fid" / "set-1.5", compute, kid)

    first, none = get()
    again, _ = get()
    assert len(calls) == 1
    assert none is None
    np.testing.assert_array_equal(first.covariance, again.covariance)
    with np.load(tmp_path / ".fid" / "set-1.5.npz") as kept:
        assert {"mu", "sigma"} <= set(kept)  # what pytorch-fid reads
    for _ in range(2):
        _, kept = get(kid=True)
        np.testing.assert_array_equal(kept, features)
    assert len(calls) == 2
    statistics = tmp_path / ".fid" / "set-1.5.npz"
    statistics.write_bytes(statistics.read_bytes()[:5000])
    np.testing.assert_array_equal(get()[0].mean, first.mean)
    assert len(calls) == 3
    assert not list(tmp_path.glob("**/*.tmp"))


def test_a_full_disk_costs_the_cache_and_not_the_score(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("support.files.os.replace", full)
    features = rng().normal(size=(5, 8)).astype(np.float32)
    gaussian, kept = reference_statistics(tmp_path / "set", lambda: features, True)
    np.testing.assert_allclose(gaussian.mean, features.mean(axis=0), rtol=1e-5, atol=1e-6)
    assert kept is features
    assert list(tmp_path.iterdir()) == []


# --- the job


@pytest.fixture
def experiment(tmp_path):
    """A folder dataset of 2 x 3 training images, 4 samples, and the arguments that name them."""
    for split in ("train", "test"):
        for i, name in enumerate("ab"):
            export_images(textures(3, 8, i, 0.8), tmp_path / "data" / "folder" / split / name)
    export_images(textures(4, 8, 9, 0.2), tmp_path / "samples")
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump({**TINY, "save_dir": str(tmp_path / "run")}))
    data_dir = str(tmp_path / "data")
    return ["--config", str(config), "--data_dir", data_dir, "--device", "cpu"]


def test_the_job_scores_a_folder_and_the_training_set_itself(
    experiment, torch_home, tmp_path, capsys, monkeypatch
):
    fid.main([*experiment, "--samples", str(tmp_path / "samples"), "--kid"])
    output = capsys.readouterr().out
    scores = json.loads((tmp_path / "fid.json").read_text())
    assert "FID (4 images): " in output
    assert "all 6 of folder train" in output
    assert f"KID: {scores['kid']['mean']:.5f}" in output
    assert scores["fid"] > 1
    assert scores["kid"]["subset_size"] == 4

    exported = tmp_path / "out" / "pngs"
    fid.main([*experiment, "--export_reference", str(exported)])
    assert not (tmp_path / "out" / "fid.json").exists()
    seen = []
    monkeypatch.setattr(
        fid, "inception_features", lambda *args: seen.append(args[3]) or inception_features(*args)
    )
    fid.main([*experiment, "--samples", str(exported)])
    assert seen == ["samples"]  # the reference came from the cache
    assert json.loads((tmp_path / "out" / "fid.json").read_text())["fid"] < 1e-3


def test_the_job_draws_samples_itself(experiment, torch_home, tmp_path, monkeypatch):
    save_model(parse_config({**TINY, "save_dir": str(tmp_path / "run")}), 3)
    drawn = []
    monkeypatch.setattr(
        fid, "inception_features", lambda *args: drawn.append(args[1]) or inception_features(*args)
    )
    fid.main([*experiment, "--n", "3", "--steps", "2", "--batch_size", "2", "--seed", "5"])
    scores = json.loads((tmp_path / "run" / "fid.json").read_text())
    assert (scores["epoch"], scores["steps"], scores["seed"], scores["images"]) == (3, 2, 5, 3)
    fid.main([*experiment, "--n", "3", "--steps", "2", "--batch_size", "3", "--seed", "5"])
    *_, first, second = (images for images in drawn if len(images) == 3)
    assert first.std() > 0
    assert np.abs(first.astype(int) - second).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to score"), (["--n", "1"], "at least 2"),
        (["--n", "9", "--samples", "x"], "exclude"),
        (["--samples", "x", "--epoch", "3"], "--samples and --epoch exclude each other"),
        (["--samples", "nowhere"], "nowhere"),
        (["--samples", "x", "--steps", "9", "--no_clip"], "leave out --steps, --no_clip"),
        (["--n", "4"], "no model_<epoch>.pth"), (["--n", "4", "--batch_size", "0"], "at least 1"),
    ],
)  # fmt: skip
def test_mistakes_end_with_code_2(experiment, arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        fid.main([*experiment, *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


# 2,060 images on either side are passed through Inception twice by each of the two programs.
@pytest.fixture
def no_resizing(monkeypatch):
    """Inception on images as they are, not enlarged to 299x299: a tenth of the time."""
    original = theirs.InceptionV3.__init__

    def init(self, output_blocks=(theirs.InceptionV3.DEFAULT_BLOCK_INDEX,)):
        original(self, output_blocks, resize_input=False)

    monkeypatch.setattr(theirs.InceptionV3, "__init__", init)


@pytest.mark.slow
def test_agrees_with_pytorch_fid_on_the_same_pngs(torch_home, no_resizing, tmp_path):
    """What `python -m pytorch_fid A B` computes, on more images than there are features."""
    side = 80  # Inception needs 75
    sets = {"a": textures(1030, side, 1, 0.8), "b": textures(1030, side, 2, 0.7)}
    for name, images in sets.items():
        export_images(images, tmp_path / "data" / "folder" / "train" / name)
        export_images(images[:1], tmp_path / "data" / "folder" / "test" / name)
    export_images(textures(2060, side, 3, 0.5), tmp_path / "samples")
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(experiment_of(side)))
    arguments = ["--config", str(config), "--data_dir", str(tmp_path / "data"), "--device", "cpu"]
    samples, exported = tmp_path / "samples", tmp_path / "exported"
    fid.main([*arguments, "--samples", str(samples), "--export_reference", str(exported)])
    ours = json.loads((tmp_path / "fid.json").read_text())["fid"]
    assert ours > 1
    assert ours == pytest.approx(score_by_pytorch_fid(samples, exported), abs=1e-3)


def experiment_of(side: int) -> dict:
    network = {**TINY["network"], "image_shape": [3, side, side]}
    return {**TINY, "network": network}


def score_by_pytorch_fid(a: Path, b: Path) -> float:
    if "disp" in inspect.signature(scipy.linalg.sqrtm).parameters:
        return fid_score.calculate_fid_given_paths([str(a), str(b)], 50, CPU, 2048, num_workers=0)
    # pytorch-fid 0.3 cannot run with SciPy 1.18: its features, and its formula once more.
    gaussians = []
    for folder in (a, b):
        files = sorted(folder.iterdir())
        features = fid_score.get_activations(files, theirs.InceptionV3(), num_workers=0)
        gaussians.append((features.mean(axis=0), np.cov(features, rowvar=False)))
    (mu, s), (nu, t) = gaussians
    root = np.asarray(scipy.linalg.sqrtm(s @ t)).real
    return (mu - nu) @ (mu - nu) + np.trace(s + t - 2 * root)
