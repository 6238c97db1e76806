"""pytorch-fid's Inception: its weights, found or downloaded, and the features of images."""

import hashlib
import socket
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn

from support import distributed
from support.errors import UserError
from support.files import DAMAGED
from utils import log, progress

WEIGHTS_URL = (  # pytorch_fid.inception.FID_WEIGHTS_URL
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
DOWNLOAD_TIMEOUT_S = 30  # of silence; without one a firewall that drops packets hangs the job
N_FEATURES = 2048


def find_weights(path: str | Path | None = None) -> Path:
    """The file with the weights: `path`, else torch.hub's copy, else a download to there.

    It is pytorch-fid's own place, so a file that either has fetched serves both.
    Raises UserError that names the address and the place if there is none to be had.
    """
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"--inception {path}: no such file; it can be had from {WEIGHTS_URL}")
        return Path(path)
    place = Path(torch.hub.get_dir(), "checkpoints", Path(WEIGHTS_URL).name)
    if not place.is_file():
        _download(place)
    return place


def _download(place: Path) -> None:
    log.info(f"downloading pytorch-fid's Inception weights (96 MB) to {place}")
    usual_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(WEIGHTS_URL, str(place), hash_prefix=WEIGHTS_SHA256)
    except (OSError, RuntimeError) as error:  # RuntimeError: the checksum is another
        raise UserError(
            f"FID needs pytorch-fid's Inception weights; they could not be downloaded ({error}).\n"
            f"Put {WEIGHTS_URL} at {place}, or give the file with --inception PATH"
        ) from None
    finally:
        socket.setdefaulttimeout(usual_timeout)


def weights_fingerprint(weights: Path) -> str:
    """The SHA-256 of the file, in hexadecimal."""
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def load_inception(weights: Path, device: torch.device) -> nn.Module:
    """pytorch-fid's InceptionV3 up to the last pooling: images in [0, 1] -> [(N, 2048, 1, 1)].

    It resizes to 299x299 itself. Raises UserError if the file is damaged or holds something else.
    """
    import pytorch_fid.inception  # slow to import

    mend = f"delete it and let it be downloaded again, or fetch {WEIGHTS_URL}"
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except DAMAGED:
        raise UserError(f"{weights}: not a readable file of weights; {mend}") from None
    # pytorch-fid can only be told what to load by its loader, which would run pickled code.
    loader = mock.patch.object(
        pytorch_fid.inception, "load_state_dict_from_url", return_value=state
    )
    try:
        with loader:
            model = pytorch_fid.inception.InceptionV3()
    except (RuntimeError, TypeError, AttributeError):
        raise UserError(f"{weights}: not pytorch-fid's Inception weights; {mend}") from None
    if device.type == "cpu":  # convolutions are half as fast again there in this layout
        model = model.to(memory_format=torch.channels_last)
    return model.eval().to(device)


@torch.inference_mode()
def inception_features(
    model: nn.Module, images: np.ndarray, batch_size: int = 50, title: str = "Inception"
) -> np.ndarray:
    """Features of the last pooling, (N, 2048) float32, in full precision.

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
            features[start : start + len(x)] = model(x)[0].flatten(1).cpu().numpy()
            bar.update(len(x))
    return distributed.gather_rows(features)
