"""--input_scale: other projects' networks, fed with the range that they were trained on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from foreign_helpers import CPU, SINGLE, features, weights_of, write_foreign, write_ours

import checkpoint
import linear
from config import parse_config
from datasets import to_model_range
from model.input_scale import INPUT_SCALES, RescaledDenoiser
from model.models import build_denoiser
from model.samplers import SAMPLERS, SPACINGS
from support.errors import UserError
from utils import setup_logging

EDM_TINY = {**TINY, "model_type": "EDM", "diffusion": {"S_min": 0.01, "S_max": 1, "S_noise": 1.007}}


@pytest.fixture(params=[TINY, EDM_TINY], ids=["DDPM", "EDM"])
def trained(request):
    """A denoiser of z0 = 2 x0 - 1, in eval mode."""
    config = parse_config(request.param)
    denoiser = build_denoiser(config).eval().requires_grad_(False)
    denoiser.net.load_state_dict(weights_of(config))
    return denoiser


def test_rescaled_features_are_those_of_the_trained_range(trained):
    rescaled = RescaledDenoiser(trained, *INPUT_SCALES["tiny-ddae"])
    x0 = 2 * torch.rand(3, 1, 8, 8) - 1
    noise = torch.randn(3, 1, 8, 8)
    for t in trained.probe_timesteps:
        ours = rescaled.features(x0, t, noise, ["out_1", "out_4"])
        theirs = trained.features(2 * x0 - 1, t, noise, ["out_1", "out_4"])
        for block, values in theirs.items():
            torch.testing.assert_close(ours[block], values)


def test_what_the_public_tiny_ddae_computes_from_an_image():
    """Its steps: ToTensor, Normalize(0.5, 0.5), 2 x - 1, then DDPM's noise at t = 11 of 1000."""
    config = parse_config(TINY)
    trained = build_denoiser(config).eval().requires_grad_(False)
    rescaled = RescaledDenoiser(trained, *INPUT_SCALES["tiny-ddae"])
    pixels = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    noise = torch.randn(3, 1, 8, 8)
    theirs = 2 * ((pixels / 255 - 0.5) / 0.5) - 1
    assert -3 <= theirs.min() < -1
    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[10].float()
    noisy = abar.sqrt() * theirs + (1 - abar).sqrt() * noise
    expected = trained.net(noisy, torch.full((3,), 11 / 1000), blocks=["out_2"])
    ours = rescaled.features(to_model_range(pixels), 11, noise, ["out_2"])
    torch.testing.assert_close(ours["out_2"], expected["out_2"], rtol=1e-4, atol=1e-5)


def test_rescaled_loss_and_denoised_image(trained):
    rescaled = RescaledDenoiser(trained, *INPUT_SCALES["tiny-ddae"])
    x0 = 2 * torch.rand(3, 1, 8, 8) - 1
    noise = torch.randn(3, 1, 8, 8)
    sigma_z = trained.sigma(torch.tensor([2, 9, trained.n_T]))
    z = 2 * x0 - 1 + sigma_z.view(-1, 1, 1, 1) * noise
    denoised = rescaled((z + 1) / 2, sigma_z / 2)
    torch.testing.assert_close(2 * denoised - 1, trained(z, sigma_z), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        rescaled.loss(x0, sigma_z / 2, noise), trained.loss(2 * x0 - 1, sigma_z, noise),
        rtol=1e-3, atol=1e-5,
    )  # fmt: skip
    torch.testing.assert_close(rescaled.t(sigma_z / 2), torch.tensor([2.0, 9, trained.n_T]))


def test_a_sampler_draws_the_same_images_in_either_coordinate(trained):
    rescaled = RescaledDenoiser(trained, *INPUT_SCALES["tiny-ddae"])
    steps = 5
    z = 80 * torch.randn(2, 1, 8, 8, dtype=torch.float64)
    draws = torch.randn(steps, 2, 1, 8, 8, dtype=torch.float64)
    images = []
    for denoiser, start in ((trained, z), (rescaled, (z + 1) / 2)):
        row = SAMPLERS[denoiser.default_sampler]
        sigmas = SPACINGS[denoiser.default_spacing](denoiser, steps, denoiser.sigma_range[1])
        noise = iter(draws)
        churn = denoiser.churn if row.takes_churn else {}
        images.append(row.run(denoiser, start, sigmas, lambda it=noise: next(it), eta=0.7, **churn))
    torch.testing.assert_close(2 * images[1] - 1, images[0], rtol=1e-3, atol=1e-3)


def test_input_scale_in_a_job(tiny_yaml, tiny_config, tmp_path, capsys):
    path = write_foreign(tmp_path / "model_59.pth", tiny_config, SINGLE)
    plain = features(tiny_yaml, path)
    setup_logging()  # to the standard error that capsys reads
    scaled = features(tiny_yaml, path, "--input_scale", "tiny-ddae")  # not those kept on disk
    assert "fed with the inputs of --input_scale tiny-ddae, in [-3, 1]" in capsys.readouterr().err
    assert np.abs(plain - scaled).max() > 1e-3
    again = features(tiny_yaml, path)
    np.testing.assert_array_equal(again, plain)


def test_input_scale_at_every_epoch(tiny_yaml, tiny_config, capsys):
    run = Path(tiny_config.save_dir)
    write_foreign(run / "ckpts" / "model_3.pth", tiny_config, SINGLE)
    config, cell = ("--config", str(tiny_yaml), "--device", "cpu"), ("--timestep", "21")
    scale = ("--input_scale", "tiny-ddae")
    linear.main([*config, *cell, *scale, "--protocol", "cached", "--blockname", "out_2"])
    one = json.loads((run / "linear_out_2_t21_ep3_cached.json").read_text())
    linear.main([*config, *cell, *scale, "--protocol", "cached", "--epochs", "all"])
    assert one["input_scale"] == "tiny-ddae"
    (path,) = run.glob("linear_*epochs*.json")
    assert one["fingerprint"] in path.read_text()


def test_input_scale_is_for_foreign_checkpoints(tiny_config, tmp_path):
    path = write_ours(tmp_path / "model_59.pth", tiny_config)
    with pytest.raises(UserError, match=r"was trained here, on \[-1, 1\]"):
        checkpoint.load_denoiser(path, CPU, tiny_config, input_scale="tiny-ddae")
