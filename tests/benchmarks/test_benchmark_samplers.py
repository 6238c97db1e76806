"""The benchmark of samplers: its errors against closed forms, its counts, and what it keeps."""

import json
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import benchmarks.sampler_errors
from benchmarks import samplers
from benchmarks.sampler_errors import (
    Bench,
    evaluations_of,
    median_rms,
    rms,
    settings_within,
    steps_within,
)
from benchmarks.sampler_report import tables
from checkpoint import TrainedModel, load_denoiser
from config.schema import DDPMDiffusion
from datasets import read_dataset
from model.DDPM import DDPM
from model.samplers import SAMPLERS
from sampling import sample, solve
from utils import ImageNoise

S = 0.5  # standard deviation of the data


class GaussianDDPM(DDPM):
    """The exact D for N(0, S^2), which counts how often it is asked."""

    calls = 0

    def forward(self, x, sigma, y=None):
        self.calls += 1
        return x * S**2 / (S**2 + sigma.view(-1, 1, 1, 1) ** 2)


@pytest.fixture
def denoiser():
    return GaussianDDPM(torch.nn.Linear(1, 1), DDPMDiffusion())


@pytest.fixture
def bench(denoiser, tiny_config, tmp_path):
    return Bench(TrainedModel(denoiser, tiny_config, 0, tmp_path / "none.pth"), 4, 3)


def closed_form(bench: Bench) -> torch.Tensor:
    """The ODE takes x at sigma_max to x sqrt((s^2 + low^2) / (s^2 + high^2)) at sigma_min."""
    low, high = bench.model.denoiser.sigma_range
    config = bench.model.config
    noise = ImageNoise(config.seed, range(bench.n), config.network.image_shape, "cpu").draw()
    x = high * noise.double() * math.sqrt((S**2 + low**2) / (S**2 + high**2))
    return x * S**2 / (S**2 + low**2)


# --- steps and evaluations


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("most", [1, 2, 5, 10, 19, 20])
def test_the_stated_number_of_evaluations_is_the_true_one(bench, denoiser, sampler, most):
    settings = settings_within(denoiser, sampler, most, "karras", False)
    denoiser.calls = 0
    bench.solve(settings)
    batches = 2  # 4 images, 3 at a time
    assert denoiser.calls == batches * evaluations_of(sampler, settings.steps)
    assert evaluations_of(sampler, settings.steps) <= most
    assert evaluations_of(sampler, settings.steps + 1) > most


def test_two_evaluations_a_step_fit_into_an_odd_number():
    assert [steps_within("heun", most) for most in (5, 10, 20, 50, 100)] == [3, 5, 10, 25, 50]
    assert [steps_within("ddim", most) for most in (5, 10, 20, 50, 100)] == [5, 10, 20, 50, 100]


# --- the exact images


def test_the_exact_images_are_the_closed_form_and_their_own_estimate_of_error_holds(
    bench, tmp_path
):
    expected = closed_form(bench)
    exact, halved = (bench.exact(steps, False, tmp_path) for steps in (200, 100))
    assert expected.std() > 0.3
    error = rms(exact - expected)
    assert error < 1e-3
    assert error < rms(exact - halved)
    assert rms(halved - expected) / error == pytest.approx(4, rel=0.2)  # second order


def test_errors_are_those_against_the_closed_form(bench, denoiser, tmp_path):
    exact, expected = bench.exact(400, False, tmp_path), closed_form(bench)
    for sampler in ("ddim", "dpmpp_2m"):
        settings = settings_within(denoiser, sampler, 10, "log_snr", False)
        row = bench.measure(settings, exact)
        assert row["error"] == pytest.approx(rms(bench.solve(settings) - expected), rel=0.02)
        assert row["seconds_per_image"] > 0
        assert row["evaluations"] == 10
    for sampler in ("ddpm", "sde", "pc"):
        settings = settings_within(denoiser, sampler, 3, "karras", False)
        assert bench.measure(settings, exact)["error"] is None


def test_the_fastest_of_several_runs_counts(bench, denoiser, tmp_path, monkeypatch):
    clock = iter([0, 0.4, 10, 10.2, 20, 20.3, 30, 30.4])
    monkeypatch.setattr(benchmarks.sampler_errors, "TIMED_S", 1.0)
    clocks = {"processor time": lambda: next(clock)}
    monkeypatch.setattr(benchmarks.sampler_errors, "CLOCKS", clocks)
    settings = settings_within(denoiser, "ddim", 3, "karras", False)
    row = bench.measure(settings, torch.zeros(4, 1, 8, 8))
    assert row["seconds_per_image"] == pytest.approx(0.2 / bench.n)
    assert list(clock) == []  # the sum came over a second with the fourth


