"""Heads against scikit-learn and torch's own modules; features against their definition."""

import dataclasses
import io
import os
import signal

import numpy as np
import pytest
import torch
from probe_helpers import CPU, RECIPE, noisy_pixels, single, toy_dataset, toy_source
from torch import nn

import checkpoint
import datasets
from config import parse_config
from datasets import Batches, Batching, Dataset
from evaluation.probe.cells import Cell, CellResult, Outcome, cells_of
from evaluation.probe.features import Extractor, network_source, pixel_source
from evaluation.probe.heads import HeadBank
from evaluation.probe.paper_protocol import fit_paper
from evaluation.probe.probe import holdout, probe_cached
from model.models import build_denoiser
from support.errors import Stopped, UserError
from utils import generator


@pytest.fixture
def toy() -> Dataset:
    return toy_dataset()


# --- heads


def test_a_head_starts_as_torchs_linear_does_and_from_its_cell_alone():
    cells = {single(t, block): 64 for t in range(40) for block in ("a", "b")}
    together = HeadBank(cells, 10, copies=2, seed=3).heads()
    a, b = single(7, "a"), single(7, "b")
    alone = HeadBank({b: 64}, 10, copies=1, seed=3).heads()
    assert torch.equal(together[b][1].weight, alone[b][0].weight)
    assert not torch.equal(together[a][0].weight, together[b][0].weight)
    values = torch.cat([heads[0].weight.flatten() for heads in together.values()])
    linear = nn.Linear(64, 800).weight.flatten()
    assert abs(values.std() / linear.std() - 1) < 0.02
    assert 0.12 < values.abs().max() <= 0.125  # uniform up to 1 / sqrt(64)


def by_hand(dataset: Dataset, t: int, block: str, initial, seed: int):
    """The paper's recipe for one cell, with torch's modules."""
    linear = nn.Linear(initial.weight.shape[1], 3)
    linear.load_state_dict({"weight": initial.weight, "bias": initial.bias})
    adam = torch.optim.Adam(linear.parameters(), lr=RECIPE.lrate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, RECIPE.n_epoch)
    batches = Batches(
        dataset.images, dataset.labels, RECIPE.batch_size, CPU,
        Batching(seed, shuffle=True, flip=True, crop=True),
    )  # fmt: skip
    for epoch in range(RECIPE.n_epoch):
        for i in range(batches.steps_per_epoch):
            step = epoch * batches.steps_per_epoch + i
            x0, y = batches[step]
            noise = torch.randn(x0.shape, generator=generator("cpu", seed, "probe", step, t))
            adam.zero_grad()
            logits = linear(noisy_pixels(x0, t, noise, [block])[block])
            nn.functional.cross_entropy(logits, y).backward()
            adam.step()
        schedule.step()
    return linear


def test_heads_fitted_together_equal_each_one_fitted_alone_by_torch(toy, tmp_path):
    extractor = Extractor(toy_source(), CPU, seed=5)
    widths = {single(t, block): 32 if block == "c" else 64 for t in (1, 5) for block in "abc"}
    heads = fit_paper(extractor, toy, holdout(toy.labels), list(widths), RECIPE, True, tmp_path)
    initial = HeadBank(widths, 3, copies=1, seed=5).heads()
    for cell in widths:
        oracle = by_hand(toy, cell.t, cell.block, initial[cell][0], seed=5)
        torch.testing.assert_close(heads[cell][1].weight, oracle.weight, atol=2e-5, rtol=1e-4)
        assert not torch.allclose(heads[cell][1].weight, initial[cell][0].weight, atol=1e-2)


def test_the_comparing_heads_never_see_the_held_out_labels(toy, tmp_path):
    held = holdout(toy.labels)
    wrong = dataclasses.replace(toy, labels=np.where(held, (toy.labels + 1) % 3, toy.labels))
    extractor = Extractor(toy_source(), CPU)
    cell = single(1, "a")
    part, whole = fit_paper(extractor, toy, held, [cell], RECIPE, True, tmp_path)[cell]
    part2, whole2 = fit_paper(extractor, wrong, held, [cell], RECIPE, True, tmp_path)[cell]
    assert torch.equal(part.weight, part2.weight)
    assert not torch.allclose(whole.weight, whole2.weight, atol=1e-3)


class Killed(Exception):
    pass


@pytest.mark.parametrize("killed_at", [1, 7])
def test_an_interrupted_fit_goes_on_bit_for_bit(toy, tmp_path, killed_at):
    calls = 0

    def dies(*args):
        nonlocal calls
        calls += 1
        if calls == killed_at + 2:  # the first call only asks for widths
            raise Killed
        return noisy_pixels(*args)

    def fit(features, folder):
        extractor = Extractor(toy_source(features), CPU)
        held, cells = holdout(toy.labels), [single(2, "a"), single(2, "c")]
        return fit_paper(extractor, toy, held, cells, RECIPE, False, folder, save_every_s=0)

    with pytest.raises(Killed):
        fit(dies, tmp_path / "killed")
    resumed = fit(noisy_pixels, tmp_path / "killed")
    whole = fit(noisy_pixels, tmp_path / "whole")
    for cell in whole:
        for ours, theirs in zip(resumed[cell], whole[cell], strict=True):
            assert torch.equal(ours.weight, theirs.weight)
            assert torch.equal(ours.bias, theirs.bias)


