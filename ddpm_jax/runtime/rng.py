"""Named randomness: every draw is a function of (seed, purpose, index), so resuming needs no stored random state."""

import zlib

import jax
import numpy as np


def named_key(seed: int | np.uint32, purpose: str, index: int | jax.Array = 0) -> jax.Array:
    """The typed key of a purpose ("init", "noise", "dropout", ...) at a step or image number."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
    return jax.random.fold_in(key, index)