def test_one_image_astray_moves_the_rms_and_not_the_median():
    difference = torch.full((5, 1, 8, 8), 0.01, dtype=torch.float64)
    difference[3] = -2.0
    assert rms(difference) == pytest.approx(math.sqrt((4 * 0.01**2 + 4) / 5))
    assert median_rms(difference) == pytest.approx(0.01)


def test_exact_images_are_kept_and_made_anew_when_damaged(bench, denoiser, tmp_path):
    first = bench.exact(6, False, tmp_path)
    calls = denoiser.calls
    assert torch.equal(bench.exact(6, False, tmp_path), first)
    assert denoiser.calls == calls
    (kept,) = tmp_path.glob("samplers_reference_*.npy")
    kept.write_bytes(kept.read_bytes()[:300])
    assert torch.equal(bench.exact(6, False, tmp_path), first)
    assert denoiser.calls == 2 * calls
    bench.exact(6, True, tmp_path)
    bench.exact(5, False, tmp_path)
    assert len(list(tmp_path.glob("samplers_reference_*.npy"))) == 3


def test_images_are_what_solve_gives_rounded_and_clipped(denoiser, tiny_config):
    settings = settings_within(denoiser, "ddim", 5, "karras", False)
    shape = tiny_config.network.image_shape
    x0 = solve(denoiser, settings, ImageNoise(0, [0, 1], shape, "cpu").draw)
    images = sample(denoiser, settings, [0, 1], 0, shape)
    assert x0.dtype == torch.float64
    assert images.dtype == torch.uint8
    expected = (x0.clamp(-1, 1) + 1) * 127.5
    assert (images - expected).abs().max() <= 0.5 + 1e-4


# --- the job


@pytest.fixture(autouse=True)
def one_run_each(monkeypatch):
    monkeypatch.setattr(benchmarks.sampler_errors, "TIMED_S", 1e-9)


@pytest.fixture
def call(tiny_yaml, tiny_checkpoint, tmp_path):
    def call(*more: str) -> list[dict]:
        arguments = ["--config", str(tiny_yaml), "--device", "cpu", "--n", "3",
                     "--evaluations", "2,5", "--reference_steps", "3"]  # fmt: skip
        assert samplers.main([*arguments, *more]) == 0
        return json.loads((tmp_path / "run" / "samplers.json").read_text())["rows"]

    return call


def test_the_job_writes_a_row_for_every_sampler_and_number(call, capsys, tmp_path):
    rows = call()
    assert {(row["sampler"], row["evaluations"]) for row in rows} == {
        (name, most if sampler.per_step == 1 else most - (most + 1) % 2)
        for name, sampler in SAMPLERS.items()
        for most in (2, 5)
    }
    at = {(row["sampler"], row["steps"]): row for row in rows}
    assert at["heun", 3]["error"] == 0  # it is the reference itself
    assert at["ddim", 5]["error"] > 0
    assert at["sde", 5]["error"] is None
    output = capsys.readouterr().out
    assert "digits (DDPM), epoch 1, 3 images, spacing karras, cpu" in output
    assert "heun takes 2 evaluations a step and one in the last: 1, 5 here" in output
    assert "no FID: --fid adds it" in output
    header = next(line for line in output.splitlines() if line.startswith("evaluations of D"))
    assert header.split()[-2:] == ["2", "5"]
    markdown = (tmp_path / "run" / "samplers.md").read_text()
    assert (
        f"| ddim | {at['ddim', 2]['error']:.2g} ({at['ddim', 2]['median_error']:.2g}) |" in markdown
    )
    assert min(Image.open(tmp_path / "run" / "samplers.png").size) > 500


def test_finished_rows_are_kept(call):
    """Their seconds are: no second measurement takes the same to the last bit."""
    first = call()
    assert call() == first
    rows = call("--evaluations", "2,4,5")  # heun at 4 is heun at 3
    assert rows[: len(first)] == first
    assert {row["steps"] for row in rows[len(first) :]} == {2, 4}
    assert ("ddim", 4) in {(row["sampler"], row["steps"]) for row in rows}
    assert len({(row["sampler"], row["steps"]) for row in rows}) == len(rows)


def test_other_settings_are_measured_and_stand_beside_the_old(call):
    rows = call("--evaluations", "2")
    changes = [("--seed", "3"), ("--num_images", "2"), ("--spacing", "log_snr"), ("--clip",),
               ("--reference_steps", "4")]  # fmt: skip
    for change in changes:
        before, rows = rows, call("--evaluations", "2", *change)
        assert rows[: len(before)] == before
        assert len(rows) == len(before) + len(SAMPLERS)