def test_a_signal_lets_the_batch_end_and_saves(toy, tmp_path):
    def features(x0, t, noise, blocks):
        if len(x0) > 1:  # not where it only asks for widths
            os.kill(os.getpid(), signal.SIGTERM)
        return noisy_pixels(x0, t, noise, blocks)

    extractor = Extractor(toy_source(features), CPU)
    with pytest.raises(Stopped, match=r"stopped at batch 1 of .* and saved"):
        fit_paper(extractor, toy, holdout(toy.labels), [single(2, "a")], RECIPE, False, tmp_path)
    (state,) = tmp_path.glob("*.pth")
    assert checkpoint.load_state(state)["step"] == 1


def test_heads_that_are_not_finite_are_not_saved(toy, tmp_path):
    def features(x0, t, noise, blocks):
        return {block: x0.new_full((len(x0), 64), np.nan) for block in blocks}

    extractor = Extractor(toy_source(features), CPU)
    with pytest.raises(UserError, match="the heads are no longer finite at batch"):
        fit_paper(extractor, toy, holdout(toy.labels), [single(2, "a")], RECIPE, False, tmp_path)
    assert not list(tmp_path.glob("*.pth"))


def test_a_damaged_state_is_refused(toy, tmp_path):
    def fit():
        args = (toy, holdout(toy.labels), [single(2, "a")], RECIPE, False, tmp_path)
        return fit_paper(Extractor(toy_source(), CPU), *args)

    fit()
    (state,) = tmp_path.glob("*.pth")
    other = io.BytesIO()
    torch.save({"step": 1}, other)
    for damaged in (state.read_bytes()[:100], b"hello", b"text", other.getvalue()):
        state.write_bytes(damaged)
        with pytest.raises(UserError, match="delete it"):
            fit()


# --- features


def test_features_are_those_of_the_denoiser_whatever_the_batch_size(tiny_config):
    torch.manual_seed(0)
    denoiser = build_denoiser(tiny_config).eval()
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (70, 1, 8, 8), dtype=np.uint8)
    dataset = Dataset("toy", "test", images, np.zeros(70, np.int64), ["x"])
    source = network_source(denoiser, "0", use_amp=False)
    large = Extractor(source, CPU, seed=1)(dataset, [1, 21], ["out_1", "out_3"])
    small = Extractor(source, CPU, seed=1, batch_size=9)(dataset, [1, 21], ["out_1", "out_3"])
    x0 = torch.from_numpy(images).float() / 127.5 - 1
    noise = [
        torch.randn(64, 1, 8, 8, generator=generator("cpu", 1, "features", "test", 21, chunk))
        for chunk in (0, 1)
    ]
    with torch.no_grad():
        oracle = denoiser.features(x0, 21, torch.cat(noise)[:70], ["out_3"])["out_3"]
    np.testing.assert_allclose(large[21, "out_3"], oracle, atol=1e-6)
    for cell in large:
        np.testing.assert_allclose(large[cell], small[cell], atol=1e-6)


def test_kept_features_are_read_and_only_what_is_missing_is_computed(toy, tmp_path):
    asked = []

    def counting(x0, t, noise, blocks):
        asked.append((t, sorted(blocks)))
        if t == 9:
            raise Killed
        return noisy_pixels(x0, t, noise, blocks)

    def extract(timesteps, blocks, seed=0):
        source = toy_source(counting)
        return Extractor(source, CPU, seed, folder=tmp_path)(toy, timesteps, blocks)

    first = extract([1], ["a"])
    with pytest.raises(Killed):
        extract([1, 5, 9], ["a", "b"])
    again = extract([1, 5], ["a", "b"])
    assert asked == [(1, ["a"]), (1, ["b"]), (5, ["a", "b"]), (9, ["a", "b"])]
    np.testing.assert_array_equal(first[1, "a"], again[1, "a"])
    assert not np.allclose(extract([1], ["a"], seed=1)[1, "a"], again[1, "a"])


def test_a_device_has_one_copy_of_the_images_for_all_timesteps(toy, monkeypatch):
    monkeypatch.setattr(datasets, "fits_on", lambda device, n_bytes: True)
    copies = []

    def counting(x0, t, noise, blocks):
        copies.append([copy.data_ptr() for copy in datasets._copies.values()])
        return {"a": x0.flatten(1)}

    Batches(toy.images, toy.labels, 8, torch.device("cpu"))
    Extractor(toy_source(counting), torch.device("cpu"))(toy, [1, 5], ["a"])
    assert len(copies) == 2
    assert copies[0] == copies[1]
    assert len(copies[0]) == 1


def test_pixels_are_the_pixels(toy):
    features = Extractor(pixel_source(), CPU)(toy, [0], ["pixels"])[0, "pixels"]
    np.testing.assert_allclose(features, toy.images.reshape(150, 64) / 127.5 - 1, atol=1e-6)


