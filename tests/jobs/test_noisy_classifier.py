"""noisy_classifier.py and what it stands on: closed forms, resuming, both backbones on digits."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import config_for
from PIL import Image
from torch import nn

import noisy_classifier
from checkpoint import TrainedModel
from config import parse_config
from datasets import Dataset, read_dataset, to_model_range
from evaluation.classifiers.noisy import (
    FeatureClassifier,
    NoisyWideResNet,
    frozen_features,
    mlp_on_features,
    noise_drawer,
    score,
    scored_timesteps,
    with_process,
)
from evaluation.classifiers.supervised import Recipe, SupervisedTraining, training_batches
from evaluation.probe.features import network_source
from model.models import build_denoiser, process_of
from model.wide_resnet import WideResNet
from support import distributed
from support.errors import UserError

CPU = torch.device("cpu")


class SignOfTheMean(nn.Module):
    """The best classifier of two flat images, one dark and one bright, under white noise."""

    def forward(self, x, c_noise):
        mean = x.mean(dim=(1, 2, 3))
        return torch.stack([-mean, mean], dim=1)


def flat_images(n: int, side: int = 4) -> Dataset:
    """n images of side x side pixels, all -0.2 (class 0) or 0.2 (class 1), about."""
    labels = np.arange(n, dtype=np.int64) % 2
    values = np.where(labels == 1, 153, 102).astype(np.uint8)  # 0.2 and -0.2
    images = np.broadcast_to(values[:, None, None, None], (n, 1, side, side))
    return Dataset("flat", "test", images, labels, ["dark", "bright"])


@pytest.fixture(scope="module", params=["DDPM", "EDM"])
def process(request):
    return process_of(parse_config({"model_type": request.param}))


def test_the_best_classifier_has_the_accuracy_of_the_closed_form(process):
    test = flat_images(1500)
    classifier = NoisyWideResNet(process, SignOfTheMean())
    levels = score(classifier, process, test, range(1500), CPU, 3, batch_size=500)
    for level in levels:
        z = 0.2 * math.sqrt(16) / level.sigma  # the mean of 16 pixels has noise sigma / 4
        p = (1 + math.erf(z / math.sqrt(2))) / 2
        assert abs(level.accuracy - p) <= 4 * math.sqrt(p * (1 - p) / 1500) + 1e-9
        assert level.interval[0] <= level.accuracy <= level.interval[1]
    assert levels[0].accuracy == 1
    assert levels[-1].accuracy < 0.56


def test_20_timesteps_of_ddpm_and_all_18_of_edm(process):
    timesteps = scored_timesteps(process.n_T)
    assert len(set(timesteps)) == len(timesteps) == min(process.n_T, 20)
    assert (timesteps[0], timesteps[-1]) == (1, process.n_T)
    gaps = np.diff(timesteps)
    assert gaps.max() - gaps.min() <= 1


def test_a_score_depends_neither_on_batches_nor_on_other_images_nor_on_ranks(monkeypatch):
    process = process_of(parse_config({"model_type": "EDM"}))
    classifier, test = NoisyWideResNet(process, SignOfTheMean()), flat_images(30)

    def accuracies(indices, batch_size=500):
        levels = score(classifier, process, test, indices, CPU, 0, batch_size)
        return np.array([level.accuracy for level in levels])

    whole = accuracies(range(30))
    assert np.array_equal(accuracies(range(30), batch_size=7), whole)
    alone = [accuracies([i]) for i in range(30)]
    assert np.allclose(np.mean(alone, axis=0), whole)
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    parts = []
    for rank in range(4):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(accuracies(range(30)))
    assert np.allclose(sum(parts), whole)
    assert not np.array_equal(parts[0], parts[1])


def test_a_wide_resnet_is_fed_as_the_process_feeds_its_network(process):
    class Recorder(nn.Module):
        def forward(self, x, c_noise):
            self.variance, self.c_noise = x.var(dim=(1, 2, 3)), c_noise
            return x.flatten(1)

    recorder, sigma = Recorder(), process.sigma(torch.tensor([1, process.n_T]))
    x0 = process.c_out(torch.tensor(1e9)).abs().clamp(max=1) * torch.randn(2, 3, 64, 64)
    NoisyWideResNet(process, recorder)(x0, sigma, torch.randn(2, 3, 64, 64))
    assert torch.allclose(recorder.variance, torch.ones(2), atol=0.05)  # c_in makes it so
    assert torch.equal(recorder.c_noise, process.c_noise(sigma))


@pytest.mark.parametrize("sigma", [0.002, 0.05, 3.0, 400.0])
def test_features_at_any_sigma_are_of_the_image_with_exactly_that_noise(tiny_config, sigma):
    denoiser = build_denoiser(tiny_config).eval()
    seen = {}

    def features(x0, t, noise, blocks):
        seen["x"] = x0 + denoiser.sigma(t).view(-1, 1, 1, 1) * noise
        return denoiser.features(x0, t, noise, blocks)

    source = replace(network_source(denoiser, "", False), features=features)
    x0, noise = torch.rand(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    level = torch.full((2,), sigma)
    values, c_noise = frozen_features(denoiser, source, "out_2")(x0, level, noise)
    assert torch.allclose(seen["x"], x0 + sigma * noise, rtol=1e-4, atol=1e-5)
    assert torch.allclose(c_noise, denoiser.c_noise(level))
    if 0.01 < sigma < 150:
        t = denoiser.t(level[:1]).item()
        expected = denoiser.features(x0, t, noise, ["out_2"])["out_2"]
        assert torch.allclose(values, expected, atol=1e-5)


def test_the_frozen_weights_are_neither_saved_nor_trained(tiny_config):
    denoiser = build_denoiser(tiny_config).eval()
    features = frozen_features(denoiser, network_source(denoiser, "", False), "out_1")
    classifier = FeatureClassifier(features, torch.randn(20, 64), 10)
    assert {name.split(".")[0] for name in classifier.state_dict()} == {
        "mean", "std", "time_emb", "lin1", "lin2",
    }  # fmt: skip
    logits = classifier.train()(torch.rand(2, 1, 8, 8), torch.ones(2), torch.randn(2, 1, 8, 8))
    logits.sum().backward()
    assert not denoiser.training
    assert all(weight.grad is None for weight in denoiser.parameters())


def test_the_mlp_sees_standardised_features(tiny_config):
    denoiser = build_denoiser(tiny_config).eval()
    train = read_dataset(tiny_config, "data", "train")
    process = process_of(tiny_config)
    model = TrainedModel(denoiser, tiny_config, 0, Path())
    mlp = mlp_on_features(model, process, train, "out_2", False).classifier
    seen = []
    mlp.lin1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x0 = to_model_range(torch.from_numpy(train.images))
    mlp(x0, *noise_drawer(process, 5, CPU, as_trained=False)(x0.shape, 0))
    assert seen[0].mean(0).abs().max() < 0.25  # statistics of 512 of 1,437 images, other noise
    assert (seen[0].std(0) - 1).abs().max() < 0.25


def training(path, seed: int = 0, **recipe) -> SupervisedTraining:
    config = config_for("digits", (1, 8, 8))
    train = read_dataset(config, path.parent, "train")
    train = train.take(slice(100))
    process = process_of(config)
    torch.manual_seed(seed)
    classifier = NoisyWideResNet(process, WideResNet(1, 10, 10, 1))
    values = {"epochs": 2, "batch_size": 32, "lr": 0.1, "warm_epochs": 1, "weight_decay": 5e-4}
    recipe = Recipe(**values | recipe)
    return SupervisedTraining(
        classifier, classifier.optimizer(recipe), noise_drawer(process, 0, CPU, True),
        training_batches(train, recipe, CPU, 0, True), recipe, path, use_amp=False,
    )  # fmt: skip


def test_a_killed_training_goes_on_bit_for_bit(tmp_path, monkeypatch):
    whole = training(tmp_path / "whole.pth")
    history = whole.run()
    assert [epoch["epoch"] for epoch in history] == [1, 2]

    class Killed(Exception):
        pass

    def killed_at_2(self):
        if self.step == 2:
            raise Killed
        return train_step(self)

    train_step = SupervisedTraining.train_step
    monkeypatch.setattr(SupervisedTraining, "train_step", killed_at_2)
    part = training(tmp_path / "part.pth")
    part.kept.every_s = 0
    with pytest.raises(Killed):
        part.run()
    monkeypatch.setattr(SupervisedTraining, "train_step", train_step)
    part = training(tmp_path / "part.pth", seed=1)  # its own start does not matter
    assert part.step == 2
    assert part.run() == history
    for name, tensor in whole.classifier.state_dict().items():
        assert torch.equal(part.classifier.state_dict()[name], tensor), name

    monkeypatch.setattr(SupervisedTraining, "train_step", None)
    again = training(tmp_path / "part.pth", seed=2)
    assert again.run() == history  # only reads
    assert not again.classifier.training


def test_the_rate_rises_and_falls_to_0(tmp_path):
    recipe = Recipe(epochs=10, batch_size=1, lr=0.5, warm_epochs=2, weight_decay=0)
    rates = [recipe.learning_rate(step, 100) for step in range(1000)]
    assert max(rates) == rates[200] == 0.5
    assert np.allclose(np.diff(rates[:201]), 0.5 / 201)
    assert rates[600] == pytest.approx(0.25)
    assert 0 < rates[999] < 1e-5


def test_what_training_cannot_go_on_with_is_said(tmp_path):
    with pytest.raises(UserError, match="more than the 100 training images"):
        training(tmp_path / "a.pth", batch_size=101)
    ruined = training(tmp_path / "b.pth", lr=1e30, epochs=9)
    with pytest.raises(UserError, match=r"epoch 1: .* not finite. .*b.pth is not there yet;"):
        ruined.run()
    assert not ruined.kept.path.exists()
    whole = training(tmp_path / "c.pth")
    whole.run()
    half = (tmp_path / "c.pth").read_bytes()[:100_000]
    (tmp_path / "c.pth").write_bytes(half)
    with pytest.raises(UserError, match="damaged"):
        training(tmp_path / "c.pth")


def test_another_process_leaves_the_rest_of_the_config():
    config = parse_config({"model_type": "DDPM", "diffusion": {"n_T": 500}, "dataset": "mnist"})
    assert with_process(config, None) == with_process(config, "DDPM") == config
    other = with_process(config, "EDM")
    assert (other.model_type, other.dataset) == ("EDM", "mnist")


def test_both_backbones_end_in_one_table_and_plot(tiny_yaml, tiny_checkpoint, tmp_path, capsys):
    def run(backbone, *more):
        noisy_classifier.main(
            ["--config", str(tiny_yaml), "--device", "cpu", "--backbone", backbone, "--n_test",
             "60", "--n_train", "700", *more]
        )  # fmt: skip
        return capsys.readouterr().out

    small = ("--depth", "10", "--width", "1", "--epochs", "2", "--warm_epochs", "0")
    assert "WRN" not in run("ddae", "--epochs", "8")
    table = run("wrn", *small)
    assert "WRN-10-1" in table
    assert "DDAE out_2, epoch 1" in table
    folder = tmp_path / "run"
    ddae, wrn = (
        json.loads((folder / f"noisy_DDPM_{name}.json").read_text()) for name in ("ddae", "wrn")
    )
    assert len(ddae["levels"]) == len(wrn["levels"]) == 20
    accuracies = [level["accuracy"] for level in ddae["levels"]]
    assert np.mean(accuracies[:4]) > 0.2 > np.mean(accuracies[-4:])  # an untrained network's
    assert ddae["n_train"] == 700
    assert ddae["epoch"] == 1
    picture = Image.open(folder / "noisy_DDPM.png").convert("RGB")
    colours = {colour for _, colour in picture.getcolors(1_000_000)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # a line for each
    assert (44, 160, 44) not in colours

    state = {path: path.stat().st_mtime_ns for path in folder.glob("noisy_state_*")}
    assert len(state) == 2
    run("wrn", *small)
    again = json.loads((folder / "noisy_DDPM_wrn.json").read_text())
    assert (again["levels"], again["history"]) == (wrn["levels"], wrn["history"])
    assert {path: path.stat().st_mtime_ns for path in folder.glob("noisy_state_*")} == state

    run("ddae", "--epochs", "1", "--mode", "EDM")
    assert len(json.loads((folder / "noisy_EDM_ddae.json").read_text())["levels"]) == 18


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone", "wrn", "--ckpt", "x.pth"], "--backbone wrn and --ckpt exclude"),
        (["--backbone", "wrn", "--epoch", "7"], "--backbone wrn and --epoch exclude"),
        (["--backbone", "ddae", "--width", "0"], "--backbone ddae and --width exclude"),
        (["--backbone", "wrn", "--depth", "12"], "depth must be 6 n"),
        (["--backbone", "wrn", "--epochs", "5"], "--warm_epochs 5"),
        (["--backbone", "wrn", "--lr", "-1"], "--lr must be more than 0"),
        (["--backbone", "wrn", "--n_train", "3"], "--n_train 3: give 10 (an image of each class)"),
        (["--backbone", "wrn", "--n_test", "3"], "--n_test 3: give 10 (an image of each class)"),
        (["--backbone", "ddae", "--blockname", "out_99"], "no block 'out_99'"),
    ],
)
def test_mistakes_are_answered_in_a_line(tiny_yaml, tiny_checkpoint, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        noisy_classifier.main(["--config", str(tiny_yaml), "--device", "cpu", *arguments])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_features_are_read_at_every_level_that_is_scored(process):
    draw = noise_drawer(process, 0, CPU, as_trained=False)
    sigma, _ = draw(torch.Size((20_000, 1, 1, 1)), 0)
    t = process.t(sigma).round().long()
    counts = torch.bincount((18 * (t - 1)) // process.n_T, minlength=18)
    assert counts.min() > 0.8 * 20_000 / 18
    if process.n_T == 1000:
        other = noise_drawer(process, 0, CPU, as_trained=True)
        assert torch.equal(other(torch.Size((20_000, 1, 1, 1)), 0)[0], sigma)


def test_the_classifier_is_trained_where_it_is_scored_whatever_the_denoiser_was_trained_on():
    config = parse_config({"diffusion": {"time": "lognormal", "p_mean": -3.0}})
    process = process_of(with_process(config, None))
    t = process.t(process.training_sigma(torch.linspace(0, 0.9999, 1000)))
    assert t.tolist() == pytest.approx(range(1, 1001), abs=0.01)
