"""--ckpt with a folder of diffusers, through every job that reads a model."""

import fnmatch
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers_folders import SIZE, diffusers, save_dit, save_unet

import checkpoint
import contrastive
import export
import finetune
import linear
import noisy_classifier
import sample
import visualize_features
from evaluation.samples.grids import load_png
from evaluation.samples.sample_sets import png
from sampling import draw_all, sampler_settings
from support.files import read_json

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {"unet": save_unet(root / "unet"), "dit": save_dit(root / "dit")}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("kind", "blocks"), [("unet", 4), ("dit", 3)])
def test_probing(folders, kind, blocks, tmp_path):
    """A grid, its best cell's picture, alignment, and heads on noisy images."""
    model = ["--ckpt", str(folders[kind]), "--dataset", "digits"]
    linear.main([*model, "--grid", "--protocol", "knn", "--timesteps", "1"])
    folder = tmp_path / f"output_{kind}_digits"
    grid = read_json(folder / "linear_grid_ep-1_knn.json")
    assert {cell["block"] for cell in grid["cells"]} == {
        f"{'out' if kind == 'unet' else 'block'}_{i}" for i in range(1, blocks + 1)
    }
    assert grid["config"]["net_type"] == "diffusers"
    assert grid["headline"]["test_accuracy"] > 0.2  # random features of digits tell some
    visualize_features.main([*model, "--n", "30"])
    assert list(folder.glob("tsne_ep-1_t1_*.png"))
    block = grid["headline"]["block"]
    contrastive.main([*model, "--blocks", block, "--timestep", "1", "--n", "20"])
    assert (folder / "contrastive.json").exists()
    short = ["--epochs", "1", "--n_test", "20", "--n_train", "50", "--batch_size", "50"]
    noisy_classifier.main([*model, "--backbone", "ddae", "--blockname", block, *short])
    record = read_json(folder / "noisy_DDPM_ddae.json")
    assert record["diffusion"]["n_T"] == 40


def test_noise_levels_of_another_process(folders, tmp_path):
    noisy_classifier.main([
        "--ckpt", str(folders["unet"]), "--dataset", "digits", "--backbone", "ddae",
        "--mode", "EDM", "--epochs", "1", "--n_test", "20", "--n_train", "50",
        "--batch_size", "50",
    ])  # fmt: skip
    levels = read_json(tmp_path / "output_unet_digits" / "noisy_EDM_ddae.json")["levels"]
    assert levels[-1]["sigma"] == pytest.approx(80)


def test_heads_of_the_paper_see_latents(folders, tmp_path):
    linear.main([
        "--ckpt", str(folders["dit"]), "--dataset", "digits", "--blockname", "block_1",
        "--timestep", "1", "--set", "linear.n_epoch=1",
    ])  # fmt: skip
    assert (tmp_path / "output_dit_digits" / "linear_block_1_t1_ep-1.json").exists()


def test_sampling_needs_no_dataset_and_decodes(folders, tmp_path):
    options = ["--ckpt", str(folders["dit"]), "--n", "3", "--steps", "4", "--guidance", "2"]
    sample.main([*options, "--show_intermediate", "--output_dir", "set"])
    images = torch.stack([load_png(png(tmp_path / "set", i)) for i in range(3)])
    assert images.shape == (3, 3, SIZE, SIZE)
    model = checkpoint.load_denoiser(folders["dit"])
    settings = sampler_settings(model.denoiser, steps=4, guidance=2.0)
    assert not settings.clip  # latents have no bounds
    drawn = draw_all(model, settings, 3, use_amp=False, batch_size=2)
    assert np.array_equal(drawn, images.numpy())


def test_neighbours_of_samples_of_another_size(folders, tmp_path):
    sample.main([
        "--ckpt", str(folders["dit"]), "--dataset", "digits", "--n", "2", "--steps", "2",
        "--neighbours", "--output_dir", "set", "--set", "linear.timestep=1",
        "--set", "linear.blockname=block_2",
    ])  # fmt: skip
    found = json.loads((tmp_path / "set" / "neighbours.json").read_text())
    assert np.array(found["pixels"]["indices"]).shape == (2, 4)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_the_same_network_untrained(folders, kind, tmp_path):
    """Another draw of its weights, by the seed; the VAE, which makes the images, stays."""
    trained = checkpoint.load_denoiser(folders[kind])
    config = trained.config
    one, again = (checkpoint.untrained(config, CPU, folders[kind]) for _ in range(2))
    assert one.fingerprint() == again.fingerprint() != trained.fingerprint()
    kept, renewed = (model.denoiser.net.state_dict() for model in (trained, one))
    assert kept.keys() == renewed.keys()
    same = {name for name in kept if torch.equal(kept[name], renewed[name])}
    assert {name for name in kept if name.startswith("codec.")} <= same
    weights = {name for name, w in kept.items() if name.startswith("network.") and w.ndim > 1}
    assert weights
    assert not weights & same
    grid = ["--dataset", "digits", "--grid", "--protocol", "knn", "--timesteps", "1"]
    for more in (["--baseline", "random"], []):
        linear.main(["--ckpt", str(folders[kind]), *grid, *more])
    table = (tmp_path / f"output_{kind}_digits" / "linear_grid_ep-1_knn.md").read_text()
    assert "| cell | trained | untrained | gain |" in table


