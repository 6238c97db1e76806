"""Self-conditioning: a plain network at first, then one whose later blocks get what a block saw."""

import numpy as np
import pytest
import torch
from conftest import reference_weight, save_model, standard_normal

import linear
import sample
from checkpoint import load_denoiser
from config import load_config, parse_config
from config.schema import Network
from model.models import build_denoiser
from model.unet import UNet
from support.errors import UserError
from utils import seed_everything

SETTINGS = [{}, {"model_type": "EDM"}, {"cond_drop_prob": 0.1}]


def denoisers(config, block, gate=False, **changes):
    """The plain denoiser and the self-conditioned one, of one seed.

    64 channels: with 32, a group of a norm is one channel, from which it takes the embedding away.
    """
    values = {**config.model_dump(exclude={"diffusion", "model_type"}), **changes}
    plain = parse_config({**values, "network": {**values["network"], "n_channels": 64}})
    network = {**plain.network.model_dump(), "self_condition": block, "self_condition_gate": gate}
    built = []
    for one in (plain, parse_config({**values, "network": network})):
        seed_everything("twins")
        built.append(build_denoiser(one).eval())
    return built


def learned(denoiser):
    """`denoiser` after its conditioning has learned something."""
    seed_everything("learned")
    for parameter in denoiser.net.conditioning.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return denoiser


def inputs(denoiser):
    seed_everything("inputs")
    sigma = torch.tensor([0.1, 0.5, 3.0, 20.0])
    y = torch.tensor([0, 1, -1, 9]) if denoiser.classes else None
    return torch.randn(4, 1, 8, 8), sigma, y


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("changes", SETTINGS)
def test_it_begins_as_its_plain_twin_bit_for_bit(tiny_config, changes, gate):
    plain, guided = denoisers(tiny_config, "out_2", gate, **changes)
    weights, theirs = plain.net.state_dict(), guided.net.state_dict()
    added = {"projection", "norm"} | ({"gate"} if gate else set())
    assert {key.split(".")[1] for key in theirs.keys() - weights.keys()} == added
    assert all(torch.equal(theirs[key], value) for key, value in weights.items())
    assert torch.equal(plain(*inputs(plain)), guided(*inputs(guided)))


