from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import attention, transformer

from ddpm_jax.models.transformer import Attention, Transformer


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def randomised(module, *arguments):
    """Parameters in which no layer is (almost) zero, of the size that keeps activations about 1; and as float64."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(rng.standard_normal(leaf.shape) / np.sqrt(leaf.shape[0] if leaf.ndim > 1 else 4), leaf.dtype)

    variables = jax.tree.map(draw, jax.eval_shape(module.init, jax.random.key(0), *arguments))
    return variables, jax.tree.map(lambda v: np.asarray(v, np.float64), variables["params"])


@partial(jax.jit, static_argnums=0)
def apply(module, variables, *arguments):
    return module.apply(variables, *arguments)


MASK = np.array([[True, True, True, False, False], [True, True, True, True, True]])


@pytest.mark.parametrize(("causal", "activation"), [(True, "quick_gelu"), (False, "gelu")])
def test_follows_the_equations(causal, activation):
    module = Transformer(2, 2, 12, causal=causal, activation=activation, epsilon=1e-3)
    x = normal(0, 2, 5, 8)
    variables, p = randomised(module, x)
    allowed = MASK[:, None, :] & (np.tri(5, dtype=bool) if causal else np.ones((5, 5), bool))
    expected = transformer(p, np.asarray(x, np.float64), 2, allowed, activation, 1e-3)
    found = apply(module, variables, x, MASK)
    np.testing.assert_allclose(found[MASK], expected[MASK], atol=1e-5)
    # What is masked changes nothing at the other tokens.
    other = apply(module, variables, jnp.where(MASK[..., None], x, 100.0), MASK)
    np.testing.assert_array_equal(other[MASK], found[MASK])


def test_cross_attention_without_bias():
    module, x, context = Attention(4, bias=False), normal(0, 2, 3, 8), normal(1, 2, 5, 6)
    variables, p = randomised(module, x, context)
    assert {name for name, layer in p.items() if "bias" in layer} == {"out"}
    expected = attention(p, np.asarray(x, np.float64), np.asarray(context, np.float64), 4, MASK[:, None, :])
    np.testing.assert_allclose(apply(module, variables, x, context, MASK), expected, atol=5e-6)


def test_starts_as_the_identity_and_bfloat16_is_close_to_float32():
    module, x = Transformer(1, 2, 16), normal(0, 2, 5, 8)
    initial = jax.jit(module.init)(jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(apply(module, initial, x), x, atol=1e-3)
    variables, _ = randomised(module, x)
    low, expected = apply(module.clone(dtype=jnp.bfloat16), variables, x), apply(module, variables, x)
    assert low.dtype == jnp.bfloat16
    assert np.abs(low.astype(jnp.float32) - expected).max() < 0.03 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Transformer(1, 3, 8), "num_heads 3 does not divide the width 8"),
        (Transformer(1, 2, 8, activation="silu"), "activation is 'silu'; accepted: gelu, gelu_new, quick_gelu"),
        (Transformer(1, 2, 8, norm="batch"), "norm is 'batch'; accepted: layer, rms"),
    ],
)
def test_refused(module, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 4, 8)))
