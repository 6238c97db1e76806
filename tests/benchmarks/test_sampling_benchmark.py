"""benchmarks/sampling.py: our samplers beside the pipelines of diffusers; benchmarks/memory.py."""

import pytest
import torch
from diffusers_folders import N_T, save_unet

from benchmarks import sampling
from benchmarks.memory import CLEAR, megabytes, peak_bytes
from support.files import read_json

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_unet(tmp_path_factory.mktemp("unet"), schedule=None)


def test_both_draw_the_same_images_and_the_record_holds_what_is_printed(folder, tmp_path, capsys):
    argv = ["--ckpt", str(folder), "--device", "cpu", "--batch_size", "2", "--rounds", "2"]
    argv += ["--ddim_steps", "10", "--dpmpp_2m_steps", "8", "--memory_batches", "4,1"]
    assert sampling.main([*argv, "--output_dir", str(tmp_path / "out")]) == 0
    (path,) = (tmp_path / "out").glob("sampling_*.json")
    record = read_json(path)
    assert list(record["samplers"]) == list(sampling.SCHEDULES)
    printed = capsys.readouterr().out
    for name, row in record["samplers"].items():
        assert row["largest_difference"] < 1e-3, name
        assert min(row["images_per_s"]["ours"] + row["images_per_s"]["diffusers"]) > 0
        assert f"{row['times_diffusers']:.2f}" in printed
    assert [row["batch_size"] for row in record["memory"]] == [1, 4]


def test_images_of_another_schedule_differ(folder):
    """So that the comparison above could fail."""
    pair = sampling.Pair(str(folder), CPU, False)
    theirs = sampling._pixels(pair.pipeline("ddim", 10)(2))
    ours = pair.ours_of(pair.settings("ddim", 8), 2)
    assert (ours - theirs).abs().max() > 1e-2


def test_the_random_network_is_not_clipped_everywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "SIDE", 8)
    small = {"block_out_channels": (32, 32), "layers_per_block": 1}
    monkeypatch.setattr(sampling, "DIFFUSERS", small)
    pair = sampling.Pair(sampling.random_unet(tmp_path), CPU, False)
    assert pair.shape == (3, 8, 8)
    assert pair.denoiser.n_T == sampling.N_T != N_T
    images = pair.ours_of(pair.settings("dpmpp_2m", 4), 2)
    assert ((images > 0) & (images < 1)).float().mean() > 0.9


def test_without_diffusers_a_line_says_so(monkeypatch, mistake):
    monkeypatch.setattr(sampling, "find_spec", lambda name: None)
    with mistake("no diffusers to compare with: pip install"):
        sampling.main([])


def test_another_checkpoint_is_refused(tiny_checkpoint, mistake):
    with mistake("not a UNet that diffusers saved"):
        sampling.main(["--ckpt", str(tiny_checkpoint), "--device", "cpu"])


@pytest.mark.skipif(not CLEAR.exists(), reason="Linux's")
def test_the_peak_of_a_call_is_seen_each_time():
    def fill(n: int) -> None:
        torch.ones(n, dtype=torch.uint8)

    large, small = (peak_bytes(lambda n=n: fill(n), CPU) for n in (200_000_000, 50_000_000))
    assert large == pytest.approx(200e6, rel=0.1)
    assert small == pytest.approx(50e6, rel=0.1)  # the larger one before it is forgotten
    assert megabytes(large) == "200"
    assert megabytes(None) == "-"