def test_a_killed_call_goes_on_where_it_was(call, monkeypatch, tmp_path):
    ticks = iter(range(10))  # two a measurement

    def clock() -> float:
        try:
            return float(next(ticks))
        except StopIteration:
            raise KeyboardInterrupt from None

    with monkeypatch.context() as patch:
        patch.setitem(benchmarks.sampler_errors.CLOCKS, "processor time", clock)
        with pytest.raises(SystemExit):
            call()
    kept = json.loads((tmp_path / "run" / "samplers.json").read_text())["rows"]
    assert [row["seconds_per_image"] for row in kept] == [1 / 3] * 5
    rows = call()
    assert rows[:5] == kept
    assert len({(row["sampler"], row["steps"]) for row in rows}) == len(rows) == 2 * len(SAMPLERS)


def colour_features(images: np.ndarray) -> np.ndarray:
    """(N, 2): the mean of an image's pixels, and its square."""
    mean = images.mean(axis=(1, 2, 3), dtype=np.float64)
    return np.stack([mean, mean**2], axis=1)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Between Gaussians fitted to the rows of a and b."""
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    between = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return between + np.trace(covariances[0] + covariances[1] - 2 * root)


def test_fid_is_added_to_rows_that_are_there(
    call, monkeypatch, tmp_path, tiny_config, tiny_checkpoint
):
    """Inception's weights are not here: two numbers of an image stand for its features."""
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"none")
    monkeypatch.setattr(benchmarks.sampler_errors, "load_inception", lambda *_: None)
    monkeypatch.setattr(
        benchmarks.sampler_errors, "inception_features",
        lambda model, images, batch_size, title: colour_features(images),
    )  # fmt: skip
    arguments = ("--evaluations", "2", "--data_dir", str(tmp_path / "data"))
    plain = call(*arguments)
    scored = (*arguments, "--fid", "6", "--inception", str(weights))
    rows = call(*scored)
    assert [row | {"fid": None} for row in rows] == [row | {"fid": None} for row in plain]
    denoiser = load_denoiser(tiny_checkpoint).denoiser
    real = colour_features(read_dataset(tiny_config, tmp_path, "train").images)
    for row in rows:
        settings = settings_within(denoiser, row["sampler"], 2, "karras", False)
        drawn = sample(denoiser, settings, range(6), tiny_config.seed, (1, 8, 8)).numpy()
        assert row["fid"]["value"] == pytest.approx(frechet(colour_features(drawn), real), rel=1e-3)
        assert row["fid"]["images"] == 6
    assert call(*scored) == rows


def test_tables_compare_with_ddim_at_the_same_number():
    def row(seconds, error, fid):
        fid = {"value": fid, "images": 5000}
        errors = {"error": error, "median_error": error and error / 5}
        return {"evaluations": 5, "seconds_per_image": seconds, "fid": fid, **errors}

    rows = {
        ("ddim", 5): row(0.02, 0.25, 31.416), ("ddim", 10): row(0.04, 0.125, 20),
        ("sde", 5): row(0.03, None, 40), ("sde", 10): row(0.05, None, 30),
    }  # fmt: skip
    found = tables(rows, "wall time", fid=True)
    assert [rows[1:] for rows in found.values()] == [
        [["ddim", "0.25 (0.05)", "0.12 (0.025)"]],
        [["ddim", "20.0 (1.00)", "40.0 (1.00)"], ["sde", "30.0 (1.50)", "50.0 (1.25)"]],
        [["ddim", "31.42", "20.00"], ["sde", "40.00", "30.00"]],
    ]
    assert list(found)[-1] == "FID-5k against all training images"
    assert len(tables(rows, "wall time", fid=False)) == 2


@pytest.mark.parametrize(("wrong", "message"), [
    (("--evaluations", "0,5"), "at least 1"),
    (("--n", "0"), "at least 1"),
    (("--reference_steps", "1"), "--reference_steps 1"),
    (("--inception", "x"), "give --fid too"),
    (("--fid", "1"), "--fid 1"),
    (("--fid", "5", "--inception", "nowhere"), "nowhere"),
    (("--evaluations", "1001", "--spacing", "trailing"), "there are 1000 timesteps"),
    (("--epoch", "7"), "no such checkpoint"),
])  # fmt: skip
def test_mistakes_end_with_code_2_before_anything_is_drawn(call, tmp_path, wrong, message, mistake):
    with mistake(message):
        call(*wrong)
    assert not list((tmp_path / "run").glob("samplers*"))
