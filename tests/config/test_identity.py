"""What decides a model: its fingerprint, and which configs begin with the same one."""

from pathlib import Path

import pytest
import torch

import checkpoint
from config import parse_config
from config.identity import same_untrained
from model.models import build_denoiser

CPU = torch.device("cpu")


def test_fingerprint_follows_the_weights(tiny_checkpoint):
    state = checkpoint.load(tiny_checkpoint)
    before = checkpoint.load_denoiser(tiny_checkpoint, CPU).fingerprint()
    assert checkpoint.load_denoiser(tiny_checkpoint, CPU).fingerprint() == before
    state["ema"]["final.bias"] += 1
    checkpoint.save(tiny_checkpoint, state)
    assert checkpoint.load_denoiser(tiny_checkpoint, CPU).fingerprint() != before


@pytest.mark.parametrize(("settings", "same"), [
    ({}, True), ({"diffusion": {"time": "lognormal", "p_mean": -2.0}}, True),
    ({"lrate": 1.0}, True), ({"network": {"dropout": 0.5}}, True),
    ({"diffusion": {"schedule": "cosine"}}, False), ({"diffusion": {"n_T": 100}}, False),
    ({"diffusion": {"objective": "v"}}, False),
    ({"network": {"attn_channels_per_head": 8}}, False), ({"model_type": "EDM"}, False),
])  # fmt: skip
def test_fingerprint_follows_what_decides_the_outputs_of_given_weights(tiny_config, settings, same):
    values = tiny_config.model_dump(exclude={"model_type", "diffusion"})
    values = {key: value for key, value in values.items() if key not in settings} | {
        key: {**values.get(key, {}), **value} if isinstance(value, dict) else value
        for key, value in settings.items()
    }
    weights = build_denoiser(tiny_config).net.state_dict()
    other = build_denoiser(parse_config(values))
    other.net.load_state_dict(weights)
    model = checkpoint.TrainedModel(other, parse_config(values), 1, Path())
    assert (model.fingerprint() == checkpoint.fingerprint(weights)) == same
    assert same_untrained(tiny_config.model_dump(), model.config.model_dump()) == same


@pytest.mark.parametrize(("changed", "same"), [
    ({"cond_drop_prob": 0.1}, False), ({"network": {"zero_init": True}}, False),
    ({"network": {"dropout": 0.5}}, True), ({"ema": 0.5}, True), ({"classes": 3}, True),
])  # fmt: skip
def test_configs_that_begin_with_the_same_weights_are_told_from_others(tiny_config, changed, same):
    values = tiny_config.model_dump()
    other = parse_config(
        values | {k: values[k] | v if k == "network" else v for k, v in changed.items()}
    )
    first, second = (checkpoint.untrained(c, CPU).fingerprint() for c in (tiny_config, other))
    assert (first == second) == same
    assert same_untrained(values, other.model_dump()) == same


def test_self_conditioning_begins_as_its_plain_twin(tiny_config):
    values = tiny_config.model_dump()
    other = parse_config(values | {"network": values["network"] | {"self_condition": "out_2"}})
    assert same_untrained(values, other.model_dump())
    x, noise = torch.rand(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    first, second = (
        checkpoint.untrained(c, CPU).denoiser.features(x, 21, noise, ["out_4"])["out_4"]
        for c in (tiny_config, other)
    )
    assert torch.equal(first, second)
