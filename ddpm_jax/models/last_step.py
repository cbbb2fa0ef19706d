"""Sampling whose last step has a network of its own."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp


class OwnLastStep(nn.Module):
    """Two networks of the same kind, one of them for the lowest timestep alone, as Karlo's super-resolution has them.

    Attributes:
      net: called (x, t, cond, train=...), such as a `UNet`.
      last: the same, in its place at timestep 0.
    """

    net: nn.Module
    last: nn.Module

    def __call__(
        self, x: jax.Array, t: jax.Array, cond: Mapping[str, jax.Array] | None = None, *, train: bool = False
    ) -> jax.Array:
        """The output of one of the networks.

        Args:
          x, cond: of the networks.
          t: [B], the same for all, as in sampling.
          train: is refused, since in training every example has a timestep of its own.
        """
        if train:
            raise ValueError("the last step has a network of its own (upscale.own_last_step), and this is not trained")
        if self.is_initializing():
            self.last(x, t, cond)
            return self.net(x, t, cond)
        return nn.cond(jnp.all(t == 0), lambda nets: nets.last(x, t, cond), lambda nets: nets.net(x, t, cond), self)
