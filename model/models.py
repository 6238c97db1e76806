"""The only map from a config's names to classes."""

from torch import nn

from config import Config
from model.DDPM import DDPM
from model.denoiser import Denoiser
from model.EDM import EDM
from model.unet import UNet

PROCESSES = {"DDPM": DDPM, "EDM": EDM}
NETWORKS = {"UNet": UNet}


def build_denoiser(config: Config, net: nn.Module | None = None) -> Denoiser:
    """The denoiser that the config describes, around `net` if one is given.

    A new network is on the CPU with PyTorch's default initialisation: seed the global generator
    first (`utils.seed_everything`) for repeatable weights.
    """
    if net is None:
        classes = config.classes if config.cond_drop_prob else 0
        net = NETWORKS[config.net_type](config.network, classes)
    return PROCESSES[config.model_type](net, config.diffusion)
