"""The diffusion of a config: its schedule, the meaning of the network's output, and the loss."""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpm_jax.diffusion.gaussian import Parameterization
from ddpm_jax.diffusion.schedules import Schedule, make_betas, make_schedule, rescale_to_zero_terminal_snr


def make_betas_from(config: ConfigDict) -> np.ndarray:
    """The float64 [T] betas."""
    diffusion = config.diffusion
    if diffusion.betas:
        betas = np.asarray(diffusion.betas, np.float64)
    else:
        betas = make_betas(
            diffusion.schedule,
            diffusion.num_timesteps,
            diffusion.beta_start,
            diffusion.beta_end,
            **diffusion.schedule_options,
        )
    return rescale_to_zero_terminal_snr(betas) if diffusion.zero_terminal_snr else betas


def make_schedule_from(config: ConfigDict) -> Schedule:
    return make_schedule(make_betas_from(config))


def parameterization(config: ConfigDict) -> Parameterization:
    """What the network's output means."""
    diffusion = config.diffusion
    return Parameterization(
        diffusion.prediction,
        diffusion.variance,
        diffusion.clip,
        diffusion.dynamic_threshold or None,
        diffusion.clip_range,
        diffusion.threshold_limit or None,
    )


def loss_options(config: ConfigDict) -> dict[str, Any]:
    """The keyword arguments of `training_loss`."""
    names = ("prediction", "variance", "loss", "weighting", "vlb_weight")
    return {name: config.diffusion[name] for name in names}
