"""A separate network for the last sampling step."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp


class OwnLastStep(nn.Module):
    """Two networks of the same kind, one of them for timestep 0 only, as in Karlo's super-resolution.

    Attributes:
      net: called with (x, t, cond, train=...), such as a `UNet`.
      last: a network of the same kind, used at timestep 0.
    """

    net: nn.Module
    last: nn.Module

    def __call__(
        self, x: jax.Array, t: jax.Array, cond: Mapping[str, jax.Array] | None = None, *, train: bool = False
    ) -> jax.Array:
        """The output of one of the networks.

        Args:
          x, cond: passed to the network.
          t: [B], the same for all, as in sampling.
          train: must be False, since in training every example has its own timestep.
        """
        if train:
            raise ValueError("a network with upscale.own_last_step cannot be trained, only sampled from")
        if self.is_initializing():
            self.last(x, t, cond)
            output: jax.Array = self.net(x, t, cond)
        else:
            output = nn.cond(
                jnp.all(t == 0), lambda nets: nets.last(x, t, cond), lambda nets: nets.net(x, t, cond), self
            )
        return output
