"""What of a config decides a model: the meaning of its weights, and its outputs beside them."""

import json
from collections.abc import Mapping

from config.schema import PROCESSES, Config

MODEL_KEYS = (
    "model_type",
    "net_type",
    "diffusion",
    "network",
    "cond_drop_prob",
)  # what decides the weights' meaning
TRAINING_ONLY = {  # of these, what changes no output of given weights
    "diffusion": ("time", "p_mean", "p_std", "weighting", "gamma", "augment_prob"),
    "network": ("dropout", "zero_init"),
}

AFTER_THE_START = {  # what changes neither the weights that training begins with nor their outputs
    "diffusion": TRAINING_ONLY["diffusion"],
    "network": ("dropout", "self_condition", "self_condition_gate"),  # which begins at 0
}


def may_differ(config: Config) -> set[str]:
    """The top-level keys that may differ between a checkpoint and a config for the same network.

    With labels, the number of classes is that of the rows of an embedding.
    """
    decides = {*MODEL_KEYS, "classes"} if config.cond_drop_prob else set(MODEL_KEYS)
    return set(Config.model_fields) - decides


def may_differ_at_start(config: Config) -> set[str]:
    """Those, and "section.key", that may differ where a run begins with the weights of another:
    also how that was trained."""
    inside = {f"{section}.{name}" for section, names in TRAINING_ONLY.items() for name in names}
    return may_differ(config) | inside


def beside_weights(config: Config) -> str:
    """What decides the outputs of given weights, as text: "" for the default process."""
    usual = _beside(next(iter(PROCESSES.values()))())
    others = {key: value for key, value in _beside(config).items() if usual.get(key) != value}
    return json.dumps(others, sort_keys=True) if others else ""


def _beside(config: Config) -> dict:
    return {
        "model_type": config.model_type,
        "heads": config.network.model_dump().get("attn_channels_per_head"),  # which has no weights
        **config.diffusion.model_dump(mode="json", exclude=set(TRAINING_ONLY["diffusion"])),
    }


def same_untrained(one: Mapping, other: Mapping) -> bool:
    """Whether, with one seed, two configs, as dicts, begin with the same weights in the same
    process."""

    def facts(config: Mapping) -> list:
        sections = [
            {k: v for k, v in config.get(section, {}).items() if k not in names}
            for section, names in AFTER_THE_START.items()
        ]
        labels = config.get("cond_drop_prob") and config.get("classes")
        return [config.get("model_type"), config.get("net_type"), labels, *sections]

    return facts(one) == facts(other)
