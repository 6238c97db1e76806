"""The weights that a run begins with, where they are not random: the config's `start_from`."""

from torch import Tensor

import checkpoint
from config import Config
from config.identity import may_differ_at_start
from support.errors import UserError

GUIDES = {"network.self_condition", "network.self_condition_gate"}  # what they add begins at 0


def starting_weights(config: Config) -> dict[str, Tensor]:
    """The EMA weights of the config's `start_from`, by their names in its network, on the CPU.

    How it is trained may differ, and self-conditioning may be new: its weights are not among
    these, and as they begin at 0, the outputs are those of the checkpoint.

    Raises UserError if the checkpoint cannot be read, or is of another network or process.
    """
    model = checkpoint.load_denoiser(config.start_from)
    if model.input_scale:
        raise UserError(f"{model.path}: of another project, with pixels on another scale than ours")
    inside, free = model.config.model_dump(mode="json"), may_differ_at_start(config)
    if not inside["network"].get("self_condition"):
        free |= GUIDES
    advice = "start_from needs weights of the same network and process"
    checkpoint.refuse_other_config(model.path, {"config": inside}, config, free, advice)
    return model.denoiser.net.state_dict()
