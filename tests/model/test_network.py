"""The network and the DDPM process against the numbers of the reference implementation."""

import numpy as np
import pytest
import torch
from conftest import reference_weight, standard_normal

from config import load_config, parse_config
from config.schema import DDPMDiffusion, Network
from model.DDPM import DDPM, linear_alphas_cumprod
from model.models import build_denoiser
from model.unet import UNet

NETWORKS = ["ddpm_tiny", "ddpm", "ddpmpp"]


def reference_net(reference, name):
    facts = reference[0][name]
    net = UNet(Network(**facts["network"])).eval()
    shapes = facts["state_dict"]
    net.load_state_dict({key: reference_weight(key, shape) for key, shape in shapes.items()})
    return net, facts


@pytest.mark.parametrize("name", NETWORKS)
def test_output_and_features_equal_the_reference(reference, name):
    net, facts = reference_net(reference, name)
    values = reference[1]
    x = torch.from_numpy(standard_normal("x", (2, 3, 32, 32)))
    augment = torch.from_numpy(standard_normal("aug", (2, 9))) if name == "ddpmpp" else None
    c_noise = torch.tensor(facts["time_input"])
    with torch.no_grad():
        output = net(x, c_noise, augment)
        features = net(x, c_noise, augment, blocks=net.block_names)
    np.testing.assert_allclose(output, values[f"{name}/output"], rtol=1e-4, atol=1e-5)
    assert list(features) == list(facts["blocks"])
    for block, feature in features.items():
        np.testing.assert_allclose(feature, values[f"{name}/{block}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_parameter_count(reference, name):
    net, facts = reference_net(reference, name)
    assert sum(p.numel() for p in net.parameters()) == facts["params"]


def test_the_main_experiment_has_5_880_899_parameters():
    denoiser = build_denoiser(load_config("config/DDPM_ddpm.yaml"))
    assert sum(p.numel() for p in denoiser.parameters()) == 5_880_899


def test_alphas_cumprod_equal_the_reference(reference):
    values = reference[1]
    abar = linear_alphas_cumprod(DDPMDiffusion())
    at = values["ddpm_tiny/alphabar_at"] - 1
    np.testing.assert_allclose(abar[at], values["ddpm_tiny/alphabar"], rtol=1e-4)


def test_loss_per_image_equals_the_reference(reference):
    net, _ = reference_net(reference, "ddpm_tiny")
    denoiser = DDPM(net, DDPMDiffusion()).eval()
    values = reference[1]
    image = torch.from_numpy(standard_normal("image", (4, 3, 32, 32)))
    noise = torch.from_numpy(standard_normal("noise", (4, 3, 32, 32)))
    sigma = denoiser.sigma(torch.from_numpy(values["ddpm_tiny/loss_t"]))
    with torch.no_grad():
        loss = denoiser.loss(2 * image.sigmoid() - 1, sigma, noise)
    np.testing.assert_allclose(loss, values["ddpm_tiny/loss_per_image"], rtol=1e-4)


def test_only_the_layers_that_a_block_needs_are_computed(tiny_config):
    net = build_denoiser(tiny_config).net.eval()
    x, c_noise = torch.randn(2, 1, 8, 8), torch.rand(2)
    calls = []
    for name, layer in net.named_children():
        layer.register_forward_hook(lambda *_, name=name: calls.append(name))
    for i, layer in enumerate(net.up):
        layer.register_forward_hook(lambda *_, i=i: calls.append(f"up.{i}"))
    features = net(x, c_noise, blocks=["out_2", "out_2"])
    assert list(features) == ["out_2"]
    assert features["out_2"].shape == (2, 64)
    assert "up.1" in calls
    assert not {"up.2", "norm", "final"} & set(calls)


def test_attention_heads_do_not_mix(tiny_config):
    """With two heads, half of the channels of the attended value come from each."""
    shape = {**tiny_config.network.model_dump(), "attn_channels_per_head": 32}
    net = build_denoiser(parse_config({**tiny_config.model_dump(), "network": shape})).net
    attention = net.middle.attn
    assert attention.n_heads == 2
    x = torch.randn(1, 64, 4, 4)
    attention.output.weight.data.copy_(torch.eye(64))
    before = attention(x)
    attention.projection.weight.data[96:] = 0  # q, k and v of the second head
    changed = (attention(x) - before).abs().amax(dim=(0, 2, 3)) > 1e-6
    assert not changed[:32].any()
    assert changed[32:].all()
