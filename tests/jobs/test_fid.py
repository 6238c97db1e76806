"""FID and KID: against closed forms, scipy, a direct double sum, and pytorch-fid itself."""

import dataclasses
import functools
import inspect
import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
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
import sample
from config import parse_config
from evaluation.fid import inception
from evaluation.fid.image_sets import export_images
from evaluation.fid.inception import WEIGHTS_URL, find_weights, inception_features, load_inception
from readers.download import compute_digest
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


def textures(n, size, seed, smooth):
    """Random images; `smooth` sets how much of each is one flat colour, so that sets differ."""
    r = rng(seed)
    noise = r.normal(size=(n, 3, size, size)) * 40
    flat = r.normal(size=(n, 3, 1, 1)) * 40
    return (128 + smooth * flat + (1 - smooth) * noise).clip(0, 255).astype(np.uint8)


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


@pytest.fixture
def web(random_weights, monkeypatch):
    """The folder of the random weights on loopback; they are downloaded from there."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=random_weights.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        url = f"http://127.0.0.1:{server.server_port}/{random_weights.name}"
        digest = compute_digest(random_weights, "sha256")
        archive = dataclasses.replace(inception.WEIGHTS, urls=(url,), digest=digest)
        monkeypatch.setattr(inception, "WEIGHTS", archive)
        yield url
        server.shutdown()


def test_the_weights_are_downloaded_once_and_checked(web, random_weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints" / random_weights.name
    place.parent.mkdir(parents=True)
    place.with_name(f"{place.name}.part").write_bytes(b"the beginning of another file")
    assert find_weights() == place
    assert place.read_bytes() == random_weights.read_bytes()
    assert [path.name for path in place.parent.iterdir()] == [place.name]
    written = place.stat().st_mtime_ns
    assert find_weights() == place
    assert place.stat().st_mtime_ns == written
    assert inception.WEIGHTS_URL == theirs.FID_WEIGHTS_URL


def test_missing_weights_say_where_to_get_them_and_where_to_put_them(
    web, experiment, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(
        inception, "WEIGHTS", dataclasses.replace(inception.WEIGHTS, digest="of another file")
    )
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    place = tmp_path / "empty" / "hub" / "checkpoints" / inception.WEIGHTS.name
    with pytest.raises(SystemExit) as stop:
        fid.main([*experiment, "--samples", str(tmp_path / "samples")])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    for part in ("sent another file", f"Get it from {web}", f"put it at {place}", "--inception"):
        assert part in message


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


# --- the job


@pytest.fixture
def no_resizing(monkeypatch):
    """Inception at 80x80, pytorch-fid's on images as they are: a tenth of the time of 299x299."""
    original = theirs.InceptionV3.__init__

    def init(self, output_blocks=(theirs.InceptionV3.DEFAULT_BLOCK_INDEX,)):
        original(self, output_blocks, resize_input=False)

    monkeypatch.setattr(theirs.InceptionV3, "__init__", init)
    monkeypatch.setattr(inception, "SIDE", 80)


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
    experiment, torch_home, tmp_path, capsys
):
    fid.main([*experiment, "--samples", str(tmp_path / "samples"), "--kid"])
    output, messages = capsys.readouterr()
    scores = json.loads((tmp_path / "fid_samples.json").read_text())
    assert "FID (4 images): " in output
    assert "all 6 of folder train" in output
    assert f"KID: {scores['kid']['mean']:.5f}" in output
    assert scores["fid"] > 1
    assert scores["kid"]["subset_size"] == 4
    assert scores["kid"]["seed"] == 0  # which draws its subsets
    assert "reference: 100%" in messages
    assert "every subset of KID has all 4 images" in messages

    exported = tmp_path / "out" / "pngs"
    fid.main([*experiment, "--export_reference", str(exported)])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pngs"]
    fid.main([*experiment, "--samples", str(exported)])
    messages = capsys.readouterr().err
    assert "samples: 100%" in messages
    assert "reference: " not in messages  # it came from the cache
    assert json.loads((tmp_path / "out" / "fid_out.json").read_text())["fid"] < 1e-3


