"""Saving is all or nothing, loading is checked."""

import errno
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, save_model

import checkpoint
from config import parse_config
from support.errors import UserError

CPU = torch.device("cpu")


def test_round_trip(tiny_config, tiny_checkpoint):
    model = checkpoint.load_denoiser(tiny_checkpoint, CPU)
    saved = checkpoint.load(tiny_checkpoint)["ema"]
    assert model.config == tiny_config
    assert model.epoch == 1
    assert not model.denoiser.training
    for name, tensor in model.denoiser.net.state_dict().items():
        assert torch.equal(tensor, saved[name])


def test_find_takes_the_newest(tiny_config, tiny_checkpoint):
    (tiny_checkpoint.parent / "model_10.pth").write_bytes(tiny_checkpoint.read_bytes())
    assert checkpoint.find(tiny_config.save_dir).name == "model_10.pth"
    assert checkpoint.find(tiny_config.save_dir, 1) == tiny_checkpoint


def test_a_missing_checkpoint_lists_those_there_are(tiny_config, tiny_checkpoint):
    with pytest.raises(UserError, match=r"model_7\.pth: no such checkpoint.*model_1\.pth"):
        checkpoint.find(tiny_config.save_dir, 7)
    with pytest.raises(UserError, match=r"run train\.py first"):
        checkpoint.find(tiny_config.save_dir + "_other")


def test_truncated(tiny_checkpoint):
    data = tiny_checkpoint.read_bytes()
    for size in (0, 10, len(data) // 2, len(data) - 1):
        tiny_checkpoint.write_bytes(data[:size])
        with pytest.raises(UserError, match="damaged or truncated"):
            checkpoint.load(tiny_checkpoint)


@pytest.mark.parametrize(("text", "says"), [
    (b"hello", "damaged or truncated checkpoint"), (b"PK\x03\x04zip", "damaged or truncated"),
    (b"no checkpoint at all", "refused: it is not a plain checkpoint"), (b"n_T: 1000\n", "refused"),
])  # fmt: skip
def test_a_file_of_something_else(tiny_checkpoint, text, says):
    tiny_checkpoint.write_bytes(text)
    with pytest.raises(UserError, match=says):
        checkpoint.load(tiny_checkpoint)
    with pytest.raises(UserError, match=r"damaged \(.*\); delete it to fit"):
        checkpoint.load_state(tiny_checkpoint)


class RunsCode:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("write", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_a_pickle_that_runs_code_is_refused(tmp_path, write):
    marker, path = tmp_path / "it_ran", tmp_path / "evil.pth"
    write({"config": RunsCode(marker)}, path)
    with pytest.raises(UserError, match="refused"):
        checkpoint.load(path)
    assert not marker.exists()


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "foreign.pth"
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        checkpoint.load(path)


def test_another_network_lists_the_differences(tiny_config, tiny_checkpoint):
    values = tiny_config.model_dump()
    values["network"]["n_channels"] = 64
    with pytest.raises(UserError, match=r"network\.n_channels: 64, not 32"):
        checkpoint.load_denoiser(tiny_checkpoint, CPU, parse_config(values))


@pytest.mark.parametrize(("drop", "refused"), [(0.1, True), (0.0, False)])
def test_another_number_of_classes_is_refused_where_the_network_knows_them(
    tiny_config, tmp_path, drop, refused
):
    config = parse_config({**tiny_config.model_dump(), "cond_drop_prob": drop})
    path = save_model(config, 1, path=tmp_path / "a.pth")
    other = parse_config({**config.model_dump(), "classes": 5})
    if not refused:
        checkpoint.load_denoiser(path, CPU, other)
        return
    with pytest.raises(UserError, match="classes: 5, not 10"):
        checkpoint.load_denoiser(path, CPU, other)


def test_training_settings_may_differ(tiny_config, tiny_checkpoint):
    values = {**tiny_config.model_dump(), "lrate": 0.5}
    model = checkpoint.load_denoiser(tiny_checkpoint, CPU, parse_config(values))
    assert model.config.lrate == 0.5


def test_a_full_disk_leaves_the_previous_checkpoint(tiny_checkpoint, monkeypatch):
    before = tiny_checkpoint.read_bytes()
    real_open = open

    class FullDisk:
        def __init__(self, file):
            self.file, self.written = file, 0

        def write(self, data):
            self.written += len(data)
            if self.written > 5000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    monkeypatch.setattr(
        checkpoint, "open", lambda *a, **k: FullDisk(real_open(*a, **k)), raising=False
    )
    with pytest.raises(UserError, match="No space left on device"):
        checkpoint.save(tiny_checkpoint, {"big": torch.zeros(100_000)})
    assert tiny_checkpoint.read_bytes() == before
    assert [p.name for p in tiny_checkpoint.parent.iterdir()] == [tiny_checkpoint.name]


SAVE_FOREVER = """
import sys, torch, checkpoint
from pathlib import Path
for i in range(10**6):
    checkpoint.save(Path(sys.argv[1]), {"i": i, "tensor": torch.full((1_000_000,), float(i))})
    print(i, flush=True)
"""


@pytest.mark.parametrize("read", [checkpoint.load, checkpoint.load_latest, checkpoint.load_state])
@pytest.mark.parametrize("error", [
    PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EIO, "Input/output error"),
    MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
], ids=str)  # fmt: skip
def test_what_cannot_be_read_now_is_not_called_damaged(tiny_checkpoint, monkeypatch, read, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(UserError, match=r"could not be read now \(.*\): try again$") as said:
        read(tiny_checkpoint)
    assert not {"delete", "damaged", "--restart"} & set(str(said.value).split())


def test_kill_at_any_moment_of_a_save(tmp_path):
    path = tmp_path / "latest.pth"
    for delay in (0.0, 0.003, 0.011, 0.02):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(path)],
            stdout=subprocess.PIPE, cwd=ROOT, text=True,
        )  # fmt: skip
        for _ in range(3):
            process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.wait()
        state = torch.load(path, weights_only=True)
        assert torch.equal(state["tensor"], torch.full((1_000_000,), float(state["i"])))


