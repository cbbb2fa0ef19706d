import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.models.pooling import TokenPooling

RNG = np.random.default_rng(0)
TOKENS = RNG.standard_normal((2, 5, 12)).astype(np.float32)
MASK = np.array([[True, True, False, False, False], [True, True, True, True, True]])


def randomised(module):
    shapes = jax.eval_shape(module.init, jax.random.key(0), TOKENS)
    return jax.tree.map(lambda leaf: jnp.asarray(RNG.standard_normal(leaf.shape), leaf.dtype) / 2, shapes)


def test_pools_what_the_mask_names():
    """Padding after a text changes nothing: the text alone gives the same result."""
    module = TokenPooling(8, num_heads=3)
    variables = randomised(module)
    apply = jax.jit(module.apply)
    found, other = (apply(variables, np.where(MASK[..., None], TOKENS, pad), MASK) for pad in (0, 100))
    assert found.shape == (2, 8)
    np.testing.assert_allclose(found, other, atol=1e-6)
    np.testing.assert_allclose(found[:1], apply(variables, TOKENS[:1, :2]), atol=2e-6)
    assert np.abs(found - apply(variables, TOKENS))[0].max() > 1e-3


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="pooling_heads 5 does not divide the tokens' width 12"):
        TokenPooling(8, num_heads=5).init(jax.random.key(0), TOKENS)