def scores_in(folder: Path) -> dict[str, dict]:
    """{name: content} of the scores that are kept in a folder."""
    return {path.name: json.loads(path.read_text()) for path in folder.glob("fid*.json")}


def test_scores_of_different_settings_stand_side_by_side(
    experiment, torch_home, no_resizing, tmp_path, mistake
):
    for epoch in (3, 5):
        save_model(parse_config({**TINY, "save_dir": str(tmp_path / "run")}), epoch)
    settings = [
        ("3", "--steps", "2"), ("3", "--steps", "3", "--eta", "1"),
        ("5", "--steps", "2", "--seed", "5", "--output_dir", str(tmp_path / "out")),
    ]  # fmt: skip
    for n, (epoch, *rest) in enumerate(settings, start=2):
        fid.main([*experiment, "--n", str(n), "--epoch", epoch, *rest])
    found, out = scores_in(tmp_path / "run"), scores_in(tmp_path / "out")
    assert sorted(found) == [
        "fid_ep3_ddim_steps2_eta0.0_n2.json", "fid_ep3_ddim_steps3_eta1.0_n3.json",
    ]  # fmt: skip
    assert [scores["steps"] for _, scores in sorted(found.items())] == [2, 3]
    assert [scores["seed"] for scores in found.values()] == [0, 0]
    with mistake("seed: 7, not 5"):
        fid.main([*experiment, "--n", "4", "--epoch", *settings[-1], "--seed", "7"])
    assert list(out) == ["fid_ep5_ddim_steps2_eta0.0_n4.json"]
    assert out["fid_ep5_ddim_steps2_eta0.0_n4.json"]["seed"] == 5


def test_what_the_job_draws_scores_as_the_set_that_sample_draws(
    experiment, torch_home, no_resizing, tmp_path
):
    save_model(parse_config({**TINY, "save_dir": str(tmp_path / "run")}), 3)
    drawn = ["--n", "3", "--steps", "2", "--seed", "5"]
    fid.main([*experiment, *drawn, "--batch_size", "2"])
    sample.main([*experiment, *drawn])
    (folder,) = (tmp_path / "run").glob("EMAgenerated*")
    fid.main([*experiment, "--samples", str(folder / "pngs")])
    fid.main([*experiment, "--samples", str(folder / "pngs"), "--output_dir", str(tmp_path)])
    (ours,) = scores_in(tmp_path / "run").values()
    assert (ours["epoch"], ours["steps"], ours["seed"], ours["images"]) == (3, 2, 5, 3)
    name = "fid_ep3_ddim_steps2_eta0.0.json"
    for where in (folder, tmp_path):
        assert list(scores_in(where)) == [name]
        assert scores_in(where)[name]["fid"] == pytest.approx(ours["fid"], rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to score"), (["--n", "1"], "at least 2"),
        (["--n", "9", "--samples", "x"], "exclude"),
        (["--samples", "x", "--epoch", "3"], "--samples and --epoch exclude each other"),
        (["--samples", "nowhere"], "nowhere"),
        (["--samples", "x", "--steps", "9", "--no_clip"], "leave out --steps, --no_clip"),
        (["--export_reference", "x", "--eta", "1"], "nothing is drawn: leave out --eta"),
        (["--samples", "x", "--compile"], "--samples and --compile exclude each other"),
        (["--n", "4"], "no model_<epoch>.pth"), (["--n", "4", "--batch_size", "0"], "at least 1"),
    ],
)  # fmt: skip
def test_mistakes_end_with_code_2(experiment, arguments, message, mistake):
    with mistake(message):
        fid.main([*experiment, *arguments])


# 2,060 images on either side are passed through Inception twice by each of the two programs.
@pytest.mark.slow
def test_agrees_with_pytorch_fid_on_the_same_pngs(torch_home, no_resizing, tmp_path):
    """What `python -m pytorch_fid A B` computes, on more images than there are features."""
    side = inception.SIDE  # 80; Inception needs 75
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
    ours = json.loads((tmp_path / "fid_samples.json").read_text())["fid"]
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
