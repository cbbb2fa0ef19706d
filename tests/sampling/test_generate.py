"""A model with a network of a user's own."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import numpy as np

from ddpm_jax.diffusion.schedules import make_schedule
from ddpm_jax.sampling.condition import NoCondition
from ddpm_jax.sampling.decoder import Pixels
from ddpm_jax.sampling.generate import Model

traced = []


class Net(nn.Module):
    widths: Sequence[int]

    @nn.compact
    def __call__(self, x, t, cond, train=False):
        traced.append(self.widths)
        for width in self.widths:
            x = nn.Dense(width)(x)
        return x


def model(widths):
    return Model(NoCondition(), Net(widths), make_schedule("linear", 10), Pixels((2, 2, 1)))


def test_the_initialisation_is_traced_once():
    traced.clear()
    first = model((3, 1)).init_params(0)
    jax.tree.map(np.testing.assert_array_equal, model((3, 1)).init_params(0), first)
    assert model((3, 1)).param_shapes()["Dense_0"]["kernel"].shape == (1, 3)
    assert traced == [(3, 1)]
    assert np.any(first["Dense_0"]["kernel"] != model((3, 1)).init_params(1)["Dense_0"]["kernel"])


def test_a_network_that_cannot_be_hashed():
    """A module may have lists as attributes."""
    found = model([3, 1]).init_params(0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, model((3, 1)).init_params(0))
