"""The paper's schedule in float64, and batches of pictures noised at a few of its timesteps."""

import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.schedules import make_betas, make_schedule

T = 1000
LINEAR = make_schedule("linear", T)
BETAS = make_betas("linear", T)
ABAR = np.cumprod(1 - BETAS)
TIMES = np.array([0, 1, 10, 250, 500, 999])
LEVELS = np.arange(256) / 127.5 - 1


def single(*arrays):
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


def column(values):
    return np.asarray(values, np.float64).reshape(-1, 1, 1, 1)


def batch(seed, channels=3):
    """8-bit x_0, noise and an output for the network, float32 values held as float64."""
    rng = np.random.default_rng(seed)
    shape = (len(TIMES), 4, 4, channels)
    x_0 = (rng.integers(0, 256, shape) / 127.5 - 1).astype(np.float32).astype(np.float64)
    return (x_0, *(rng.standard_normal(shape).astype(np.float32).astype(np.float64) for _ in range(2)))


def noised(x_0, noise):
    return column(np.sqrt(ABAR[TIMES])) * x_0 + column(np.sqrt(1 - ABAR[TIMES])) * noise
