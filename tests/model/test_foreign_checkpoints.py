"""Checkpoints and YAML files of FutureXiang/ddae and the public tiny-ddae in our jobs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, reference_weight, standard_normal
from foreign_helpers import CPU, DDP, SINGLE, features, weights_of, write_foreign, write_ours
from PIL import Image

import checkpoint
import linear
import sample
import visualize_features
from config import load_config, parse_config
from model.models import build_denoiser
from support.errors import UserError


def call(job, tiny_yaml, path, *more) -> None:
    job.main(["--config", str(tiny_yaml), "--ckpt", str(path), "--device", "cpu", *map(str, more)])


@pytest.mark.parametrize("prefix", [SINGLE, DDP], ids=["single", "ddp"])
def test_every_job_gives_what_it_gives_for_our_own(tiny_yaml, tiny_config, tmp_path, prefix):
    foreign = write_foreign(tmp_path / "theirs" / "model_59.pth", tiny_config, prefix)
    ours = write_ours(tmp_path / "ours" / "model_59.pth", tiny_config)
    expected = features(tiny_yaml, ours)
    np.testing.assert_array_equal(features(tiny_yaml, foreign), expected)
    pictures = []
    for path in (foreign, ours):
        call(sample, tiny_yaml, path, "--steps", 3, "--n", 2, "--output_dir", path.parent)
        pictures.append([np.array(Image.open(path.parent / f"pngs/{i}.png")) for i in range(2)])
        facts = json.loads((path.parent / "samples.json").read_text())
        assert (facts["epoch"], facts["input_scale"]) == (59, None)
    np.testing.assert_array_equal(*pictures)


def test_the_probe_and_the_picture(tiny_yaml, tiny_config, tmp_path):
    path = write_foreign(tmp_path / "model_59.pth", tiny_config, DDP)
    expected = features(tiny_yaml, write_ours(tmp_path / "ours.pth", tiny_config))
    cell = ("--timestep", 21, "--blockname", "out_2", "--output_dir", tmp_path)
    npz = tmp_path / "features.npz"
    call(linear, tiny_yaml, path, *cell, "--protocol", "cached", "--save_features", npz)
    with np.load(npz) as arrays:
        np.testing.assert_array_equal(arrays["test_t21_out_2"], expected)
    assert json.loads((tmp_path / "linear_out_2_t21_ep59_cached.json").read_text())["epoch"] == 59
    call(visualize_features, tiny_yaml, path, *cell, "--n", 10)
    assert (tmp_path / "tsne_ep59_t21_out_2.png").exists()


def test_in_a_run_folder_it_is_found_by_its_epoch(tiny_yaml, tiny_config):
    write_foreign(Path(tiny_config.save_dir) / "ckpts" / "model_7.pth", tiny_config, DDP)
    argv = ["--config", str(tiny_yaml), "--device", "cpu", "--steps", "2", "--n", "1"]
    sample.main(argv)
    folder = Path(tiny_config.save_dir) / "EMAgenerated_ep7_ddim_steps2_eta0.0"
    assert (folder / "pngs" / "0.png").exists()


def test_the_reference_s_names_and_values(reference, tmp_path):
    """The names come from the reference's state dict, the values from its forward pass."""
    facts, values = reference[0]["ddpm_tiny"], reference[1]
    config = parse_config({"network": facts["network"]})
    state = {f"nn_model.{k}": reference_weight(k, s) for k, s in facts["state_dict"].items()}
    path = tmp_path / "model_1999.pth"
    torch.save(
        {
            "MODEL": {f"module.{name}": 0 * value for name, value in state.items()},
            "EMA": {
                "initted": torch.tensor(True),
                "step": torch.tensor(9),
                **{f"ema_model.{name}": value for name, value in state.items()},
                **{f"online_model.{name}": 0 * value for name, value in state.items()},
            },
            "opt": {},
        },
        path,
    )
    model = checkpoint.load_denoiser(path, CPU, config)
    assert model.epoch == 1999
    x = torch.from_numpy(standard_normal("x", (2, 3, 32, 32)))
    blocks = model.denoiser.block_names
    with torch.no_grad():
        out = model.denoiser.net(x, torch.tensor(facts["time_input"]), blocks=blocks)
    for block in blocks:
        np.testing.assert_allclose(out[block], values[f"ddpm_tiny/{block}"], rtol=1e-4, atol=1e-5)


# --- what is said


@pytest.mark.parametrize(("prefix", "parts", "says"), [
    (DDP, ("MODEL", "EMA", "opt"), None),
    (SINGLE, ("MODEL", "EMA", "opt"), "has the layout of the public tiny-ddae"),
    (DDP, ("EMA",), "has no MODEL to tell if it is of the public tiny-ddae"),
])  # fmt: skip
def test_says_what_it_was_probably_trained_on(
    tiny_yaml, tiny_config, tmp_path, capsys, prefix, parts, says
):
    path = write_foreign(tmp_path / "model_59.pth", tiny_config, prefix, parts)
    call(sample, tiny_yaml, path, "--steps", 1, "--n", 1)
    said = capsys.readouterr().err
    assert ("[-3, 1]" in said) == (says is not None)
    assert says is None or (says in said and "--input_scale tiny-ddae" in said)


def test_raw_weights_are_read_where_there_are_no_others(tiny_yaml, tiny_config, tmp_path, capsys):
    path = write_foreign(tmp_path / "last.pth", tiny_config, DDP, ("MODEL",))
    call(sample, tiny_yaml, path, "--steps", 1, "--n", 1)
    said = capsys.readouterr().err
    assert "no EMA" in said
    assert "called epoch -1" in said
    model = checkpoint.load_denoiser(path, CPU, tiny_config)
    expected = weights_of(tiny_config, ".raw")
    for name, value in model.denoiser.net.state_dict().items():
        assert torch.equal(value, expected[name])


