"""Released weights: the layout of the Hugging Face Hub, written and read."""

import sys

import pytest
import torch

import checkpoint
from model.released import read_description, write_released
from support.errors import UserError


@pytest.fixture
def release(tiny_checkpoint, tmp_path):
    """A folder that holds the tiny checkpoint's weights as float16."""
    state = checkpoint.load(tiny_checkpoint)
    about = {key: state[key] for key in ("config", "epoch", "step")}
    write_released(tmp_path / "release", state["ema"], about, "float16")
    return tmp_path / "release"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_released_weights_round_trip(tiny_checkpoint, tiny_config, tmp_path, dtype):
    state = checkpoint.load(tiny_checkpoint)
    about = {key: state[key] for key in ("config", "epoch", "step")}
    folder = tmp_path / "release"
    description = write_released(folder, state["ema"], about, dtype)
    assert read_description(folder) == description
    by_folder = checkpoint.load_denoiser(folder)
    by_file = checkpoint.load_denoiser(str(folder / "model.safetensors"))
    for model in (by_folder, by_file):
        assert (model.config, model.epoch, model.about["step"]) == (tiny_config, 1, 44)
        assert not model.denoiser.training
        for name, tensor in model.denoiser.net.state_dict().items():
            rounded = state["ema"][name].to(getattr(torch, dtype)).float()
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, rounded)
    same = checkpoint.load_denoiser(tiny_checkpoint).fingerprint() == by_folder.fingerprint()
    assert same == (dtype == "float32")


def test_a_flipped_bit_in_a_release_is_noticed(release):
    file = release / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged.*SHA-256"):
        checkpoint.load_denoiser(release)


def test_weights_too_large_for_float16_are_not_written(tmp_path):
    with pytest.raises(UserError, match="w is too large for float16: take --dtype float32"):
        write_released(tmp_path, {"w": torch.tensor([1e5])}, {}, "float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "says"), [
    ("{", "not valid JSON"),
    ("[1]", "not what this program writes there"),
    ('{"model_type": "bert"}', "of something else than an export"),
    ('{"format": "tiny-ddae", "format_version": 2}', "of format version 2, this reads 1"),
    ('{"format": "tiny-ddae", "format_version": 1, "config": 3}', "not what this program writes"),
])  # fmt: skip
def test_another_config_json_is_refused(release, text, says):
    (release / "config.json").write_text(text)
    with pytest.raises(UserError, match=says):
        checkpoint.load_denoiser(release)


def test_a_release_that_is_not_whole(release, tiny_checkpoint, tmp_path):
    (release / "config.json").unlink()
    for path in (release, release / "model.safetensors"):
        with pytest.raises(UserError, match=r"config\.json: no such file; a release is a folder"):
            checkpoint.load_denoiser(path)
    with pytest.raises(UserError, match=r"nowhere\.safetensors"):
        checkpoint.load_denoiser(tmp_path / "nowhere.safetensors")
    run = tiny_checkpoint.parent.parent
    with pytest.raises(UserError, match=r"give a file, such as --ckpt .*model_1\.pth"):
        checkpoint.load_denoiser(run)


def test_the_hub(release, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(release)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = checkpoint.load_denoiser("hf:owner/name")
    assert str(model.path) == "hf:owner/name"
    assert model.fingerprint() == checkpoint.load_denoiser(release).fingerprint()
    assert asked == [("owner/name", ["*.json", "model.safetensors"])]


def test_the_hub_out_of_reach(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    by_hand = r"fetch its files from https://huggingface\.co/owner/name"
    with pytest.raises(UserError, match=rf"could not be fetched .*{by_hand}"):
        checkpoint.load_denoiser("hf:owner/name")
    with pytest.raises(UserError, match="write hf:owner/name"):
        checkpoint.load_denoiser("hf:owner")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=rf"pip install huggingface_hub, or {by_hand}"):
        checkpoint.load_denoiser("hf:owner/name")