# --- damage that a reader of the file alone would not notice


def flip_a_bit(path, tensor):
    """Changes one bit of the tensor's first number where it stands in the file."""
    data = bytearray(path.read_bytes())
    place = data.index(tensor.flatten()[:8].numpy().tobytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("place", ["ema", "resume"])
def test_a_flipped_bit_inside_a_tensor_is_noticed(tiny_checkpoint, place):
    state = checkpoint.load(tiny_checkpoint)
    state["resume"] = {"window": {"loss": torch.randn(100)}}
    checkpoint.save(tiny_checkpoint, state)
    assert "checksum" not in checkpoint.load(tiny_checkpoint)
    tensors = {"ema": state["ema"]["final.weight"], "resume": state["resume"]["window"]["loss"]}
    flip_a_bit(tiny_checkpoint, tensors[place])
    torch.load(tiny_checkpoint, weights_only=True)  # PyTorch itself sees nothing
    with pytest.raises(UserError, match=r"damaged.*another checksum"):
        checkpoint.load(tiny_checkpoint)
    with pytest.raises(UserError, match=r"damaged \(.*\); delete it"):
        checkpoint.load_state(tiny_checkpoint)


def test_a_file_without_a_checksum_is_read(tiny_checkpoint):
    before = checkpoint.load(tiny_checkpoint)
    torch.save(before, tiny_checkpoint)
    assert torch.equal(
        checkpoint.load(tiny_checkpoint)["ema"]["final.bias"], before["ema"]["final.bias"]
    )


def with_weight(state, change):
    weights = {**state["ema"], "final.bias": change(state["ema"]["final.bias"])}
    return {**state, "ema": weights}


@pytest.mark.parametrize(("change", "says"), [
    (lambda s: {**s, "epoch": "1"}, "its epoch is a str, not a int"),
    (lambda s: {**s, "config": [1]}, "its config is a list"),
    (lambda s: {**s, "net": 7}, "its net is a int"),
    (lambda s: {**s, "input_scale": "odd"}, "its input_scale is odd"),
    (lambda s: {**s, "versions": {"torch": 2}}, "its versions is of another form"),
    (lambda s: {**s, "data": {"dataset": "digits"}}, "its data is of another form"),
    (lambda s: with_weight(s, lambda w: w[:0]), r"ema: its final.bias is \[0\], .* \[1\]"),
    (lambda s: with_weight(s, lambda w: w.int()), "its final.bias is of torch.int32"),
    (lambda s: with_weight(s, lambda w: w.to_sparse()), "torch.sparse_coo: no plain floating"),
    (lambda s: with_weight(s, lambda w: "w"), "its final.bias is no tensor but a str"),
    (lambda s: with_weight(s, lambda w: w * float("nan")), "its final.bias is not finite"),
    (lambda s: {**s, "ema": {}}, "ema: it has no "),
    (lambda s: {**s, "net": {**s["net"], "more": torch.zeros(1)}}, "net: it has more, which"),
])  # fmt: skip
def test_parts_of_other_kinds_are_named_in_one_line(tiny_checkpoint, change, says):
    torch.save(change(checkpoint.load(tiny_checkpoint)), tiny_checkpoint)
    with pytest.raises(UserError, match=says) as error:
        checkpoint.load_denoiser(tiny_checkpoint)
    assert "\n" not in str(error.value)


def test_training_does_not_go_on_from_what_is_no_latest(tiny_checkpoint):
    with pytest.raises(UserError, match=r"holds no optimizer: .*load_epoch"):
        checkpoint.load_latest(tiny_checkpoint)
    state = checkpoint.load(tiny_checkpoint) | {"resume": {"optimizer": {}, "scaler": 3}}
    checkpoint.save(tiny_checkpoint, state)
    with pytest.raises(UserError, match="holds no scaler"):
        checkpoint.load_latest(tiny_checkpoint)
    tiny_checkpoint.write_bytes(tiny_checkpoint.read_bytes()[:99])
    with pytest.raises(UserError, match=r"damaged or truncated .*--restart"):
        checkpoint.load_latest(tiny_checkpoint)


def test_a_model_is_called_by_its_epoch_or_by_its_name():
    def stage(epoch, path):
        return checkpoint.TrainedModel(None, None, epoch, Path(path)).stage

    assert stage(59, "run/ckpts/model_59.pth") == "epoch 59"
    assert stage(-1, "models/DiT-XL-2-256") == "DiT-XL-2-256"
    assert stage(-1, "") == "untrained network"


def test_what_an_old_config_leaves_out_is_there_when_it_is_read(tiny_config, tiny_checkpoint):
    """Jobs read it from the file, too: the model card does."""
    state = checkpoint.load(tiny_checkpoint)
    del state["config"]["n_epoch"]
    torch.save(state, tiny_checkpoint)
    written = checkpoint.load_denoiser(tiny_checkpoint).about["config"]
    assert written == type(tiny_config)(**state["config"]).model_dump(mode="json")
    assert written["n_epoch"] > 0


@pytest.mark.parametrize("error", [
    KeyError("step"), ValueError("size"), TypeError("no"), AttributeError("to"), RuntimeError("x"),
])  # fmt: skip
def test_parts_that_cannot_be_taken_over(tmp_path, error):
    with pytest.raises(UserError, match=r"a\.pt: damaged: .*: delete it"):  # noqa: SIM117
        with checkpoint.taking_over(tmp_path / "a.pt", checkpoint.FIT_ANEW):
            raise error


def test_a_gpu_that_is_full_is_no_damage(tmp_path):
    with pytest.raises(torch.OutOfMemoryError), checkpoint.taking_over(tmp_path / "a.pt", ""):
        raise torch.OutOfMemoryError("no memory")


def test_too_little_memory_is_no_damage():
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    with (
        pytest.raises(RuntimeError, match="DefaultCPUAllocator"),
        checkpoint.taking_over("a.pth", "advice"),
    ):
        raise error
