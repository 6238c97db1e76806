"""The weights that a run begins with, where they are not random: the config's `start_from`."""

from torch import Tensor

import checkpoint
from config import Config
from config.identity import TRAINING_ONLY, may_differ
from support.errors import UserError

GUIDES = ("self_condition", "self_condition_gate")  # of network: what they add begins at 0


def starting_weights(config: Config) -> dict[str, Tensor]:
    """The EMA weights of the config's `start_from`, by their names in its network, on the CPU.

    How it is trained may differ, and self-conditioning may be new: its weights are not among
    these, and as they begin at 0, the outputs are those of the checkpoint.

    Raises UserError if the checkpoint cannot be read, or is of another network or process.
    """
    model = checkpoint.load_denoiser(config.start_from)
    if model.input_scale:
        raise UserError(f"{model.path}: of another project, with pixels on another scale than ours")
    ours, inside = config.model_dump(mode="json"), model.config.model_dump(mode="json")
    for section, names in TRAINING_ONLY.items():
        if section == "network" and not inside[section].get("self_condition"):
            names += GUIDES
        both = [name for name in names if name in ours[section] and name in inside[section]]
        inside[section] |= {name: ours[section][name] for name in both}
    advice = "start_from needs weights of the same network and process"
    free = may_differ(config)
    checkpoint.refuse_other_config(model.path, {"config": inside}, config, free, advice)
    return model.denoiser.net.state_dict()
