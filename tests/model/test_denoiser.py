"""The DDPM process in the coordinate sigma."""

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

from config.schema import DDPMDiffusion
from model.DDPM import DDPM
from model.models import build_denoiser


def test_sigma_and_t_are_inverse_at_every_integer():
    denoiser = DDPM(nn.Linear(1, 1), DDPMDiffusion())
    t = torch.arange(1, 1001)
    assert torch.equal(denoiser.t(denoiser.sigma(t)), t.float())


def test_t_is_linear_in_log_sigma_between_and_clamped_outside():
    denoiser = DDPM(nn.Linear(1, 1), DDPMDiffusion())
    low, high = denoiser.sigmas[20], denoiser.sigmas[21]
    middle = (low * high).sqrt()[None]
    torch.testing.assert_close(denoiser.t(middle), torch.tensor([21.5]), rtol=0, atol=1e-3)
    ends = denoiser.t(torch.tensor([1e-6, 1e6]))
    assert ends.tolist() == [1.0, 1000.0]


def test_forward_process_is_that_of_ddpm():
    """c_in x = sqrt(abar) x0 + sqrt(1 - abar) eps, Ho et al. 2020, eq. 4."""
    denoiser = DDPM(nn.Linear(1, 1), DDPMDiffusion())
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    sigma = denoiser.sigma(torch.arange(1, 1001)).double()
    torch.testing.assert_close(denoiser.c_in(sigma), abar.sqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(denoiser.c_in(sigma) * sigma, (1 - abar).sqrt(), rtol=1e-6, atol=0)


def test_training_sigma_takes_every_timestep_equally_often():
    denoiser = DDPM(nn.Linear(1, 1), DDPMDiffusion())
    u = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    t = denoiser.t(denoiser.training_sigma(u)).round().long()
    assert torch.equal(torch.bincount(t, minlength=1001)[1:], torch.full((1000,), 5))
    assert denoiser.training_sigma(torch.tensor([1.0])) == denoiser.sigmas[-1]


@pytest.mark.parametrize(("p_mean", "p_std"), [(-1.2, 1.2), (0.5, 2.0)])
def test_lognormal_noise_has_the_quantiles_of_the_normal_within_the_schedule(p_mean, p_std):
    diffusion = DDPMDiffusion(time="lognormal", p_mean=p_mean, p_std=p_std)
    process = DDPM(nn.Linear(1, 1), diffusion)
    u = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    log_sigma = process.training_sigma(u).log().numpy()
    ends = process.sigmas[[0, -1]].double().log().numpy()
    expected = norm.ppf(u.numpy(), p_mean, p_std)
    assert (expected < ends[0]).any()  # so that both ends of the schedule are reached
    assert (expected > ends[1]).any() == (p_std == 2)
    np.testing.assert_allclose(log_sigma, expected.clip(*ends), atol=1e-5)
    extremes = process.training_sigma(torch.tensor([0.0, 1.0]))
    assert process.sigmas[0] <= extremes[0] < extremes[1] <= process.sigmas[-1]


def test_an_unknown_block_is_refused(tiny_config):
    denoiser = build_denoiser(tiny_config)
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="there are out_1"):
        denoiser.features(x, 21, x, ["out_9"])
