"""What the tests of the data share."""

import numpy as np

from config import Config, parse_config

RNG = np.random.default_rng(0)


def config_for(dataset: str, shape=(3, 32, 32), classes: int = 10) -> Config:
    network = {"image_shape": list(shape), "ch_mults": [1], "is_attn": [False]}
    return parse_config({"dataset": dataset, "classes": classes, "network": network})


def random_pixels(height: int = 8, width: int = 8) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
