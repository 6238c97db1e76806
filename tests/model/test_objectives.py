"""Objectives, weightings, schedules and label conditions on data whose best denoiser is known.

For Gaussian data of standard deviation s, D(x) = x s^2 / (s^2 + sigma^2), so the best network
output is F = (D - c_skip x) / c_out, and E |D - x0|^2 = s^2 sigma^2 / (s^2 + sigma^2).
"""

import pytest
import torch

from config import parse_config
from config.schema import DDPMDiffusion, EDMDiffusion
from model.DDPM import DDPM
from model.EDM import EDM
from model.models import build_denoiser

S = 0.5


def optimal_denoiser(x, sigma):
    return x * S**2 / (S**2 + sigma.view(-1, 1, 1, 1) ** 2)


class OptimalNet(torch.nn.Module):
    """The best F of `process` for Gaussian data, found from (c_in x, c_noise) alone."""

    def __init__(self):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x_in, c_noise, augment=None, blocks=None, y=None):
        process = self.process
        if isinstance(process, EDM):
            sigma = (4 * c_noise).exp()
        else:
            sigma = process.sigma(c_noise * process.n_T)
        s = sigma.view(-1, 1, 1, 1)
        x = x_in / process.c_in(s)
        return (optimal_denoiser(x, sigma) - process.c_skip(s) * x) / process.c_out(s)


def optimal(process_class, diffusion):
    net = OptimalNet()
    process = process_class(net, diffusion)
    object.__setattr__(net, "process", process)  # not as a submodule: that would be a cycle
    return process


CASES = [
    (DDPM, DDPMDiffusion(objective=objective, weighting=weighting, schedule=schedule))
    for objective in ("eps", "x0", "v")
    for weighting in ("simple", "min_snr")
    for schedule in ("linear", "cosine")
] + [(EDM, EDMDiffusion())]


def expected_weight(process, sigma: float) -> float:
    """w(sigma) c_out^2 from the papers' own forms."""
    d = getattr(process, "diffusion", None)
    if d is None or d.weighting == "simple":
        return 1.0
    snr = sigma**-2
    capped = min(snr, d.gamma)
    return {"eps": capped / snr, "x0": capped, "v": capped / (snr + 1)}[d.objective]


@pytest.mark.parametrize(("process_class", "diffusion"), CASES)
def test_the_optimal_network_gives_the_optimal_denoiser_and_loss(process_class, diffusion):
    process = optimal(process_class, diffusion)
    draw = torch.Generator().manual_seed(0)
    for u in (0.0, 0.3, 0.6, 0.8):
        sigma = process.training_sigma(torch.full((64,), u))
        x0 = S * torch.randn(64, 1, 32, 32, generator=draw)
        noise = torch.randn(64, 1, 32, 32, generator=draw)
        x = x0 + sigma.view(-1, 1, 1, 1) * noise
        torch.testing.assert_close(
            process(x, sigma), optimal_denoiser(x, sigma), rtol=1e-3, atol=1e-3
        )
        level = sigma[0].item()
        error = S**2 * level**2 / (S**2 + level**2)  # of x0
        c_out = process.c_out(sigma[0]).item()
        expected = expected_weight(process, level) * error / c_out**2
        loss = process.loss(x0, sigma, noise).mean().item()
        assert loss == pytest.approx(expected, rel=0.02), level


def test_any_other_network_has_a_higher_loss():
    process = optimal(DDPM, DDPMDiffusion(objective="v", weighting="min_snr"))
    draw = torch.Generator().manual_seed(0)
    x0 = S * torch.randn(256, 1, 8, 8, generator=draw)
    noise = torch.randn(256, 1, 8, 8, generator=draw)
    sigma = process.training_sigma(torch.linspace(0.05, 0.95, 256))
    best = process.loss(x0, sigma, noise).mean()
    forward = process.net.forward
    process.net.forward = lambda *args, **kwargs: 1.1 * forward(*args, **kwargs)
    assert process.loss(x0, sigma, noise).mean() > best


def test_the_cosine_schedule_is_that_of_its_paper():
    process = optimal(DDPM, DDPMDiffusion(schedule="cosine"))
    abar = 1 / (1 + process.sigmas.double() ** 2)
    t = torch.tensor([1, 250, 500, 750, 999], dtype=torch.float64)
    f = torch.cos((t / 1000 + 0.008) / 1.008 * torch.pi / 2) ** 2
    expected = f / torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2, dtype=torch.float64)) ** 2
    torch.testing.assert_close(abar[t.long() - 1], expected, rtol=1e-4, atol=1e-9)
    assert (process.sigmas.diff() > 0).all()


def test_continuous_time_fills_the_gaps_and_starts_above_zero():
    process = optimal(DDPM, DDPMDiffusion(time="continuous"))
    u = torch.linspace(0, 1, 5001)[:-1]
    sigma = process.training_sigma(u)
    assert (sigma > 0).all()
    assert (sigma.diff() > 0).all()
    assert sigma[0] < process.sigmas[0] / 100
    t = process.t(sigma[5:])
    torch.testing.assert_close(t, u[5:] * 1000, rtol=1e-4, atol=2e-3)


@pytest.fixture
def conditional(tiny_config):
    values = {**tiny_config.model_dump(), "cond_drop_prob": 0.1}
    torch.manual_seed(0)
    return build_denoiser(parse_config(values)).eval()


def test_a_label_changes_the_denoiser_and_no_label_is_minus_one(conditional):
    x, sigma = torch.randn(3, 1, 8, 8), torch.full((3,), 0.5)
    plain = conditional(x, sigma)
    with_labels = conditional(x, sigma, torch.tensor([3, 4, -1]))
    assert not torch.allclose(with_labels[0], plain[0])
    assert not torch.allclose(with_labels[1], plain[1])
    torch.testing.assert_close(with_labels[2], plain[2])


def test_unconditional_weights_are_unchanged_by_the_option(tiny_config, conditional):
    names = set(build_denoiser(tiny_config).state_dict())
    assert set(conditional.state_dict()) - names == {"net.time_emb.label_emb.weight"}


def test_zero_init_makes_residual_blocks_the_identity(tiny_config):
    network = {**tiny_config.network.model_dump(), "zero_init": True}
    net = build_denoiser(parse_config({**tiny_config.model_dump(), "network": network})).net
    block = net.middle.res1
    x, emb = torch.randn(2, 64, 4, 4), torch.randn(2, 128)
    assert torch.equal(block(x, emb), x)
