"""hf:owner/name: models on the Hugging Face Hub, kept in its cache."""

import re
from pathlib import Path

from model.diffusers_checkpoints import is_diffusers, read_plan
from model.released import WEIGHTS
from support import distributed
from support.errors import UserError, reason_of

HUB = "hf:"
PIPELINE_WEIGHTS = "diffusion_pytorch_model"


def fetched(path: str | Path) -> Path:
    """`path`; of hf:owner/name the folder in the Hub's cache, fetched if it is not there.

    Of an export both files, of a pipeline of diffusers what `read_pipeline` reads. Raises UserError
    that says what to do without huggingface_hub, a network, or such a name.
    """
    name = str(path).removeprefix(HUB)
    if not str(path).startswith(HUB):
        return Path(path)
    folder = _snapshot(name, WEIGHTS)
    if is_diffusers(folder):
        read_plan(folder)  # what is not read is refused before its weights are fetched
        folder = _snapshot(name, f"*{PIPELINE_WEIGHTS}.safetensors")
        beside = [config.parent for config in folder.rglob("config.json")]
        if not all((part / f"{PIPELINE_WEIGHTS}.safetensors").exists() for part in beside):
            folder = _snapshot(name, f"*{PIPELINE_WEIGHTS}.bin")  # of older ones
    return folder


def _snapshot(name: str, weights: str) -> Path:
    """The folder of a repository of the Hub with all its JSON and with files named `weights`."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{HUB}{name}: write {HUB}owner/name")
    by_hand = f"or fetch its files from https://huggingface.co/{name} into a folder and give that"
    try:
        from huggingface_hub import snapshot_download  # an optional dependency
    except ImportError:
        raise UserError(f"{HUB}{name}: pip install huggingface_hub, {by_hand}") from None
    with distributed.main_first():
        try:
            return Path(snapshot_download(name, allow_patterns=["*.json", weights]))
        except Exception as error:  # its network library's errors have no common base here
            raise UserError(
                f"{HUB}{name}: could not be fetched ({reason_of(error)}); check the name and the "
                f"network, {by_hand}"
            ) from error