@pytest.mark.parametrize("name", ["ddpm_tiny", "ddpm", "ddpmpp"])
def test_at_first_the_output_is_that_of_the_reference(reference, name):
    facts, values = reference[0][name], reference[1]
    names = [f"out_{i}" for i in range(1, len(facts["blocks"]))]
    weights = {key: reference_weight(key, shape) for key, shape in facts["state_dict"].items()}
    x = torch.from_numpy(standard_normal("x", (2, 3, 32, 32)))
    augment = torch.from_numpy(standard_normal("aug", (2, 9))) if name == "ddpmpp" else None
    for block in names[:: max(len(names) // 2, 1)]:
        net = UNet(Network(**facts["network"], self_condition=block)).eval()
        missing, unexpected = net.load_state_dict(weights, strict=False)
        assert not unexpected
        assert all(key.startswith("conditioning.") for key in missing)
        with torch.no_grad():
            output = net(x, torch.tensor(facts["time_input"]), augment)
        np.testing.assert_allclose(output, values[f"{name}/output"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("block", ["out_1", "out_2", "out_3"])
@pytest.mark.parametrize("changes", SETTINGS)
def test_later_blocks_get_the_equation_and_earlier_ones_the_plain_embedding(
    tiny_config, changes, block, gate
):
    """The plain twin, with the embedding of all layers after `block` written by hand."""
    plain, guided = denoisers(tiny_config, block, gate, **changes)
    learned(guided)
    w = {key: value.numpy() for key, value in guided.net.conditioning.state_dict().items()}
    k = plain.block_names.index(block)
    layers = list(plain.net.up)
    at = [i for i, layer in enumerate(layers) if type(layer).__name__ == "Block"][k]
    seen = {}

    def see(layer, given, h):
        emb, mean = given[1].numpy(), h.mean(dim=(2, 3)).numpy()
        z = (mean - mean.mean(1, keepdims=True)) / np.sqrt(mean.var(1, keepdims=True) + 1e-5)
        z = (z * w["norm.weight"] + w["norm.bias"]) @ w["projection.weight"].T
        z = z + w["projection.bias"]
        if gate:
            z = z * (1 + (emb / (1 + np.exp(-emb))) @ w["gate.1.weight"].T + w["gate.1.bias"])
        seen["emb"] = torch.from_numpy(emb + z)

    layers[at].register_forward_hook(see)
    for layer in layers[at + 1 :]:
        layer.register_forward_pre_hook(lambda _, given: (given[0], seen["emb"]))
    with torch.no_grad():
        expected, output = plain(*inputs(plain)), guided(*inputs(guided))
        untouched = denoisers(tiny_config, block, gate, **changes)[0](*inputs(plain))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert (output - untouched).abs().max() > 0.1


def test_features_up_to_the_block_are_those_of_the_twin_and_need_nothing_above(tiny_config):
    plain, guided = denoisers(tiny_config, "out_2")
    learned(guided)
    calls = []
    guided.net.conditioning.register_forward_hook(lambda *_: calls.append("conditioning"))
    x0, t, noise = torch.randn(4, 1, 8, 8), 21, torch.randn(4, 1, 8, 8)
    blocks = ["out_1", "out_2"]
    for name, feature in guided.features(x0, t, noise, blocks).items():
        assert torch.equal(feature, plain.features(x0, t, noise, blocks)[name])
    assert not calls
    later = guided.features(x0, t, noise, ["out_3"])["out_3"]
    assert calls == ["conditioning"]
    assert not torch.allclose(later, plain.features(x0, t, noise, ["out_3"])["out_3"], atol=1e-3)


def test_the_projection_learns_from_the_first_step(tiny_config):
    _, guided = denoisers(tiny_config, "out_2", gate=True)
    x0, sigma, _ = inputs(guided)
    guided.loss(x0, sigma, torch.randn_like(x0)).mean().backward()
    assert guided.net.conditioning.projection.weight.grad.abs().max() > 0
    assert all(p.grad is not None for p in guided.parameters())  # DistributedDataParallel asks it


@pytest.mark.parametrize(
    ("more", "parameters"), [({}, 33_280), ({"self_condition_gate": 1}, 33_537)]
)
def test_what_it_adds_to_the_main_experiment(more, parameters):
    sets = ["network.self_condition=out_2", *(f"network.{k}=True" for k in more)]
    config = load_config("config/DDPM_ddpm.yaml", sets)
    total = sum(p.numel() for p in build_denoiser(config).parameters())
    assert total == 5_880_899 + parameters


@pytest.mark.parametrize(("network", "message"), [
    ({"self_condition": "out_4"}, "'out_4' is no block .*: there are out_1, out_2, out_3$"),
    ({"self_condition": "middle"}, "'middle' is no block with others after it"),
    ({"self_condition_gate": True}, "self_condition_gate needs self_condition"),
])  # fmt: skip
def test_mistakes(tiny_config, network, message):
    values = {
        **tiny_config.model_dump(),
        "network": {**tiny_config.network.model_dump(), **network},
    }
    with pytest.raises(UserError, match=message):
        parse_config(values)


def test_the_jobs_take_it(tiny_config, tmp_path):
    """Sampling and the probe, from a checkpoint alone."""
    values = {**tiny_config.model_dump(), "save_dir": str(tmp_path / "guided")}
    values["network"] = {**values["network"], "self_condition": "out_2"}
    config = parse_config(values)
    guided = learned(build_denoiser(config).eval())
    path = save_model(config, 1, guided.net.state_dict())
    again = load_denoiser(path, torch.device("cpu")).denoiser
    assert torch.equal(again(*inputs(again)), guided(*inputs(guided)))
    sample.main(["--ckpt", str(path), "--device", "cpu", "--steps", "2", "--n", "2"])
    grid = ["--grid", "--timesteps", "21", "--protocol", "knn"]
    linear.main(["--ckpt", str(path), "--device", "cpu", *grid])
    assert (tmp_path / "guided" / "linear_grid_ep1_knn.json").exists()