def test_features_that_are_not_finite_are_refused(toy):
    source = toy_source(lambda x0, *_: {"a": x0.flatten(1) / 0})
    with pytest.raises(UserError, match="a at t=3 are not finite"):
        Extractor(source, CPU)(toy, [3], ["a"])


# --- selection


def test_holdout_is_a_tenth_of_each_class():
    labels = np.repeat([0, 1, 2], [100, 40, 3])
    held = holdout(labels)
    assert np.bincount(labels[held]).tolist() == [10, 4, 1]
    assert (held == holdout(labels)).all()
    with pytest.raises(UserError, match="two images"):
        holdout(np.arange(5))


def test_the_best_cell_is_picked_without_the_test_set_and_among_its_own_kind():
    def result(validation, test, *timesteps):
        (cell,) = cells_of(toy_source(), [timesteps], [["a"]])
        return CellResult(cell, 8, validation, test, (0, 1))

    cells = [result(0.6, 0.9, 1), result(0.7, 0.5, 2), result(0.7, 0.6, 3)]
    combined = [result(0.8, 0.95, 1, 2), result(0.9, 0.93, 1, 3)]
    outcome = Outcome([combined[0], *cells, combined[1]], 1.0, None)
    assert outcome.best() is cells[1]
    assert outcome.best_on_test() is cells[0]
    assert outcome.best(combined=True) is combined[1]
    assert Outcome(combined, 1.0, None).best() is None
    assert Outcome.from_record(outcome.record()) == outcome


def test_cached_probe_reads_classes_from_features_and_not_from_random_labels(toy):
    test = dataclasses.replace(toy, split="test")
    cells = [single(1, "a"), single(1, "b")]
    results = probe_cached(Extractor(toy_source(), CPU), toy, test, cells)
    assert [result.cell for result in results] == cells
    assert results[0].validation_accuracy > 0.6
    shuffled = np.random.default_rng(0).permutation(toy.labels)
    noise = dataclasses.replace(toy, labels=shuffled)
    (result,) = probe_cached(Extractor(toy_source(), CPU), noise, noise, cells[:1])
    assert result.test_accuracy > 0.6  # memorised: it was fitted on these
    assert result.validation_accuracy < 0.6


# --- noise levels


@pytest.mark.parametrize("process", ["DDPM", "EDM"])
def test_a_sigma_is_a_timestep_between_two_and_exact_at_whole_ones(tiny_config, process):
    config = parse_config(tiny_config.model_dump() | {"model_type": process, "diffusion": {}})
    denoiser = build_denoiser(config).eval()
    source = network_source(denoiser, "0", use_amp=False)
    for t in (1, 2, 9, denoiser.n_T):
        found = source.timestep(source.sigma(t))
        assert found == t
        assert isinstance(found, int)  # so that its features are those of --timesteps
    t = source.timestep(0.06)
    assert t == pytest.approx({"DDPM": 15.004, "EDM": 4.001}[process], abs=1e-3)
    assert t != round(t)
    assert source.sigma(t) == 0.06
    x0, noise = torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8)
    features = source.features(x0, t, noise, ["out_1"])["out_1"]
    between = denoiser.sigma(torch.tensor([float(t)])).expand(2)
    s = between.view(-1, 1, 1, 1)
    oracle = denoiser.net(denoiser.c_in(s) * s * noise, denoiser.c_noise(between), blocks=["out_1"])
    torch.testing.assert_close(features, oracle["out_1"])
    low, high = denoiser.sigma_range
    for sigma in (0.9 * low, 1.1 * high):
        with pytest.raises(UserError, match=rf"outside {low:g}\.\.{high:g}"):
            source.timestep(sigma)
    with pytest.raises(UserError, match="no noise"):
        pixel_source().timestep(0.06)


def test_a_whole_number_is_one_timestep_whatever_its_type(toy, tmp_path):
    """21.0 drew other noise than 21, and its file had another name."""

    def extract(t, folder=None):
        return Extractor(toy_source(), CPU, folder=folder)(toy, [t], ["a"])[t, "a"]

    np.testing.assert_array_equal(extract(5), extract(5.0))
    assert not np.array_equal(extract(5), extract(5.5))
    extract(5.0, tmp_path)
    assert [path.name for path in tmp_path.rglob("*.npy")] == ["t5_a.npy"]
    assert cells_of(toy_source(), [[5.0], [5], [1, 5.0]], [["a"]]) == (
        single(5, "a"), Cell("1+5", "a", ((1, "a"), (5, "a"))),
    )  # fmt: skip
    fits = [
        fit_paper(Extractor(toy_source(), CPU), toy, holdout(toy.labels), cells, RECIPE, False, at)
        for at in (tmp_path / "int", tmp_path / "float")
        for cells in [cells_of(toy_source(), [[5 if at.name == "int" else 5.0]], [["a"]])]
    ]
    (ours,), (theirs,) = (fit.values() for fit in fits)
    assert torch.equal(ours[1].weight, theirs[1].weight)
