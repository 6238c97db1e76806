"""The EDM process against the reference's numbers and closed forms."""

import math

import numpy as np
import pytest
import torch
from conftest import reference_weight, standard_normal

from config import parse_config
from config.schema import DDPMDiffusion, EDMDiffusion, Network
from model.DDPM import DDPM
from model.EDM import EDM
from model.models import build_denoiser
from model.samplers import ddim, heun, karras
from model.unet import UNet
from sampling import sample, sampler_settings
from support.errors import UserError


@pytest.fixture(scope="module")
def process() -> EDM:
    return EDM(torch.nn.Linear(1, 1), EDMDiffusion())


def test_denoised_and_loss_equal_the_reference(reference):
    networks, values = reference
    facts = networks["ddpmpp"]
    net = UNet(Network(**facts["network"])).eval()
    shapes = facts["state_dict"]
    net.load_state_dict({key: reference_weight(key, shape) for key, shape in shapes.items()})
    denoiser = EDM(net, EDMDiffusion())
    x0 = 2 * torch.from_numpy(standard_normal("image", (4, 3, 32, 32))).sigmoid() - 1
    noise = torch.from_numpy(standard_normal("noise", (4, 3, 32, 32)))
    sigma = torch.from_numpy(values["edm/sigma"])
    with torch.no_grad():
        denoised = denoiser(x0 + sigma.view(-1, 1, 1, 1) * noise, sigma)
        loss = denoiser.loss(x0, sigma, noise)
    np.testing.assert_allclose(denoised, values["edm/denoised"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(loss, values["edm/loss_per_image"], rtol=1e-4)


def test_schedule_and_timesteps_equal_the_reference(process, reference):
    values = reference[1]
    sigmas = karras(process, 18, process.sigma_range[1])
    np.testing.assert_allclose(sigmas, values["edm/schedule_18"], rtol=1e-5)
    t = torch.arange(1, 19)
    np.testing.assert_allclose(process.sigma(t), values["edm/sigma_of_t_1_to_18"], rtol=1e-5)


def test_sigma_and_t_are_inverse(process):
    t = torch.linspace(1, 18, 200)
    torch.testing.assert_close(process.t(process.sigma(t)), t, rtol=1e-5, atol=1e-4)
    assert process.t(torch.tensor([1e-5, 1e5])).tolist() == [1.0, 18.0]


def test_training_sigma_is_log_normal_and_finite(process):
    u = torch.linspace(0, 1, 100_001)
    log_sigma = process.training_sigma(u).log()
    assert log_sigma.isfinite().all()
    assert (log_sigma.diff() >= 0).all()
    inner = log_sigma[1:-1]
    assert inner.mean().item() == pytest.approx(-1.2, abs=1e-3)
    assert inner.std().item() == pytest.approx(1.2, abs=2e-3)


def test_preconditioning_gives_unit_variance(process):
    """Karras et al. 2022, B.6: input and target of F have variance 1 at every sigma."""
    sigma = torch.logspace(-2, 1.5, 5)
    variance = 0.5**2 + sigma**2
    torch.testing.assert_close(process.c_in(sigma) ** 2 * variance, torch.ones(5))
    skip = process.c_skip(sigma)
    target = (1 - skip) ** 2 * 0.5**2 + skip**2 * sigma**2
    torch.testing.assert_close(target / process.c_out(sigma) ** 2, torch.ones(5))


def gaussian(s: float):
    return lambda x, sigma: x * s**2 / (s**2 + sigma.view(-1, 1, 1, 1) ** 2)


def test_heun_converges_at_second_order():
    """The probability-flow ODE of a Gaussian maps x to x sqrt((s^2 + low^2) / (s^2 + top^2))."""
    s, top, low = 0.5, 10.0, 0.01
    x = torch.full((1, 1, 1, 1), 7.0, dtype=torch.float64)
    exact = 7.0 * math.sqrt((s**2 + low**2) / (s**2 + top**2))

    def error(steps: int) -> float:
        sigmas = torch.linspace(math.log(top), math.log(low), steps, dtype=torch.float64).exp()
        return abs(heun(gaussian(s), x, sigmas.tolist(), None).item() - exact)

    assert 3.5 < error(101) / error(201) < 4.5


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_heun_with_churn_returns_the_standard_deviation_of_the_data(process, eta):
    s, draw = 0.5, torch.Generator().manual_seed(0)

    def noise():
        return torch.randn((16384, 1, 1, 1), generator=draw, dtype=torch.float64)

    sigmas = karras(process, 60, process.sigma_range[1])
    x = heun(gaussian(s), sigmas[0] * noise(), sigmas, noise, eta=eta)
    assert x.std().item() == pytest.approx(s, rel=0.03)


def test_churn_acts_only_between_s_min_and_s_max(process):
    """Full churn in an empty interval changes nothing, and asks for no noise."""
    x = torch.full((1, 1, 1, 1), 50.0, dtype=torch.float64)
    sigmas = karras(process, 10, process.sigma_range[1])
    plain = heun(gaussian(0.5), x, sigmas, None)
    assert torch.equal(heun(gaussian(0.5), x, sigmas, None, eta=1.0, S_min=90.0), plain)


def test_the_default_sampler_takes_35_evaluations_and_float64(process):
    seen = []

    class Net(torch.nn.Linear):
        def forward(self, x, c_noise, augment=None, blocks=None, y=None):
            seen.append((x.dtype, c_noise.dtype))
            return torch.zeros_like(x)

    denoiser = EDM(Net(1, 1), EDMDiffusion())
    sample(denoiser, sampler_settings(denoiser), [0], 0, (1, 4, 4))
    assert seen == [(torch.float32, torch.float32)] * 35


@pytest.mark.parametrize("kind", [(EDM, EDMDiffusion), (DDPM, DDPMDiffusion)])
def test_either_process_takes_any_sampler(kind):
    process, diffusion = kind
    denoiser = process(torch.nn.Linear(1, 1), diffusion())
    exact = gaussian(0.5)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn((8192, 1, 1, 1), generator=draw, dtype=torch.float64)
    sigmas = karras(denoiser, 40, denoiser.sigma_range[1])
    for sampler in (ddim, heun):
        drawn = sampler(exact, sigmas[0] * x, sigmas, None)
        assert drawn.std().item() == pytest.approx(0.5, rel=0.1)


def test_features_take_whole_fractional_and_per_image_timesteps(tiny_config):
    config = parse_config({**tiny_config.model_dump(), "model_type": "EDM", "diffusion": {}})
    denoiser = build_denoiser(config).eval()
    x0, noise = torch.rand(2, 1, 8, 8), torch.randn(2, 1, 8, 8)

    def features(t):
        return denoiser.features(x0, t, noise, ["out_2"])["out_2"]

    assert torch.equal(features(4), features(4.0))
    both = features(torch.tensor([4.0, 7.5]))
    torch.testing.assert_close(both[0], features(4)[0])
    torch.testing.assert_close(both[1], features(7.5)[1])
    assert not torch.allclose(both[0], features(7.5)[0])


def test_augmentation_needs_its_labels():
    with pytest.raises(UserError, match="augment_dim 9"):
        parse_config({"model_type": "EDM", "diffusion": {"augment_prob": 0.12}})
    network = {"network": {"augment_dim": 9}}
    parse_config({"model_type": "EDM", "diffusion": {"augment_prob": 0.12}, **network})


def test_keys_of_the_other_process_are_refused():
    with pytest.raises(UserError, match=r"unknown key 'diffusion.betas'.*sigma_data"):
        parse_config({"model_type": "EDM", "diffusion": {"betas": [1e-4, 0.02]}})


@pytest.mark.parametrize(("settings", "advice"), [
    ({"rho": 0.005}, "too large to compute with"), ({"sigma_max": 1e39}, "lower sigma_max"),
    ({"rho": 0.05}, "raise sigma_min"), ({"sigma_min": 1e-50}, "raise sigma_min"),
    ({"rho": 1e9}, "no higher than those before"),
])  # fmt: skip
def test_noise_levels_that_cannot_be_computed_with_are_refused(settings, advice):
    with pytest.raises(UserError, match=advice):
        EDM(torch.nn.Linear(1, 1), EDMDiffusion(**settings))
