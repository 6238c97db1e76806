"""Checkpoints of FutureXiang/ddae and of the public tiny-ddae, read as if this project wrote them.

Both save a dict of MODEL (the state dict of a process, whose network is `nn_model`), EMA (that of
ema-pytorch around it: `ema_model.…`, `online_model.…`, `initted`, `step`) and `opt`. Neither keeps
its config. What tells them apart: FutureXiang/ddae trains under DistributedDataParallel, on one
GPU too, so that its MODEL begins with `module.`; the public tiny-ddae never does.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from config import Config
from model.models import first_misfit
from support.errors import UserError
from utils import log

Weights = dict[str, Tensor]


def is_foreign(state: object) -> bool:
    """Whether a file read by torch.load has the layout that both write."""
    return isinstance(state, dict) and bool(_part(state, "EMA") or _part(state, "MODEL"))


def adopted(state: dict, path: Path, config: Config | None, input_scale: str | None) -> dict:
    """The foreign checkpoint as a checkpoint of this project: its config, net, ema and epoch.

    The epoch is that of the file's name, model_<epoch>.pth; -1 for another name. What belongs to
    no weight of the network, such as schedules, is left out. Says what is worth knowing.
    Raises UserError without a config, or if the weights do not fit the network of the config.
    """
    if config is None:
        raise UserError(
            f"{path}: written by FutureXiang/ddae or the public tiny-ddae, which keep no config in "
            "a checkpoint: add --config with the YAML that it was trained with to a job that "
            "evaluates; training cannot begin with it"
        )
    averaged, raw = _weights(state, "EMA", r"ema_model\."), _weights(state, "MODEL")
    raw = raw or _weights(state, "EMA", r"online_model\.")
    if not (averaged or raw):
        raise UserError(f"{path}: neither its EMA nor its MODEL has weights of an nn_model")
    for weights in (averaged, raw):
        if weights:
            _check_fit(weights, path, config)
    if not averaged:
        log.info("%s: no EMA in it, so these are the raw weights: expect worse samples", path)
    _explain_range(state, path, input_scale)
    epoch = re.fullmatch(r"model_(\d+)\.\w+", path.name)
    if not epoch:
        log.info("%s: called epoch -1, as its name is not model_<epoch>.pth", path)
    return {
        "config": config.model_dump(mode="json"),
        "net": raw or averaged,
        "ema": averaged or raw,
        "epoch": int(epoch[1]) if epoch else -1,
        "input_scale": input_scale,
    }


def _part(state: dict, name: str) -> dict:
    part = state.get(name)
    return {str(key): value for key, value in part.items()} if isinstance(part, dict) else {}


def _weights(state: dict, part: str, prefix: str = "") -> Weights:
    """The network's weights in MODEL or EMA, by their names in the network; empty if none."""
    pattern = re.compile(prefix + r"(?:module\.)?nn_model\.(.+)")
    found = ((pattern.fullmatch(name), value) for name, value in _part(state, part).items())
    return {match[1]: value.float() for match, value in found if match and torch.is_tensor(value)}


def _check_fit(weights: Weights, path: Path, config: Config) -> None:
    """Raises UserError that names the first weight that is missing, of another shape, or extra."""
    if found := first_misfit(weights, config):
        raise UserError(
            f"{path} does not fit the network of the config ({found}): give the --config that it "
            "was trained with"
        )


def _explain_range(state: dict, path: Path, input_scale: str | None) -> None:
    """Says which range of inputs the network is fed, and which it was probably trained on."""
    names = list(_part(state, "MODEL"))
    if names and all(name.startswith("module.") for name in names):
        if input_scale:
            log.info(
                "%s: has the layout of FutureXiang/ddae, which trains on [-1, 1]: "
                "--input_scale %s is for other files", path, input_scale,
            )  # fmt: skip
    elif input_scale:
        log.info("%s: fed with the inputs of --input_scale %s, in [-3, 1]", path, input_scale)
    else:
        origin = "has the layout" if names else "has no MODEL to tell if it is"
        log.info(
            "%s: %s of the public tiny-ddae, which trains on inputs in [-3, 1]: here the network "
            "gets [-1, 1], so its features differ; --input_scale tiny-ddae feeds it what it was "
            "trained on", path, origin,
        )  # fmt: skip
