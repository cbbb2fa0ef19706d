"""Two networks of which one is for the last step."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.models.last_step import OwnLastStep


class Scaled(nn.Module):
    @nn.compact
    def __call__(self, x, t, cond=None, *, train=False):
        return self.param("factor", nn.initializers.normal(), ()) * x


def test_the_lowest_timestep_has_its_own():
    net, x = OwnLastStep(Scaled(), Scaled()), jnp.ones((2, 4, 4, 1))
    params = net.init(jax.random.key(0), x, jnp.zeros(2, jnp.int32))["params"]
    assert params.keys() == {"net", "last"}
    apply = jax.jit(net.apply)
    for t, name in ((0, "last"), (1, "net"), (999, "net")):
        found = apply({"params": params}, x, jnp.full(2, t))
        np.testing.assert_array_equal(found, params[name]["factor"] * x)
    with pytest.raises(ValueError, match="own_last_step"):
        net.apply({"params": params}, x, jnp.zeros(2, jnp.int32), train=True)