@pytest.mark.parametrize("job", [linear, sample, visualize_features])
def test_without_a_config(job, tiny_config, tmp_path, capsys):
    path = write_foreign(tmp_path / "model_59.pth", tiny_config, SINGLE)
    more = ["--timestep", "1", "--blockname", "out_1"] if job is visualize_features else []
    with pytest.raises(SystemExit, match="2"):
        job.main(["--ckpt", str(path), "--device", "cpu", *more])
    message = capsys.readouterr().err
    assert "model_59.pth" in message
    assert "add --config" in message


@pytest.mark.parametrize(("change", "names"), [
    ({"n_channels": 64}, "its image_proj.weight is [32, 1, 3, 3], this network's [64, 1, 3, 3]"),
    ({"is_attn": [False, True]}, "it has no down.2.attn.norm.weight"),
    ({"n_blocks": 2}, "down.1"),
    ({"ch_mults": [1, 1]}, "down.2.res.conv1.weight"),
])  # fmt: skip
def test_another_config(tiny_config, tmp_path, change, names):
    path = write_foreign(tmp_path / "model_59.pth", tiny_config, DDP)
    other = parse_config({**TINY, "network": {**TINY["network"], **change}})
    with pytest.raises(UserError) as error:
        checkpoint.load_denoiser(path, CPU, other)
    assert names in str(error.value)
    assert "give the --config that it was trained with" in str(error.value)


def test_a_weight_too_many(tiny_config, tmp_path):
    path = write_foreign(tmp_path / "model_59.pth", tiny_config, DDP)
    state = torch.load(path)
    state["EMA"]["ema_model.nn_model.time_emb.aug_emb.weight"] = torch.zeros(32, 9)
    torch.save(state, path)
    with pytest.raises(UserError, match=r"it has time_emb\.aug_emb\.weight, which this network"):
        checkpoint.load_denoiser(path, CPU, tiny_config)


def test_no_network_inside(tiny_config, tmp_path):
    path = tmp_path / "model_59.pth"
    torch.save({"MODEL": {"fc.weight": torch.zeros(3)}, "opt": {}}, path)
    with pytest.raises(UserError, match="neither its EMA nor its MODEL"):
        checkpoint.load_denoiser(path, CPU, tiny_config)


def test_names_that_are_no_strings(tiny_config, tmp_path):
    path = tmp_path / "model_59.pth"
    torch.save({"MODEL": {7: torch.zeros(2)}, "EMA": {True: torch.zeros(2)}}, path)
    with pytest.raises(UserError, match="neither its EMA nor its MODEL has weights"):
        checkpoint.load_denoiser(path, CPU, tiny_config)


def test_training_does_not_start_from_one(tiny_config, tmp_path):
    path = write_foreign(tmp_path / "model_59.pth", tiny_config, DDP)
    with pytest.raises(UserError, match="training cannot start from it"):
        checkpoint.load(path)


# --- YAML files: the keys and the forms of values of either project

TINY_DDAE_YAML = """
dataset: 'cifar'
classes: 10
model_type: 'DDPM'
net_type: 'UNet'
diffusion: {n_T: 1000, betas: [1.0e-4, 0.02]}
network: {image_shape: [3, 32, 32], n_channels: 64, ch_mults: [1, 2, 2, 2],
  is_attn: [False, False, False, False], dropout: 0.1, n_blocks: 1, use_res_for_updown: False}
n_epoch: 60
batch_size: 64
lrate: 1.0e-4
warm_epoch: 13
load_epoch: -1
flip: True
ema: 0.9999
n_sample: 30
save_dir: '/content/drive/MyDrive/ddae_output'
save_model: True
linear: {n_epoch: 15, batch_size: 128, lrate: 1.0e-3, timestep: 11, blockname: 'out_6'}
"""

DDAE_YAML = """
dataset: 'tiny'
classes: 200
model_type: 'EDM'
net_type: 'UNet'
diffusion: {sigma_data: 0.5, p_mean: -1.2, p_std: 1.2, sigma_min: 0.002, sigma_max: 80, rho: 7,
  S_min: 0.01, S_max: 1, S_noise: 1.007, augment_prob: 0.12}
network: {image_shape: [3, 64, 64], n_channels: 128, ch_mults: [2, 2, 2],
  is_attn: [False, True, False], attn_channels_per_head: 64, dropout: 0.13, n_blocks: 4,
  use_res_for_updown: True, augment_dim: 9}
n_epoch: 4000
batch_size: 64
lrate: 1.0e-4
warm_epoch: 200
load_epoch: -1
flip: True
ema: 0.9993
optim: 'AdamW'
optim_args: {betas: [0.9, 0.99], weight_decay: 0.01}
n_sample: 30
save_dir: './output_EDM_ddpmpp_aug'
save_model: True
linear: {n_epoch: 15, batch_size: 128, lrate: 1.0e-3, timestep: 4, blockname: 'out_7'}
"""


@pytest.mark.parametrize(("text", "parameters"), [
    (TINY_DDAE_YAML, 5_880_899), (DDAE_YAML, 56_525_443),
], ids=["tiny-ddae", "ddae"])  # fmt: skip
def test_their_yaml_files_load_as_they_are(tmp_path, text, parameters):
    path = tmp_path / "theirs.yaml"
    path.write_text(text)
    with torch.device("meta"):
        denoiser = build_denoiser(load_config(path))
    assert sum(p.numel() for p in denoiser.parameters()) == parameters
