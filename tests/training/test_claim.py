"""That training does what it is for: it learns a distribution, and features that tell classes."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY

import linear
import train
from config import parse_config
from datasets import Dataset
from sampling import sample, sampler_settings
from training.trainer import Trainer

CPU = torch.device("cpu")


def test_a_network_trained_on_gaussian_data_returns_its_standard_deviation():
    """Pixels N(0, 0.25^2), each on its own: D(x) = x s^2 / (s^2 + sigma^2) is to be learned."""
    s, shape = 0.25, (1, 8, 8)
    config = parse_config({
        **TINY, "model_type": "EDM", "batch_size": 32, "n_step": 120, "warm_epoch": 0,
        "warm_step": 20, "lr_decay": "cosine", "lrate": 2e-3, "ema": 0.95,
        "network": {**TINY["network"], "dropout": 0.0, "ch_mults": [1], "is_attn": [False]},
    })  # fmt: skip
    x = s * np.random.default_rng(0).standard_normal((2000, *shape))
    images = (127.5 * (1 + x)).round().clip(0, 255).astype(np.uint8)
    data = Dataset("gaussian", "train", images, np.zeros(2000, np.int64), ["0"])
    trainer = Trainer(config, data, CPU, use_amp=False)

    def sampled() -> torch.Tensor:
        settings = sampler_settings(trainer.ema_denoiser)
        return sample(trainer.ema_denoiser, settings, list(range(32)), 0, shape) / 127.5 - 1

    assert sampled().std().item() > 2 * s  # untrained
    while trainer.step < trainer.total_steps:
        trainer.train_step()
    x = sampled()
    assert x.std().item() == pytest.approx(s, rel=0.08)  # 2048 pixels: standard error 1.6 %
    assert x.mean().item() == pytest.approx(0, abs=0.03)


@pytest.mark.slow
def test_features_of_a_trained_network_tell_digits_apart_better_than_those_of_an_untrained_one(
    tiny_yaml, tmp_path
):
    """The optimum of a linear classifier on each, so that only the features differ."""
    common = ["--config", str(tiny_yaml), "--device", "cpu"]
    train.main([*common, "--set", "n_epoch=12", "--sample_every", "99", "--save_every", "99"])
    grid = ["--grid", "--protocol", "cached", "--timesteps", "101,201"]
    linear.main([*common, *grid])
    linear.main([*common, *grid, "--baseline", "random"])

    records = [json.loads(p.read_text()) for p in (tmp_path / "run").glob("linear_grid*.json")]
    trained, untrained = (
        {(cell["t"], cell["block"]): cell["test_accuracy"] for cell in record["cells"]}
        for record in sorted(records, key=lambda record: record["baseline"] or "")
    )
    for block in ("out_1", "out_2"):  # found: 14 to 16 points at t = 101, 23 to 24 at t = 201
        assert trained[101, block] > untrained[101, block] + 0.07
        assert trained[201, block] > untrained[201, block] + 0.15
