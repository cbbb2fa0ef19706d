from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import layer_norm, transformer

from ddpm_jax.models.clip import CLIPImageEncoder, CLIPTextEncoder, TextEncoder

NARROW = CLIPTextEncoder(30, max_length=9, width=16, num_layers=2, num_heads=2, mlp_width=24, end_token=28)
# Start, words, end, padding. 29 is larger than the end token.
IDS = np.array([[27, 4, 29, 28, 28, 28], [27, 1, 2, 3, 28, 0]], np.int32)
MASK = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]], bool)
IMAGE = CLIPImageEncoder(
    image_size=6, patch_size=2, width=16, num_layers=2, num_heads=4, mlp_width=24, epsilon=1e-3, projection=5
)
SMALL = TextEncoder(30, max_length=9, width=16, num_heads=2)


def randomised(module, *arguments):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *arguments)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) / 2, leaf.dtype), shapes)


@partial(jax.jit, static_argnums=0)
def apply(module, variables, *arguments):
    return module.apply(variables, *arguments)


def test_clip_s_parameters():
    shapes = jax.eval_shape(CLIPTextEncoder().init, jax.random.key(0), jnp.zeros((1, 77), jnp.int32))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 123_060_480
    shapes = jax.eval_shape(CLIPImageEncoder().init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 303_179_776


def test_clip_s_pooled_state_is_the_end_token_s():
    module = NARROW.clone(projection=5)
    variables = randomised(module, IDS)
    states = apply(module, variables, IDS)
    np.testing.assert_allclose(states.pooled, states.tokens[[0, 1], [3, 4]], atol=1e-6)
    kernel = variables["params"]["projection"]["kernel"]
    np.testing.assert_allclose(states.projected, states.pooled @ kernel, atol=1e-5)
    largest = apply(NARROW.clone(end_token=None), randomised(NARROW, IDS), IDS)
    np.testing.assert_allclose(largest.pooled, largest.tokens[[0, 1], [2, 4]], atol=1e-6)
    assert largest.projected is None


def test_clip_s_tokens_do_not_attend_to_later_ones():
    variables = randomised(NARROW, IDS)
    found, other = (apply(NARROW, variables, ids, MASK) for ids in (IDS, np.where(MASK, IDS, 7)))
    np.testing.assert_array_equal(found.tokens[MASK], other.tokens[MASK])
    np.testing.assert_allclose(found.tokens[MASK], apply(NARROW, variables, IDS).tokens[MASK], atol=1e-5)


def test_padding_to_another_length_changes_nothing():
    variables = randomised(SMALL, IDS, MASK)
    found = apply(SMALL, variables, IDS, MASK)
    longer, mask = (np.pad(array, ((0, 0), (0, 3))) for array in (IDS, MASK))
    padded = apply(SMALL, variables, longer, mask)
    np.testing.assert_allclose(found.tokens[MASK], padded.tokens[mask], atol=1e-5)
    np.testing.assert_allclose(found.pooled, padded.pooled, atol=1e-5)
    means = [tokens[row].mean(0) for tokens, row in zip(np.asarray(found.tokens), MASK, strict=True)]
    np.testing.assert_allclose(found.pooled, means, atol=1e-5)
    other = apply(SMALL, variables, np.where(mask, longer, 7), mask)
    np.testing.assert_array_equal(other.pooled, padded.pooled)


def test_padding_has_no_gradient():
    ids = np.where(MASK, IDS, 9)  # which occurs in padding alone

    def total(variables):
        return jnp.sum(SMALL.apply(variables, ids, MASK).pooled ** 2)

    gradient = jax.jit(jax.grad(total))(randomised(SMALL, IDS, MASK))["params"]["tokens"]["embedding"]
    np.testing.assert_array_equal(gradient[9], 0)
    assert np.all(np.any(gradient[np.unique(IDS[MASK])] != 0, axis=-1))


def test_bfloat16_is_close_to_float32():
    variables = randomised(SMALL, IDS, MASK)
    low, expected = (apply(SMALL.clone(dtype=dtype), variables, IDS, MASK) for dtype in (jnp.bfloat16, jnp.float32))
    assert {array.dtype for array in (*low[:2], *expected[:2])} == {jnp.dtype("float32")}
    assert np.abs(low.pooled - expected.pooled).max() < 0.05 * np.abs(expected.pooled).max()


@pytest.mark.parametrize("module", [NARROW, SMALL])
def test_too_many_tokens(module):
    with pytest.raises(ValueError, match="a text of 10 tokens is longer than max_length, 9"):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 10), jnp.int32), jnp.ones((1, 10), bool))


# CLIP's image encoder.


def images(count=3):
    return np.random.default_rng(1).standard_normal((count, 6, 6, 3)).astype(np.float32)


def test_image_encoder_follows_the_equations():
    x = images()
    variables = randomised(IMAGE, x)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    places = [(slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2)) for i in range(3) for j in range(3)]
    patches = [np.einsum("bhwc,hwcd->bd", x[:, rows, columns], p["patches"]["kernel"]) for rows, columns in places]
    states = np.stack([np.broadcast_to(p["class_token"], (3, 16)), *patches], axis=1) + p["positions"]["embedding"]
    states = layer_norm(p["pre_norm"], states, 1e-3)
    states = transformer(p["transformer"], states, 4, np.ones((3, 10, 10), bool), "quick_gelu", 1e-3)
    pooled = layer_norm(p["post_norm"], states[:, 0], 1e-3)
    found = apply(IMAGE, variables, x)
    np.testing.assert_allclose(found.patches, states[:, 1:], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.pooled, pooled, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.projected, pooled @ p["projection"]["kernel"], rtol=1e-4, atol=1e-4)
    assert jax.eval_shape(IMAGE.clone(projection=None).apply, variables, x).projected is None


def test_image_encoder_of_pictures_that_are_not_square():
    """Patches are ordered row by row: with equal positions, a transposed picture gives the same patches transposed."""
    wide, high = (IMAGE.clone(image_size=size, channels=1) for size in ((4, 6), (6, 4)))
    x = images()[:, :4, :, :1]
    variables = randomised(wide, x)
    variables["params"]["positions"]["embedding"] *= 0
    variables["params"]["patches"]["kernel"] = np.ones((2, 2, 1, 16)) * variables["params"]["patches"]["kernel"][:1, :1]
    found, other = apply(wide, variables, x), apply(high, variables, x.swapaxes(1, 2))
    assert (wide.shape, high.shape) == ((4, 6, 1), (6, 4, 1))
    expected = other.patches.reshape(3, 3, 2, 16).swapaxes(1, 2).reshape(3, 6, 16)
    np.testing.assert_allclose(found.patches, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.projected, other.projected, rtol=1e-4, atol=1e-5)


def test_image_encoder_in_bfloat16_is_close_to_float32():
    variables = randomised(IMAGE, images())
    low, expected = (apply(IMAGE.clone(dtype=dtype), variables, images()) for dtype in (jnp.bfloat16, jnp.float32))
    assert {array.dtype for array in (*low, *expected)} == {jnp.dtype("float32")}
    assert np.abs(low.pooled - expected.pooled).max() < 0.05 * np.abs(expected.pooled).max()


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (IMAGE.clone(patch_size=4), (1, 6, 6, 3), "patch_size 4 does not divide image_size 6"),
        (IMAGE, (1, 6, 8, 3), "images have shape \\(6, 8, 3\\); accepted: \\(6, 6, 3\\)"),
        (IMAGE, (1, 6, 6, 1), "images have shape \\(6, 6, 1\\); accepted"),
    ],
)
def test_refused_images(module, shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape))
