"""benchmarks/scaling.py: time and memory against what they should grow as."""

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import scaling
from benchmarks.scaling_parts import data_row, kept_bytes, start_row, write_images
from support.errors import UserError
from support.files import read_json

CPU = torch.device("cpu")


def test_what_autograd_keeps_is_counted_once_and_without_weights():
    net, x = nn.Linear(100, 50, bias=False), torch.randn(10, 100)
    assert kept_bytes(net, lambda: net(x).sum()) == 10 * 100 * 4  # of a product its input
    gelu = nn.Sequential(net, nn.GELU())  # of which the input is kept too
    assert kept_bytes(gelu, lambda: gelu(x).sum()) == 10 * (100 + 50) * 4


def test_wider_networks_have_the_flops_of_their_width(tiny_yaml, tmp_path, capsys):
    argv = ["--config", str(tiny_yaml), "--device", "cpu", "--parts", "width", "--batch_size", "2"]
    argv += ["--widths", "64,32", "--rounds", "1", "--output_dir", str(tmp_path / "out")]
    argv += ["--set", "accumulate=2"]
    assert scaling.main(argv) == 0
    (path,) = (tmp_path / "out").glob("scaling_*.json")
    narrow, wide = read_json(path)["parts"]["width"]
    assert (narrow["value"], wide["value"]) == (32, 64)
    assert 3 < wide["train_gflops"] / narrow["train_gflops"] < 4.2
    assert 3 < wide["parameters"] / narrow["parameters"] < 4.2
    assert wide["train_bytes"] > 5 * 4 * wide["parameters"]
    assert min(narrow["step_s"], narrow["features_s"]) > 0
    ratio = wide["step_s"] / narrow["step_s"]
    assert f"(x{ratio:.1f})" in capsys.readouterr().out


def test_a_memory_map_holds_random_images_and_is_read(tiny_config, tmp_path):
    row = data_row(5000, tiny_config, CPU, tmp_path)
    assert 5000 * 64 < row["bytes"] < 5000 * 64 + 300
    assert min(row[key] for key in ("open_s", "order_s", "images_per_s", "fingerprint_s")) > 0
    images = np.load(tmp_path / "images.npy", mmap_mode="r")
    assert images.shape == (5000, 1, 8, 8)
    assert np.array_equal(images[0], images[4096])
    assert images[4096:].std() > 60


def test_images_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"images take 192000000.0 GB.*--max_images"):
        write_images(tmp_path / "images.npy", 10**12, (3, 8, 8000))


def test_sizes_end_at_the_largest_that_is_asked_for(monkeypatch, tiny_config):
    monkeypatch.setattr(scaling, "data_row", lambda n, *_: {"images": n})
    args = scaling.parse_args(["--max_images", "20000"])
    sizes = [row["images"] for row in scaling.of_data(tiny_config, CPU, args)]
    assert sizes == [1000, 10_000, 20_000]


def test_a_job_begins_from_files_decoded_before(tmp_path):
    row = start_row(100, tmp_path, 1)
    assert len(list((tmp_path / "folder" / "train").glob("*/*.png"))) == 90
    assert len(list((tmp_path / "folder" / ".cache").glob("*.npy"))) == 2
    assert row["seconds_beyond"] == row["start_s"][0] - row["import_torch_s"][0]
    assert "100 files begins after" in scaling.start_table("start", [row])
