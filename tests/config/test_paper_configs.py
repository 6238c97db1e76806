"""config/paper: the five experiments of Xiang et al. 2023, with global batch and lr."""

import pytest
import torch
import yaml
from conftest import ROOT

from config import load_config
from model.models import build_denoiser

DDPM_NET, DDPMPP_NET = 35_746_307, 56_524_291
AUGMENT = 9 * 128  # the labels' linear, into the sinusoids of a network of 128 channels

# name: parameters, GPUs of the paper, batch per GPU, epochs, probed cell
EXPERIMENTS = {
    "DDPM_ddpm": (DDPM_NET, 4, 128, 2000, (11, "out_6")),
    "DDPM_ddpmpp": (DDPMPP_NET, 4, 64, 2000, (11, "out_6")),
    "EDM_ddpm": (DDPM_NET, 4, 128, 2000, (4, "out_7")),
    "EDM_ddpmpp": (DDPMPP_NET, 4, 64, 2000, (4, "out_7")),
    "EDM_ddpmpp_aug": (DDPMPP_NET + AUGMENT, 8, 64, 4000, (4, "out_7")),
}


def test_all_five_are_there():
    assert {path.stem for path in ROOT.glob("config/paper/*.yaml")} == set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_parameters_and_recipe(name):
    parameters, gpus, batch, epochs, cell = EXPERIMENTS[name]
    path = ROOT / "config" / "paper" / f"{name}.yaml"
    config = load_config(path)
    with torch.device("meta"):
        denoiser = build_denoiser(config)
    assert sum(p.numel() for p in denoiser.parameters()) == parameters
    assert f"{parameters:,} parameters" in path.read_text()
    assert config.batch_size == gpus * batch
    assert config.lrate == pytest.approx(gpus * 1e-4)
    assert config.n_epoch == epochs
    assert (config.linear.timestep, config.linear.blockname) == cell
    assert cell[1] in denoiser.block_names
    assert (config.linear.batch_size, config.linear.lrate) == (4 * 128, 4e-3)  # on 4 GPUs
    assert (config.warm_epoch, config.ema, config.network.dropout) == (
        (13, 0.9999, 0.1) if name.startswith("DDPM") else (200, 0.9993, 0.13)
    )


def test_the_dit_is_probed_in_the_cell_of_the_papers_code():
    linear = load_config(ROOT / "config" / "DiT_XL_2_256.yaml").linear
    assert (linear.timestep, linear.blockname, linear.n_epoch) == (121 + 1, "block_14", 30)


def test_the_example_for_ones_own_images_shows_every_setting_and_explains_every_line():
    text = (ROOT / "config" / "folder.yaml").read_text()
    shown, known = yaml.safe_load(text), load_config(ROOT / "config" / "folder.yaml").model_dump()
    assert shown.keys() == known.keys()
    for section in ("diffusion", "network", "distill", "linear"):
        assert shown[section].keys() == known[section].keys()
    bare = [line for line in text.splitlines() if line and "#" not in line]
    assert all(line.endswith(":") for line in bare), bare
