"""The only map from a config's names to classes."""

from torch import nn

from config import Config
from model.DDPM import DDPM
from model.denoiser import Denoiser
from model.EDM import EDM
from model.unet import UNet
from support.errors import UserError

PROCESSES = {"DDPM": DDPM, "EDM": EDM}
NETWORKS = {"UNet": UNet}


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
