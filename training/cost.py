"""What a run would take: size, memory and time, measured on a few real steps."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sampling import evaluations_of, sampler_settings
from training.recorded import WARM_UP
from training.trainer import Trainer
from utils import peak_memory_bytes

STEPS = 5  # timed, after those that warm up


@dataclass(frozen=True)
class Cost:
    """What a run would take, measured on a few steps."""

    parameters: int
    gflops_forward: float  # per image
    peak_memory_mb: float
    images_per_s: float
    total_steps: int
    hours: float  # of training, without test losses and samples
    probe_timesteps: int  # in the grid of the linear probe
    evaluations_per_sample: int  # of D, with the default sampler


def gflops_of(call: Callable[[], object]) -> float:
    """The GFLOPs of the matrix products and convolutions of one call, multiply and add counted
    apart."""
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    with FlopCounterMode(display=False) as flops:
        call()
    return flops.get_total_flops() / 1e9


def measure_cost(trainer: Trainer) -> Cost:
    """Runs a few real training steps; the trainer is of no use afterwards."""
    device = trainer.device
    x0, _ = trainer.batches[0]
    sigma = trainer.denoiser.training_sigma(torch.rand(1, device=device))
    with torch.no_grad():
        gflops = gflops_of(lambda: trainer.ema_denoiser(x0[:1], sigma))
    for _ in range(WARM_UP + 1 if trainer.recorded else 1):  # until it is recorded
        trainer.train_step()
    float(trainer.window.sums["loss"])  # waits for the device
    started = time.monotonic()
    for _ in range(STEPS):
        trainer.train_step()
    float(trainer.window.sums["loss"])
    per_step = (time.monotonic() - started) / STEPS
    sampler = sampler_settings(trainer.denoiser)
    return Cost(
        parameters=sum(p.numel() for p in trainer.denoiser.parameters()),
        gflops_forward=gflops,
        peak_memory_mb=peak_memory_bytes(device) / 1e6,
        images_per_s=trainer.images_per_step / per_step,
        total_steps=trainer.total_steps,
        hours=per_step * trainer.total_steps / 3600,
        probe_timesteps=len(trainer.denoiser.probe_timesteps),
        evaluations_per_sample=evaluations_of(sampler.sampler, sampler.steps),
    )
