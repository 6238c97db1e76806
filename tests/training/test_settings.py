"""Settings that training refuses, or has something to say about."""

import pytest
from training_helpers import trainer

import train
from config import load_config, parse_config
from model.models import build_denoiser
from support.errors import UserError


@pytest.mark.parametrize(("options", "noted"), [
    (("--timesteps", "100"), True), (("--timesteps", "1000"), False),
    (("--timesteps", "100", "--set", "diffusion.schedule=cosine"), False),
    (("--timesteps", "100", "--set", "diffusion.betas=[1e-3,0.2]"), False),
])  # fmt: skip
def test_a_schedule_that_ends_before_the_noise_covers_the_image_is_noted(options, noted, caplog):
    config = load_config("config/digits.yaml", train.parse_args(list(options)).overrides)
    with caplog.at_level("WARNING"):
        train.note_what_is_left(build_denoiser(config))
    assert ("leaves 36 % of the image's variance" in caplog.text) == noted


def test_an_edm_that_ends_before_the_noise_covers_the_image_is_told_of_its_own_setting(caplog):
    config = load_config("config/EDM_ddpm.yaml", ["diffusion.sigma_max=5"])
    with caplog.at_level("WARNING"):
        train.note_what_is_left(build_denoiser(config))
    assert "raise diffusion.sigma_max" in caplog.text
    assert "betas" not in caplog.text


@pytest.mark.parametrize(("setting", "message"), [
    ("n_T=20000", r"too large to compute with .*lower n_T or betas"),
    ("betas=[1e-17,0.02]", "some noise levels are 0.*raise betas"),
])  # fmt: skip
def test_noise_that_is_too_large_or_too_small_for_floats_is_refused(setting, message):
    config = load_config("config/digits.yaml", [f"diffusion.{setting}"])
    with pytest.raises(UserError, match=message):
        build_denoiser(config)


@pytest.mark.parametrize("optim_args", [
    {"betas": [0.9]}, {"foreach": True}, {"momentum": 1}, {"eps": -1}, {"amsgrad": "no"},
    {"weight_decay": True},
])  # fmt: skip
def test_arguments_that_the_optimizer_refuses_are_a_mistake(tiny_config, optim_args):
    with pytest.raises(UserError, match="optim_args: "):
        trainer(
            parse_config({**tiny_config.model_dump(), "batch_size": 8, "optim_args": optim_args})
        )


@pytest.mark.parametrize("optim_args", [
    {"weight_decay": 0}, {"weight_decay": 1}, {"amsgrad": True, "betas": [0.9, 0.99]},
])  # fmt: skip
def test_arguments_that_the_optimizer_takes(tiny_config, optim_args):
    values = {**tiny_config.model_dump(), "batch_size": 8, "optim_args": optim_args}
    trainer(parse_config(values)).train_step()
