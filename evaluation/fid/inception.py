"""pytorch-fid's Inception: its weights, found or downloaded, and the features of images."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from readers.download import Archive, compute_digest, fetch
from support import distributed
from support.errors import UserError
from support.files import DAMAGED
from utils import log, progress

WEIGHTS_URL = (  # pytorch_fid.inception.FID_WEIGHTS_URL
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS = Archive(Path(WEIGHTS_URL).name, (WEIGHTS_URL,), WEIGHTS_SHA256, "sha256")
N_FEATURES = 2048
SIDE = 299  # pixels, to which images are resized
WIDTH_OF_FIRST_E = 1280  # channels into the first of the two last blocks


def find_weights(path: str | Path | None = None) -> Path:
    """The file with the weights: `path`, else torch.hub's copy, else a download to there.

    It is pytorch-fid's own place, so a file that either has fetched serves both.
    Raises UserError that names the address and the place if there is none to be had.
    """
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"--inception {path}: no such file; it can be had from {WEIGHTS_URL}")
        return Path(path)
    place = Path(torch.hub.get_dir(), "checkpoints", WEIGHTS.name)
    if place.is_file():
        return place
    log.info(f"downloading pytorch-fid's Inception weights (96 MB) to {place}")
    try:
        return fetch(WEIGHTS, place.parent)
    except UserError as error:
        raise UserError(
            f"FID needs pytorch-fid's Inception weights: {error}, or give the file with "
            "--inception PATH"
        ) from None


def weights_fingerprint(weights: Path) -> str:
    """The SHA-256 of the file, in hexadecimal."""
    return compute_digest(weights, WEIGHTS.algorithm)


class PooledFeatures(nn.Module):
    """An Inception without its classifier: images (N, 3, H, W) in [0, 1] -> (N, 2048)."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        net.fc = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Resizes to SIDE x SIDE and maps to [-1, 1], which the network was trained on."""
        x = F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        return self.net(2 * x - 1)


def load_inception(weights: Path, device: torch.device) -> PooledFeatures:
    """pytorch-fid's Inception up to the last pooling.

    Raises UserError if the file is damaged, holds something else, or could run code when read.
    """
    mend = f"delete it and let it be downloaded again, or fetch {WEIGHTS_URL}"
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except DAMAGED:
        raise UserError(f"{weights}: not a readable file of weights; {mend}") from None
    net = untrained_inception()
    try:
        net.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError):
        raise UserError(f"{weights}: not pytorch-fid's Inception weights; {mend}") from None
    model = PooledFeatures(net)
    if device.type == "cpu":  # convolutions are half as fast again there in this layout
        model = model.to(memory_format=torch.channels_last)
    return model.eval().to(device)


def untrained_inception() -> nn.Module:
    """torchvision's Inception with the blocks of pytorch-fid, whose pooling is TensorFlow's."""
    from pytorch_fid import inception as fid_blocks  # slow to import
    from torchvision.models import inception

    def last_block(width: int) -> nn.Module:
        first = width == WIDTH_OF_FIRST_E
        return fid_blocks.FIDInceptionE_1(width) if first else fid_blocks.FIDInceptionE_2(width)

    blocks = [
        inception.BasicConv2d, fid_blocks.FIDInceptionA, inception.InceptionB,
        fid_blocks.FIDInceptionC, inception.InceptionD, last_block, inception.InceptionAux,
    ]  # fmt: skip
    return inception.Inception3(
        num_classes=1008, aux_logits=False, inception_blocks=blocks, init_weights=False
    )


@torch.inference_mode()
def inception_features(
    model: nn.Module, images: np.ndarray, batch_size: int = 50, title: str = "Inception"
) -> np.ndarray:
    """Features of the last pooling, (N, 2048) float32, without mixed precision.

    images: (N, C, H, W) uint8 with C 1 (grey, repeated to RGB) or 3; `title` labels the bar.
    Several processes divide the images among them; each gets the features of all.
    """
    mine = distributed.share(len(images))
    images = images[mine.start : mine.stop]
    device = next(model.parameters()).device
    features = np.empty((len(images), N_FEATURES), dtype=np.float32)
    with progress(total=len(images), desc=title, shared=True, unit="image") as bar:
        for start in range(0, len(images), batch_size):
            batch = torch.tensor(images[start : start + batch_size], device=device)
            x = (batch.float() / 255).expand(-1, 3, -1, -1)
            features[start : start + len(x)] = model(x).cpu().numpy()
            bar.update(len(x))
    return distributed.gather_rows(features)
