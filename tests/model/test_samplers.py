"""Samplers on data whose best denoiser is known, and against diffusers' schedulers."""

import itertools
import math
from pathlib import Path

import pytest
import torch

from checkpoint import TrainedModel
from config.schema import DDPMDiffusion
from model.DDPM import DDPM
from model.samplers import (
    SAMPLERS,
    SPACINGS,
    beta_variance,
    clipped,
    ddim,
    dpmpp_2m,
    heun,
    ipndm,
    last_timestep,
    leading,
    pc,
    posterior_variance,
    sde,
)  # fmt: skip
from sampling import noise_levels, sample, sample_in_batches, sampler_settings
from support.errors import UserError

SHAPE = (8, 1, 32, 32)


@pytest.fixture(scope="module")
def process() -> DDPM:
    return DDPM(torch.nn.Linear(1, 1), DDPMDiffusion())


def gaussian(s: float):
    """The exact D for N(0, s^2)."""
    return lambda x, sigma: x * s**2 / (s**2 + sigma.view(-1, 1, 1, 1) ** 2)


def noise_source(seed: int):
    draw = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(SHAPE, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize(("sampler", "options"), [
    (ddim, {"eta": 0.0}),
    (ddim, {"eta": 0.5}),
    (ddim, {"eta": 1.0}),
    (ddim, {"eta": 1.0, "variance": beta_variance}),
    *((row.run, row.options) for row in SAMPLERS.values()),
])  # fmt: skip
def test_sampler_returns_the_standard_deviation_of_the_data(process, sampler, options):
    s = 0.5
    sigmas = leading(process, 1000, process.sigma_range[1])
    noise = noise_source(0)
    x = sampler(gaussian(s), sigmas[0] * noise(), sigmas, noise, **options)
    assert x.std().item() == pytest.approx(s, rel=0.03)  # 8192 draws: standard error 0.8 %
    assert x.mean().item() == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize(("sampler", "order"), [
    (ddim, 1), (heun, 2), (dpmpp_2m, 2), (ipndm, 3.5),
])  # fmt: skip
def test_halving_the_steps_cuts_the_error_by_the_order(sampler, order):
    """The probability-flow ODE of a Gaussian maps x at sigma `top` to x
    sqrt((s^2 + low^2) / (s^2 + top^2)) at `low`. iPNDM starts with lower orders, which tell."""
    s, top, low = 0.5, 10.0, 0.01
    x = torch.full((1, 1, 1, 1), 7.0, dtype=torch.float64)
    exact = 7.0 * math.sqrt((s**2 + low**2) / (s**2 + top**2))

    def error(steps: int) -> float:
        if sampler is ipndm:  # equal steps of sigma, for which its formulas are
            sigmas = torch.linspace(top, low, steps + 1, dtype=torch.float64)
        else:
            sigmas = torch.linspace(math.log(top), math.log(low), steps + 1).double().exp()
        return abs(sampler(gaussian(s), x, sigmas.tolist(), None).item() - exact)

    steps = 400 if sampler is ipndm else 100
    ratio = math.log2(error(steps) / error(2 * steps))
    assert ratio == pytest.approx(order, abs=0.3 if sampler is not ipndm else 1.0)


def test_the_corrector_pulls_towards_the_data(process):
    """From a wrong start at low sigma, Langevin steps bring pc nearer to N(0, s^2) than sde."""
    s, sigmas = 0.5, [0.3, 0.28, 0.26, 0.24, 0.22, 0.2, 0.1, 0.0]
    wrong = 2.0 * noise_source(1)()
    off = [
        abs(sampler(gaussian(s), wrong, sigmas, noise_source(2)).std().item() - s)
        for sampler in (sde, pc)
    ]
    assert off[1] < off[0]


@pytest.mark.parametrize("spacing", list(SPACINGS))
def test_spacings_fall_from_near_the_top_to_0(process, spacing):
    low, high = process.sigma_range
    for steps in (1, 2, 7, 50):
        *sigmas, last = SPACINGS[spacing](process, steps, process.sigma_range[1])
        assert last == 0
        assert len(sigmas) == steps
        assert all(a > b for a, b in itertools.pairwise(sigmas))
        assert sigmas[-1] >= low * 0.999
        assert sigmas[0] <= high * 1.001
        if spacing != "leading":
            assert sigmas[0] == pytest.approx(high, rel=1e-4)


@pytest.mark.parametrize("spacing", ["trailing", "karras", "log_snr"])
def test_sampling_may_start_at_a_lower_noise_level(process, spacing):
    settings = sampler_settings(process, steps=4, spacing=spacing, sigma_max=5.0)
    *sigmas, last = noise_levels(process, settings)
    assert last == 0
    assert len(set(sigmas)) == 4
    assert sigmas[0] == pytest.approx(5, rel=0.3 if spacing == "trailing" else 1e-9)
    assert settings.tag().endswith("_smax5")
    several = sampler_settings(process, "ddpm", sigma_max=5.0).steps
    assert several == last_timestep(process, 5.0) < process.n_T


@pytest.mark.parametrize("row", SAMPLERS.values(), ids=SAMPLERS)
def test_the_last_step_lands_on_x0(process, row):
    seen = []

    def D(x, sigma):
        seen.append(torch.tanh(x) / (1 + sigma.view(-1, 1, 1, 1)))
        return seen[-1]

    sigmas = leading(process, 6, process.sigma_range[1])
    noise = noise_source(1)
    x0 = row.run(D, sigmas[0] * noise(), sigmas, noise, **row.options)
    assert torch.allclose(x0, seen[-1], rtol=0, atol=1e-12)


def test_variances_are_those_of_the_paper(process):
    """Ho et al. 2020: beta_t and its posterior form, divided by abar of the next step."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = torch.cumprod(1 - betas, 0)
    for t in (2, 50, 1000):
        s, s_next = (((1 - abar[i]) / abar[i]).sqrt().item() for i in (t - 1, t - 2))
        beta, ab, ab_next = (v.item() for v in (betas[t - 1], abar[t - 1], abar[t - 2]))
        assert beta_variance(s, s_next) == pytest.approx(beta / ab_next, rel=1e-6)
        posterior = beta * (1 - ab_next) / (1 - ab)
        assert posterior_variance(s, s_next) == pytest.approx(posterior / ab_next, rel=1e-6)


def test_default_timesteps_are_the_references(process):
    def timesteps(steps: int) -> list[int]:
        *sigmas, last = leading(process, steps, process.sigma_range[1])
        assert last == 0
        return process.t(torch.tensor(sigmas)).round().int().tolist()[::-1]

    assert timesteps(100) == list(range(1, 1000, 10))
    assert timesteps(1000) == list(range(1, 1001))
    uneven = timesteps(300)
    assert uneven[0] == 1
    assert uneven[-1] > 990
    assert len(set(uneven)) == 300


@pytest.fixture(scope="module")
def eps_net():
    """A fixed nonlinear eps(x_t, t), x_t in the variance-preserving coordinate."""
    torch.manual_seed(0)
    mix = torch.randn(16, 16, dtype=torch.float64) / 4

    def eps(x, t):
        return torch.tanh(x.flatten(1) @ mix + 0.001 * t).view_as(x)

    return eps


def as_denoiser(process, eps):
    def D(x, sigma):
        t = process.t(sigma)[0].item()
        scale = (1 + sigma[0] ** 2) ** 0.5
        return x - sigma[0] * eps(x / scale, t)

    return D


def vp_start(sigma: float):
    draw = torch.Generator().manual_seed(3)
    return torch.randn(2, 1, 4, 4, generator=draw, dtype=torch.float64)


def test_ddim_equals_diffusers(process, eps_net):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
        clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading",
    )  # fmt: skip
    scheduler.set_timesteps(100)  # counts t from 0
    x = vp_start(0)
    for t in scheduler.timesteps:
        x = scheduler.step(eps_net(x, t.item() + 1), t, x).prev_sample
    sigmas = leading(process, 100, process.sigma_range[1])
    start = vp_start(0) * (1 + sigmas[0] ** 2) ** 0.5
    ours = ddim(as_denoiser(process, eps_net), start, sigmas, None)
    torch.testing.assert_close(ours, x, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("theirs", "variance"), [
    ("fixed_large", beta_variance), ("fixed_small", posterior_variance),
])  # fmt: skip
def test_ddpm_equals_diffusers(process, eps_net, theirs, variance):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
        clip_sample=False, variance_type=theirs,
    )  # fmt: skip
    x = vp_start(0)
    draw = torch.Generator().manual_seed(7)
    for t in range(999, -1, -1):
        x = scheduler.step(eps_net(x, t + 1), t, x, generator=draw).prev_sample
    draw = torch.Generator().manual_seed(7)
    sigmas = leading(process, 1000, process.sigma_range[1])
    start = vp_start(0) * (1 + sigmas[0] ** 2) ** 0.5
    ours = ddim(
        as_denoiser(process, eps_net), start, sigmas, eta=1.0, variance=variance,
        noise=lambda: torch.randn(x.shape, generator=draw, dtype=torch.float64),
    )  # fmt: skip
    torch.testing.assert_close(ours, x, rtol=2e-3, atol=2e-3)


def test_dpmpp_2m_equals_diffusers(process, eps_net):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
        solver_order=2, algorithm_type="dpmsolver++", solver_type="midpoint",
        final_sigmas_type="zero", timestep_spacing="leading",
    )  # fmt: skip
    scheduler.set_timesteps(20)
    x = vp_start(0)
    for t in scheduler.timesteps:
        x = scheduler.step(eps_net(x, t.item() + 1), t, x).prev_sample
    timesteps = [t + 1 for t in scheduler.timesteps.tolist()]
    sigmas = [*process.sigma(torch.tensor(timesteps)).tolist(), 0.0]
    start = vp_start(0) * (1 + sigmas[0] ** 2) ** 0.5
    ours = dpmpp_2m(as_denoiser(process, eps_net), start, sigmas, None)
    torch.testing.assert_close(ours, x, rtol=2e-4, atol=2e-4)


def test_heun_equals_diffusers(process, eps_net):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.HeunDiscreteScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
        timestep_spacing="leading",
    )  # fmt: skip
    scheduler.set_timesteps(20)
    timesteps = list(dict.fromkeys(t + 1 for t in scheduler.timesteps.int().tolist()))
    sigmas = [*process.sigma(torch.tensor(timesteps)).tolist(), 0.0]
    x = start = vp_start(0) * (1 + sigmas[0] ** 2) ** 0.5
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(eps_net(scaled, t.item() + 1), t, x).prev_sample
    ours = heun(as_denoiser(process, eps_net), start, sigmas, None)
    torch.testing.assert_close(ours, x, rtol=5e-4, atol=5e-4)


def test_clipping():
    D = clipped(lambda x, sigma: 3 * x)
    assert D(torch.tensor([-1.0, 0.2, 1.0]), None).tolist() == pytest.approx([-1, 0.6, 1])


def test_every_sampler_draws_images_that_depend_on_seed_and_index_alone(tiny_config):
    from model.models import build_denoiser

    torch.manual_seed(0)
    denoiser = build_denoiser(tiny_config).eval()
    shape = tiny_config.network.image_shape
    for sampler in SAMPLERS:
        settings = sampler_settings(denoiser, sampler, steps=5)
        together = sample(denoiser, settings, [0, 1, 2, 3], 7, shape)
        apart = torch.cat([sample(denoiser, settings, i, 7, shape) for i in ([3], [1, 2])])
        difference = together[[3, 1, 2]].int() - apart.int()
        assert difference.abs().max() <= 1, sampler
        other_seed = sample(denoiser, settings, [0, 1, 2, 3], 8, shape)
        assert not torch.equal(together, other_seed)


def test_an_image_that_is_no_number_is_not_shown_as_a_black_one(tiny_config):
    from model.models import build_denoiser

    denoiser = build_denoiser(tiny_config).eval().requires_grad_(False)
    next(denoiser.net.parameters()).fill_(float("nan"))
    settings = sampler_settings(denoiser, steps=2)
    model = TrainedModel(denoiser, tiny_config, 0, Path())
    with pytest.raises(UserError, match="not finite: leave out --use_amp or --no_clip"):
        list(sample_in_batches(model, settings, [0], use_amp=False, batch_size=1))


def test_the_highest_noise_level_may_be_given_as_it_is_printed(process):
    _, high = process.sigma_range
    assert sampler_settings(process, sigma_max=float(f"{high:.5g}")).sigma_max <= high


@pytest.mark.parametrize(("wrong", "message"), [
    ({"steps": 0}, "--steps 0"),
    ({"steps": 1001}, "there are 1000 timesteps"),
    ({"sampler": "ddpm", "eta": 0.5}, "--eta"),
    ({"eta": 1.5}, "--eta 1.5"),
    ({"sigma_max": 1e4}, "--sigma_max 10000: give more than"),
    ({"sigma_max": 5.0, "steps": 4, "spacing": "leading"}, "starts below --sigma_max, at t = "),
    ({"sigma_max": 1e-4}, "--sigma_max 0.0001: give more than"),
])  # fmt: skip
def test_impossible_settings_are_refused(process, wrong, message):
    with pytest.raises(UserError, match=message):
        sampler_settings(process, **wrong)
