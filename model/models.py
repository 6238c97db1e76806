"""The only map from a config's names to classes."""

import torch
from torch import nn

from config import Config
from model.DDPM import DDPM
from model.denoiser import Denoiser
from model.EDM import EDM
from model.unet import UNet
from support.errors import UserError

PROCESSES = {"DDPM": DDPM, "EDM": EDM}
NETWORKS = {"UNet": UNet}
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def build_denoiser(config: Config, net: nn.Module | None = None) -> Denoiser:
    """The denoiser that the config describes, around `net` if one is given.

    A new network is on the CPU with PyTorch's default initialisation: seed the global generator
    first (`utils.seed_everything`) for repeatable weights. Raises UserError for a network that is
    not made here.
    """
    if net is None:
        if config.net_type not in NETWORKS:
            raise UserError(
                f"net_type {config.net_type}: such a network is read, with --ckpt, and not made or "
                f"trained here: {', '.join(NETWORKS)} is"
            )
        classes = config.classes if config.cond_drop_prob else 0
        net = NETWORKS[config.net_type](config.network, classes)
    return PROCESSES[config.model_type](net, config.diffusion)


def process_of(config: Config) -> Denoiser:
    """The process of a config, without a network."""
    return build_denoiser(config, nn.Identity())


def first_misfit(weights: dict, config: Config) -> str | None:
    """The first reason why `weights`, of unchecked content, are not a state dict of the config's
    network, in words that follow the name of a file; None if they are one."""
    with torch.device("meta"):
        expected = build_denoiser(config).net.state_dict()
    for name in [*expected, *weights]:
        if name not in weights:
            return f"it has no {name}"
        if name not in expected:
            return f"it has {name}, which this network has not"
        weight, shape = weights[name], list(expected[name].shape)
        if not torch.is_tensor(weight):
            return f"its {name} is no tensor but a {type(weight).__name__}"
        if list(weight.shape) != shape:
            return f"its {name} is {list(weight.shape)}, this network's {shape}"
        plain = weight.layout == torch.strided and weight.device.type != "meta"
        if weight.dtype not in WEIGHT_DTYPES or not plain:
            return f"its {name} is of {weight.dtype}, {weight.layout}: no plain floating point"
    return None
