"""A network and the encoder of its captions, as one module."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.models.captioned import Captioned
from ddpm_jax.models.clip import TextEncoder
from ddpm_jax.models.unet import UNet

UNET = UNet(channels=4, channel_multipliers=(1,), num_res_blocks=0, attention_resolutions=(), num_groups=2)
NET = Captioned(UNET, TextEncoder(30, max_length=9, width=8, num_layers=1, num_heads=2))
IDS = np.array([[1, 4, 9, 2, 0, 0], [1, 2, 0, 0, 0, 0]], np.int32)
COND = {"ids": IDS, "ids_mask": IDS > 0}
X, T = np.random.default_rng(0).standard_normal((2, 4, 4, 1)).astype(np.float32), np.array([3, 70])


@pytest.fixture(scope="module")
def variables():
    """In which no layer is (almost) zero."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(NET.init, jax.random.key(0), X, T, COND)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) / 2, leaf.dtype), shapes)


@partial(jax.jit, static_argnames="method")
def apply(variables, *arguments, method=None):
    return NET.apply(variables, *arguments, method=method)


def test_what_was_encoded_gives_the_same_as_the_texts(variables):
    """So sampling needs to run the encoder only once."""
    encoded = apply(variables, COND, method="encode")
    assert {name: value.shape for name, value in encoded.items()} == {
        "tokens": (2, 6, 8),
        "tokens_mask": (2, 6),
        "vector": (2, 8),
    }
    found = apply(variables, X, T, encoded)
    np.testing.assert_allclose(found, apply(variables, X, T, COND), atol=1e-5)
    swapped = jax.tree.map(lambda value: value[::-1], COND)
    assert np.abs(apply(variables, X, T, swapped) - found).max() > 1e-3


def test_padding_to_another_length_changes_nothing(variables):
    longer = {name: np.pad(value, ((0, 0), (0, 3))) for name, value in COND.items()}
    longer["ids"] = np.where(longer["ids_mask"], longer["ids"], 7)
    np.testing.assert_allclose(apply(variables, X, T, longer), apply(variables, X, T, COND), atol=1e-5)


@pytest.mark.slow
def test_gradients_reach_the_encoder(variables):
    """All of its parameters: through cross-attention, and through the vector added to the time embedding."""

    @jax.jit
    def gradient(params):
        return jax.grad(lambda params: jnp.sum(NET.apply({"params": params}, X, T, COND) ** 2))(params)

    found = gradient(variables["params"])["encoder"]
    embedding = found["tokens"].pop("embedding")
    assert np.flatnonzero(np.any(embedding != 0, axis=1)).tolist() == [1, 2, 4, 9]
    for path, leaf in jax.tree_util.tree_flatten_with_path(found)[0]:
        if "key" not in str(path) or "bias" not in str(path):  # a bias of the keys changes no softmax
            assert np.any(leaf != 0), path
