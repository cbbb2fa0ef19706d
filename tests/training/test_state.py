from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm_jax.diffusion.schedules import make_schedule
from ddpm_jax.models.unet import UNet
from ddpm_jax.runtime import parallel
from ddpm_jax.sampling.condition import NoCondition
from ddpm_jax.sampling.decoder import Pixels
from ddpm_jax.sampling.generate import Model
from ddpm_jax.training.state import create_state, update_ema

NET = UNet(channels=8, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(), num_groups=4)
MODEL = Model(NoCondition(), NET, make_schedule(), Pixels((8, 8, 1)))


@cache
def params(seed):
    """Quickly compiled."""
    init = jax.jit(lambda: MODEL.init_params(seed), compiler_options=parallel.run_once_options())
    return init()


@pytest.mark.slow
def test_state_starts_with_copies_of_the_parameters():
    state = jax.jit(lambda p: create_state(p, optax.adam(1e-3), (0.9, 0.999), num_timesteps=50))(params(0))
    assert list(state.ema) == ["0.9", "0.999"]
    for tree in (state.params, *state.ema.values()):
        jax.tree.map(np.testing.assert_array_equal, tree, params(0))
    assert int(state.step) == 0
    assert state.history is not None
    assert state.history.losses.shape == (50, 10)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(state.params))


@pytest.mark.slow
def test_initial_parameters_follow_from_the_seed():
    again = params.__wrapped__(0)
    jax.tree.map(np.testing.assert_array_equal, params(0), again)
    other = params(1)
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(other), strict=True))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999])
def test_ema_copies_first_and_averages_then(decay):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(20, 5))
    average, expected = jnp.full(5, 1e3), None
    for step, value in enumerate(values):
        average = update_ema(average, jnp.asarray(value, jnp.float32), decay, jnp.int32(step))
        expected = value if expected is None else decay * expected + (1 - decay) * value
    np.testing.assert_allclose(average, expected, rtol=2e-5, atol=1e-6)
