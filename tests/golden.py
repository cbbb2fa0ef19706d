"""The inputs of the golden numbers, weights and images drawn from names, and the summary of the outputs."""

import json
from pathlib import Path

import numpy as np

from ddpm_jax import config as config_lib

NUMBERS = json.loads((Path(__file__).parent / "golden.json").read_text())
TIMESTEPS = (0, 1, 10, 499, 998, 999)


def config(name):
    """ "cifar10", the exact network of the paper, or "small"."""
    config = config_lib.default_config()
    if name == "small":
        config.data.update(height=8, width=8)
        config.model.update(
            channels=16, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=4
        )
    return config


def tensors(shapes):
    """Values for {name: shape} in diffusers' names and order of axes, of the size that keeps activations about 1."""
    values = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(list(name.encode()))
        scale = 0.7 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.1
        around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        values[name] = (around + scale * rng.uniform(-(3**0.5), 3**0.5, shape)).astype(np.float32)
    return values


def inputs(size):
    """x [2, size, size, 3] and t [2]."""
    return np.random.default_rng(0).uniform(-1, 1, (2, size, size, 3)).astype(np.float32), np.array([7, 613])


def summary(x):
    """Twelve values of [B, H, W, C] spread over it, its mean and its root mean square."""
    x = np.asarray(x, np.float64)
    return [*x.ravel()[:: x.size // 12][:12].tolist(), float(x.mean()), float(np.sqrt(np.mean(x**2)))]
