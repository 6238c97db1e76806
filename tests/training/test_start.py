"""`start_from`: a run that begins with the weights of another."""

import pytest
import torch
from conftest import save_model
from training_helpers import trainer

import checkpoint
import train
from config import parse_config
from support.errors import UserError
from training.start import starting_weights


@pytest.fixture
def begun(tiny_config, tmp_path):
    """(config with start_from, the weights there)."""
    torch.manual_seed(3)
    path = save_model(tiny_config, 5, path=tmp_path / "start.pth")
    config = parse_config({**tiny_config.model_dump(), "start_from": str(path), "batch_size": 8})
    return config, checkpoint.load(path)["ema"]


def changed(config, **settings):
    """`config` with values of its sections replaced, as {section: {key: value}}."""
    values = config.model_dump()
    return parse_config({**values, **{k: {**values[k], **v} for k, v in settings.items()}})


def test_a_run_begins_with_the_weights_at_step_0_and_goes_on_without_them(
    begun, tiny_yaml, tmp_path
):
    config, weights = begun
    arguments = ["--config", str(tiny_yaml), "--device", "cpu", "--sample_every", "9"]
    arguments += ["--set", f"start_from={config.start_from}"]
    still = ["--set", "n_step=1", "--lr", "1e-30"]  # weights that move by nothing
    assert train.main([*arguments, *still]) == 0
    state = checkpoint.load(tmp_path / "run" / "ckpts" / "latest.pth")
    assert state["step"] == 1
    for part in ("net", "ema"):
        assert all(torch.allclose(state[part][name], w, 0, 1e-20) for name, w in weights.items())
    (tmp_path / "start.pth").unlink()
    assert train.main([*arguments, *still, "--set", "n_step=2"]) == 0


def test_what_only_training_knows_may_differ_and_self_conditioning_begins_at_0(begun):
    config, weights = begun
    ours = changed(
        config, network={"dropout": 0.3, "zero_init": True, "self_condition": "out_1"},
        diffusion={"time": "lognormal", "weighting": "min_snr"},
    )  # fmt: skip
    given = starting_weights(ours)
    assert given.keys() == weights.keys()

    plain, guided = trainer(config), trainer(ours)
    plain.begin_with_weights(weights)
    guided.begin_with_weights(given)
    x, c_noise = torch.randn(2, *config.network.image_shape), torch.tensor([0.1, 0.7])
    for a, b in ((plain.denoiser, guided.denoiser), (plain.ema_denoiser, guided.ema_denoiser)):
        assert torch.equal(a.eval().net(x, c_noise), b.eval().net(x, c_noise))


@pytest.mark.parametrize(("section", "key", "value"), [
    ("network", "n_channels", 64), ("diffusion", "objective", "v"), ("diffusion", "n_T", 50),
])  # fmt: skip
def test_weights_of_another_network_or_process_are_refused(begun, section, key, value):
    config, _ = begun
    with pytest.raises(UserError, match=rf"{section}\.{key}: {value}, not .*(\n.*)*start_from"):
        starting_weights(changed(config, **{section: {key: value}}))


def test_self_conditioning_that_was_trained_is_not_left_out(begun, tmp_path):
    config, _ = begun
    guided = changed(config, network={"self_condition": "out_1"})
    path = save_model(guided, 5, path=tmp_path / "guided.pth")
    plain = parse_config({**config.model_dump(), "start_from": str(path)})
    with pytest.raises(UserError, match=r"network\.self_condition: None, not out_1"):
        starting_weights(plain)
