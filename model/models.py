"""The only map from a config's names to classes."""

from config import Config
from model.DDPM import DDPM
from model.denoiser import Denoiser
from model.unet import UNet

PROCESSES = {"DDPM": DDPM}
NETWORKS = {"UNet": UNet}


def build_denoiser(config: Config) -> Denoiser:
    """The denoiser that the config describes, with PyTorch's default initialisation, on the CPU.

    Seed the global generator first (`utils.seed_everything`) for repeatable weights.
    """
    net = NETWORKS[config.net_type](config.network)
    return PROCESSES[config.model_type](net, config.diffusion)