def test_fine_tuning(folders, tmp_path):
    finetune.main([
        "--ckpt", str(folders["dit"]), "--dataset", "digits", "--blockname", "block_1",
        "--timestep", "1", "--epochs", "1", "--warm_epochs", "0", "--n_train", "50",
        "--batch_size", "50",
    ])  # fmt: skip
    found = read_json(tmp_path / "output_dit_digits" / "finetune_block_1_t1_n50.json")
    network = checkpoint.load_denoiser(folders["dit"]).denoiser.net.network
    whole = sum(p.numel() for p in network.parameters())
    assert 0 < found["parameters_trained"] < whole


@pytest.mark.parametrize(("job", "options", "words"), [
    (linear, ["--grid"], "which dataset? The model does not say: add --dataset"),
    (linear, ["--dataset", "digits"], "no block 'out_2': there are block_1, block_2, block_3"),
    (linear, ["--dataset", "digits", "--set", "diffusion.n_T=10"], "diffusion.n_T: 10, not 40"),
    (sample, ["--input_scale", "tiny-ddae"], "--input_scale tiny-ddae"),
    (export, [], "diffusers wrote it, and its folder is what can be shared"),
    (sample, ["--config", "config/DiT_XL_2_256.yaml"], "network.image_shape: (4, 32, 32), not"),
])  # fmt: skip
def test_mistakes(folders, mistake, monkeypatch, job, options, words):
    if "--config" in options:
        monkeypatch.chdir(ROOT)
    with mistake(words):
        job.main(["--ckpt", str(folders["dit"]), *options])


# --- the Hub


class Hub:
    """huggingface_hub.snapshot_download of a folder: copies what is asked for."""

    def __init__(self, source, cache):
        self.source, self.cache, self.fetched = source, cache, []

    def snapshot_download(self, name, allow_patterns):
        for path in self.source.rglob("*"):
            place = path.relative_to(self.source)
            if path.is_file() and any(fnmatch.fnmatch(place, p) for p in allow_patterns):
                (self.cache / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.cache / place)
                self.fetched.append(str(place))
        return str(self.cache)


@pytest.mark.parametrize("safe", [True, False])
def test_a_pipeline_of_the_hub(tmp_path, monkeypatch, safe):
    """Those of the Hub's weights that are read are fetched: of one kind, of one precision."""
    save_unet(tmp_path / "source", safe=safe)
    (tmp_path / "source" / "unet" / "diffusion_pytorch_model.fp16.bin").write_text("not read")
    hub = Hub(tmp_path / "source", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    model = checkpoint.load_denoiser("hf:google/ddpm-tiny", CPU)
    weights = {name for name in hub.fetched if not name.endswith(".json")}
    assert weights == {f"unet/diffusion_pytorch_model.{'safetensors' if safe else 'bin'}"}
    assert model.config.save_dir == "output_ddpm-tiny"
    assert str(model.path) == "hf:google/ddpm-tiny"
    assert model.fingerprint() == checkpoint.load_denoiser(tmp_path / "source").fingerprint()


@pytest.mark.parametrize(("file", "known", "unknown", "message"), [
    ("model_index.json", "UNet2DModel", "UNet2DConditionModel",
     "its unet UNet2DConditionModel is not read here"),
    ("scheduler/scheduler_config.json", '"epsilon"', '"flow_prediction"',
     "prediction_type flow_prediction is not read here"),
])  # fmt: skip
def test_what_is_not_read_is_refused_before_its_weights_are_fetched(
    tmp_path, monkeypatch, mistake, file, known, unknown, message
):
    save_unet(tmp_path / "source")
    path = tmp_path / "source" / file
    assert known in path.read_text()
    path.write_text(path.read_text().replace(known, unknown))
    hub = Hub(tmp_path / "source", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    with mistake(message):
        sample.main(["--ckpt", "hf:runwayml/stable-diffusion"])
    assert all(name.endswith(".json") for name in hub.fetched)


def test_all_files_in_one_folder(folders, tmp_path):
    """The layout of google/ddpm-cifar10-32."""
    flat = tmp_path / "flat"
    shutil.copytree(folders["unet"], flat)
    for part in ("unet", "scheduler"):
        for file in (flat / part).iterdir():
            file.rename(flat / file.name)
        (flat / part).rmdir()
    of_flat, of_parts = (checkpoint.load_denoiser(f) for f in (flat, folders["unet"]))
    assert of_flat.fingerprint() == of_parts.fingerprint()
    assert diffusers.DiffusionPipeline.from_pretrained(flat)  # theirs takes it too
