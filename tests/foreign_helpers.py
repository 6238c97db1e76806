"""Checkpoints in the layouts of FutureXiang/ddae and the public tiny-ddae, and features of them."""

from pathlib import Path

import numpy as np
import torch
from conftest import reference_weight, save_model
from ema_pytorch import EMA
from torch import nn

from cli import job_parser, load_model
from datasets import read_dataset
from evaluation.probe.features import Extractor, network_source
from model.models import build_denoiser

CPU = torch.device("cpu")
SINGLE, DDP = "", "module."  # how MODEL's names begin: the public tiny-ddae's, FutureXiang/ddae's


class Process(nn.Module):
    """Holds a network as both projects do, beside a schedule."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.nn_model = net
        self.register_buffer("alphabar_t", torch.linspace(1, 0, 1001))


def weights_of(config, suffix="") -> dict:
    """Weights that depend on their names (and on `suffix`) alone."""
    shapes = {name: w.shape for name, w in build_denoiser(config).net.state_dict().items()}
    return {name: reference_weight(name + suffix, shape) for name, shape in shapes.items()}


def write_foreign(path: Path, config, prefix: str, parts=("MODEL", "EMA", "opt")) -> Path:
    """EMA holds weights_of(config), MODEL others."""
    process = Process(build_denoiser(config).net)
    process.nn_model.load_state_dict(weights_of(config))
    ema = EMA(process, update_after_step=0, update_every=1)
    process.nn_model.load_state_dict(weights_of(config, ".raw"))
    whole = {
        "MODEL": {prefix + name: value for name, value in process.state_dict().items()},
        "EMA": ema.state_dict(),
        "opt": torch.optim.Adam(process.parameters()).state_dict(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({part: whole[part] for part in parts}, path)
    return path


def write_ours(path: Path, config) -> Path:
    return save_model(config, 59, weights_of(config), path)


def features(tiny_yaml, path, *more) -> np.ndarray:
    """Those of out_2 at t = 21 of the test images, kept beside the checkpoint."""
    args = job_parser("").parse_args(["--config", str(tiny_yaml), "--ckpt", str(path), *more])
    model = load_model(args, CPU)
    source = network_source(model.denoiser, model.fingerprint(), use_amp=False)
    test = read_dataset(model.config, "data", "test")
    return Extractor(source, CPU, folder=path.parent)(test, [21], ["out_2"])[21, "out_2"]
