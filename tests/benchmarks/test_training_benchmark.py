"""benchmarks/training.py: our step beside other projects' loops."""

import json

import numpy as np
import pytest
import torch
from training_helpers import CPU, dataset

from benchmarks import training
from benchmarks.record import images_for, synthetic, write_record
from benchmarks.training_loops import Ours, Usual
from config import load_config, parse_config
from datasets import to_model_range
from support.errors import UserError


def test_ratios_are_of_each_round_and_then_their_median():
    rows = {
        "ours": {
            "images_per_s": [20.0, 30.0, 100.0], "gflops_forward": 2.0,
            "step_s": [1.0, 1.0, 1.0], "forward_backward_s": [0.9, 0.8, 0.95],
        },
        "usual": {"images_per_s": [10.0, 10.0, 100.0], "gflops_forward": 2.0},
    }  # fmt: skip
    found = {"loops": rows, "rates": {"conv": 1.0, "matmul": 2.0}}
    values = training.summary("ours", found)
    assert values["times_usual"] == 2.0  # of 2, 3 and 1; of the medians it would be 3
    assert values["images_per_s"] == 30.0
    assert values["tflops"] == pytest.approx(3 * 2 * 30 / 1000)
    assert values["share_of_matrix_products"] == pytest.approx(0.09)
    assert values["beside_forward_and_backward"] == pytest.approx(0.1)
    assert "beside_forward_and_backward" not in training.summary("usual", found)


def test_the_usual_loop_learns_the_same_network_from_the_same_pixels(tiny_config):
    config = tiny_config.model_copy(update={"batch_size": 8, "flip": False})
    train = dataset(40)
    ours, usual = (kind(config, train, CPU, False) for kind in (Ours, Usual))
    for a, b in zip(ours.net.parameters(), usual.net.parameters(), strict=True):
        assert torch.equal(a, b)
    batch = next(usual.batches)
    pixels = to_model_range(torch.from_numpy(train.images))
    pixels = torch.cat([pixels, pixels.flip(-1)])
    assert all(any(torch.allclose(image, x, atol=1e-6) for x in pixels) for image in batch)
    usual.steps(20)
    usual.close()
    assert np.mean(usual.losses[-5:]) < 0.9 * np.mean(usual.losses[:3])


def test_a_package_that_lacks_is_named(monkeypatch):
    monkeypatch.setattr(training, "find_spec", lambda name: None)
    assert training.missing("ours") is None
    assert "accelerate, einops: pip install -r benchmarks" in training.missing("ddpm_pytorch")


def test_a_loop_that_fails_is_a_line_and_the_others_go_on(tiny_config, monkeypatch):
    class Broken(Usual):
        def build(self):
            raise TypeError("unexpected keyword\nand more")

    monkeypatch.setitem(training.LOOPS, "diffusers", Broken)
    monkeypatch.setattr(training, "missing", lambda name: None)
    monkeypatch.setattr(training, "device_rates", lambda *_: {"conv": 1.0, "matmul": 1.0})
    config = tiny_config.model_copy(update={"batch_size": 8})
    found = training.measure(config, dataset(40), CPU, False, ["diffusers", "ours"], 1, 1)
    assert found["failed"] == {"diffusers": "TypeError: unexpected keyword"}
    assert list(found["loops"]) == ["ours"]
    assert "diffusers: not measured: TypeError: unexpected keyword" in training.report(found)


def test_a_loop_of_ours_that_fails_is_no_line(tiny_config, monkeypatch):
    def broken(*args, **kwargs):
        raise TypeError("a fault of ours")

    monkeypatch.setitem(training.LOOPS, "usual", broken)
    with pytest.raises(TypeError, match="a fault of ours"):
        training.built(["usual"], tiny_config, None, torch.device("cpu"), use_amp=False)


def test_images_are_the_datasets_or_made_up(tmp_path):
    config = load_config("config/DDPM_ddpm.yaml")
    train, what = images_for(config, tmp_path, 10)
    assert train.images.shape == (10, 3, 32, 32)
    assert what == "synthetic images in the shape of cifar10"
    assert np.array_equal(train.images, synthetic(config, 10).images)
    (tmp_path / "cifar-100-python").mkdir()  # is not CIFAR-10
    assert "synthetic" in images_for(config, tmp_path, 10)[1]
    (tmp_path / "cifar-10-batches-py").mkdir()  # is, and is empty
    with pytest.raises(UserError, match="a file is missing"):
        images_for(config, tmp_path, 10)


def test_a_record_is_called_after_the_device(tmp_path):
    record = {"machine": {"name": "NVIDIA GeForce RTX 3060 (Ti)"}}
    path = write_record(tmp_path, "gpu", record)
    assert path.name == "gpu_nvidia_geforce_rtx_3060_ti.json"
    for asked, name in ((["b", "a"], "gpu"), (["b"], "gpu_b")):
        path = write_record(tmp_path, "gpu", record, (asked, ["a", "b"]))
        assert path.name == f"{name}_nvidia_geforce_rtx_3060_ti.json"


@pytest.mark.parametrize("more", [{"accumulate": 2}, {"distill": {"loss": "regression"}}])
def test_forward_and_backward_alone_are_of_the_batches_of_a_step(tiny_config, more):
    config = parse_config({**tiny_config.model_dump(), **more})
    loop = Ours(config, synthetic(config, 300), CPU, use_amp=False)
    seen = []
    handle = loop.net.register_forward_pre_hook(lambda net, args: seen.append(len(args[0])))
    loop.forward_backward()
    handle.remove()
    assert seen == [config.batch_size] * config.accumulate


@pytest.mark.slow
def test_all_loops_in_both_precisions(tiny_yaml, tmp_path, capsys):
    argv = ["--config", str(tiny_yaml), "--device", "cpu", "--rounds", "2", "--steps", "1"]
    assert training.main([*argv, "--output_dir", str(tmp_path / "out")]) == 0
    (path,) = (tmp_path / "out").glob("training_*.json")
    record = json.loads(path.read_text())
    assert record["command"].startswith("python -m benchmarks.training --config")
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    found = record["precisions"]["float32"]
    assert found["loops"].keys() | found["failed"].keys() == set(training.LOOPS)
    for row in found["loops"].values():
        assert len(row["images_per_s"]) == 2
        assert min(row["images_per_s"]) > 0
    assert found["summary"]["usual"]["times_usual"] == 1
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed or f"\n{name}:" in printed for name in training.LOOPS)
