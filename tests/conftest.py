"""What several tests share: tiny configs, a tiny trained checkpoint, the reference's numbers."""

import contextlib
import json
import logging
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import random_pixels
from PIL import Image

import checkpoint
import utils
from config import Config, parse_config
from model.models import build_denoiser
from utils import log, seed_everything

if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # as with `&` in a script; children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # the tensors are tiny: more threads would only wait for each other

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

READS_A_MODEL = [
    "linear", "finetune", "noisy_classifier", "contrastive", "visualize_features", "sample", "fid",
]  # fmt: skip
TAKES_A_DEVICE = ["train", *READS_A_MODEL, "reproduce"]
JOBS = [*TAKES_A_DEVICE, "visualize_diffusion"]

TINY = {
    "dataset": "digits",
    "network": {
        "image_shape": [1, 8, 8],
        "n_channels": 32,
        "ch_mults": [1, 2],
        "is_attn": [False, False],
    },
    "n_epoch": 2,
    "warm_epoch": 1,
    "lrate": 1e-3,
    "ema": 0.99,
    "flip": False,
    "n_sample": 4,
    "sample_every": 1,
    "save_every": 1,
    "linear": {"n_epoch": 2, "timestep": 21, "blockname": "out_2"},
}


@pytest.fixture
def tiny_yaml(tmp_path) -> Path:
    """A config of seconds on digits that writes below tmp_path."""
    path = tmp_path / "tiny.yaml"  # JSON is YAML
    path.write_text(json.dumps({**TINY, "save_dir": str(tmp_path / "run")}))
    return path


@pytest.fixture
def tiny_config(tmp_path) -> Config:
    return parse_config({**TINY, "save_dir": str(tmp_path / "run")})


@pytest.fixture
def tiny_checkpoint(tiny_config) -> Path:
    """model_1.pth of an untrained tiny network, where the jobs look for it."""
    seed_everything("tiny checkpoint")
    return save_model(tiny_config, 1)


def save_model(
    config: Config, epoch: int, weights: dict | None = None, path: Path | None = None
) -> Path:
    """Writes a checkpoint, by default where the jobs look for it, and of untrained weights, as
    PyTorch's global generator draws them."""
    weights = weights or build_denoiser(config).net.state_dict()
    path = path or Path(config.save_dir) / "ckpts" / f"model_{epoch}.pth"
    state = {
        "config": config.model_dump(mode="json"),
        "net": weights,
        "ema": weights,
        "epoch": epoch,
        "step": 44,
        "metrics": {},
        "versions": checkpoint.versions(),
    }
    checkpoint.save(path, state)
    return path


@pytest.fixture
def mistake(capsys):
    """`with mistake("words"):` around a job that has to end with code 2 and an error with them."""

    @contextlib.contextmanager
    def ends_with(words: str):
        with pytest.raises(SystemExit) as stop:
            yield
        assert stop.value.code == 2
        assert words in capsys.readouterr().err

    return ends_with


# --- class folders, and what is said of them


@pytest.fixture
def tree(tmp_path) -> Path:
    """cat and dog, three PNGs of 8x8 each in train and test."""
    for split in ("train", "test"):
        for name in ("dog", "cat"):
            folder = tmp_path / "folder" / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                Image.fromarray(random_pixels()).save(folder / f"{i}.png")
    return tmp_path


@pytest.fixture
def messages(monkeypatch) -> list[str]:
    """What is logged while the test runs."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    monkeypatch.setattr(log, "handlers", [handler])
    monkeypatch.setattr(log, "level", logging.INFO)
    log.manager._clear_cache()
    utils.note_once.cache_clear()
    return found


# --- the numbers of the reference implementation (../shared/reference/README.md)


def standard_normal(name: str, shape) -> np.ndarray:
    """The tensor that the reference's README makes from a name."""
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    return draw.standard_normal(tuple(shape)).astype(np.float32)


def reference_weight(name: str, shape) -> torch.Tensor:
    z = standard_normal(name, shape)
    if len(shape) > 1:
        z = z / np.sqrt(np.prod(shape[1:]))
    else:
        z = 1 + 0.1 * z if "norm" in name and name.endswith("weight") else 0.1 * z
    return torch.from_numpy(z.astype(np.float32))


@pytest.fixture(scope="session")
def reference():
    """(networks.json, values.npz); skips where they are absent."""
    folder = SHARED / "reference"
    if not folder.exists():
        pytest.skip(f"{folder} is not here")
    networks = json.loads((folder / "networks.json").read_text())
    with np.load(folder / "values.npz") as values:
        return networks, dict(values)
