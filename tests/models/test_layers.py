from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ddpm_jax.models import layers


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


conv = jax.jit(layers.conv, static_argnums=2)
upsample_conv = jax.jit(layers.upsample_conv)
transposed_conv = jax.jit(layers.transposed_conv)
group_norm = jax.jit(layers.group_norm, static_argnums=3)
dropout = jax.jit(layers.dropout, static_argnums=2)


@partial(jax.jit, static_argnums=2)
def lax_conv(x, kernel, padding):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def numpy_conv(x, kernel, padding):
    """Convolution of stride 1 in float64, tap by tap."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = x.shape[1] - kernel.shape[0] + 1, x.shape[2] - kernel.shape[1] + 1
    return sum(
        x[:, i : i + height, j : j + width] @ kernel[i, j]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    )


CONVOLUTIONS = [
    ((2, 5, 7, 3), (3, 3), ((1, 1), (1, 1))),
    ((2, 6, 4, 2), (1, 1), ((0, 0), (0, 0))),
    ((1, 8, 5, 3), (2, 2), ((1, 0), (0, 1))),
    ((2, 5, 9, 2), (3, 1), ((2, 0), (0, 0))),
    ((2, 9, 5, 2), (2, 5), ((0, 1), (3, 4))),
    ((3, 4, 6, 1), (4, 4), ((1, 2), (1, 2))),
    # Images of fewer pixels than the kernel has taps.
    ((3, 2, 4, 5), (3, 3), ((1, 1), (1, 1))),
    ((2, 1, 1, 3), (3, 3), ((1, 1), (1, 1))),
    ((2, 2, 2, 3), (2, 2), ((1, 0), (0, 1))),
]


@pytest.mark.parametrize(("shape", "size", "padding"), CONVOLUTIONS)
def test_conv(shape, size, padding):
    x, kernel = normal(0, *shape), normal(1, *size, shape[-1], 4)
    got = conv(x, kernel, padding)
    np.testing.assert_allclose(got, numpy_conv(x, kernel, padding), atol=5e-6)
    np.testing.assert_allclose(got, lax_conv(x, kernel, padding), atol=5e-6)


@pytest.mark.parametrize(("shape", "size", "padding"), CONVOLUTIONS[2:])
def test_conv_gradients(shape, size, padding):
    """Both, by x and by the kernel, and the gradients of a function of these gradients."""
    x, kernel = normal(2, *shape), normal(3, *size, shape[-1], 4)
    weights = normal(4, *lax_conv(x, kernel, padding).shape)

    def gradients(conv):
        loss = lambda x, kernel: jnp.sum(weights * jnp.sin(conv(x, kernel, padding)))  # noqa: E731
        first = jax.grad(loss, (0, 1))
        second = jax.grad(lambda *a: sum(jnp.sum(jnp.cos(g)) for g in first(*a)), (0, 1))
        return jax.jit(lambda *a: (first(*a), second(*a)))(x, kernel)

    got, expected = gradients(layers.conv), gradients(lax_conv)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(g, e, atol=4e-6 * float(jnp.abs(e).max()))


@pytest.mark.parametrize(("shape", "size", "padding"), CONVOLUTIONS)
def test_kernel_gradient_is_exact(shape, size, padding):
    """The convolution is linear in its kernel: so <g, conv(x, k)> differs by exactly its gradient, in float64."""
    x, kernel = normal(5, *shape), normal(6, *size, shape[-1], 4)
    g = normal(7, *lax_conv(x, kernel, padding).shape)
    got = jax.jit(jax.grad(lambda kernel: jnp.sum(g * layers.conv(x, kernel, padding))))(kernel)
    expected = np.zeros(kernel.shape)
    for index in np.ndindex(kernel.shape):
        unit = np.zeros(kernel.shape)
        unit[index] = 1
        expected[index] = np.sum(np.asarray(g, np.float64) * numpy_conv(x, unit, padding))
    np.testing.assert_allclose(got, expected, atol=5e-5)


def test_kernel_gradient_in_parts(monkeypatch):
    """The batch is divided over eight devices, each of which adds up its own part of every part."""
    x, kernel, g = normal(0, 32, 6, 6, 3), normal(1, 3, 3, 3, 4), normal(2, 32, 6, 6, 4)
    padding = ((1, 1), (1, 1))

    def gradient(conv):
        return lambda x, g: jax.grad(lambda kernel: jnp.sum(g * conv(x, kernel, padding)))(kernel)

    def convolutions():
        return str(jax.make_jaxpr(gradient(layers.conv))(x, g)).count("conv_general_dilated")

    whole = convolutions()
    monkeypatch.setattr(layers, "_CACHED", 256)
    jax.clear_caches()
    assert convolutions() == whole + 3  # four parts, since more do not divide each device's images
    batch = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
    compiled = jax.jit(gradient(layers.conv), in_shardings=(batch, batch)).lower(x, g).compile()
    np.testing.assert_allclose(compiled(x, g), gradient(lax_conv)(x, g), atol=1e-4)
    text = compiled.as_text()
    assert "all-reduce" in text
    assert not any(message in text for message in ("all-gather", "all-to-all", "collective-permute"))


@pytest.mark.parametrize(("batch", "size", "channels"), [(2, 4, 700), (1, 8, 256)])
def test_conv_of_few_pixels_and_a_large_kernel(batch, size, channels):
    """On a CPU it is one matrix product."""
    x, g = (normal(seed, batch, size, size, channels) for seed in (0, 2))
    kernel, padding = normal(1, 3, 3, channels, channels) / 80, ((1, 1), (1, 1))
    assert layers._suits_matmul(x, kernel)
    assert not layers._suits_matmul(normal(0, 32, size, size, channels), kernel)
    assert not layers._suits_matmul(x, kernel[..., :50])

    def value_and_gradients(conv):
        return jax.jit(lambda x, k, g: (*jax.vjp(lambda x, k: conv(x, k, padding), x, k)[1](g), conv(x, k, padding)))

    got, expected = value_and_gradients(layers.conv)(x, kernel, g), value_and_gradients(lax_conv)(x, kernel, g)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("shape", [(8, 3), (2, 3, 5, 4)])
def test_dense_and_its_gradients(shape):
    x, kernel = normal(0, *shape), normal(1, shape[-1], 6)
    weights = normal(2, *shape[:-1], 6)

    def value_and_gradients(dense):
        loss = lambda x, kernel: jnp.sum(weights * jnp.sin(dense(x, kernel)))  # noqa: E731
        return jax.jit(lambda *a: (dense(*a), jax.grad(loss, (0, 1))(*a)))(x, kernel)

    got, expected = value_and_gradients(layers.dense), value_and_gradients(jnp.matmul)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(g, e, atol=1e-6 * float(jnp.abs(e).max()))


# Upsampling.


@pytest.mark.parametrize("shape", [(2, 4, 4, 3), (1, 3, 6, 2), (2, 1, 1, 1)])
def test_upsample_conv_is_nearest_then_3x3(shape):
    x, kernel = normal(0, *shape), normal(1, 3, 3, shape[-1], 5)
    expected = numpy_conv(np.repeat(np.repeat(x, 2, axis=1), 2, axis=2), kernel, ((1, 1), (1, 1)))
    np.testing.assert_allclose(upsample_conv(x, kernel), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 4, 4, 3), (1, 3, 6, 2), (2, 1, 1, 1)])
def test_transposed_conv(shape):
    """As lax and Flax have it; and so its gradients."""
    x, kernel = normal(2, *shape), normal(3, 4, 4, shape[-1], 5)
    transposed = jax.jit(lambda x, k: jax.lax.conv_transpose(x, k, (2, 2), "SAME"))
    weights = normal(4, shape[0], 2 * shape[1], 2 * shape[2], 5)

    def loss(f):
        return jax.jit(jax.value_and_grad(lambda x, k: jnp.sum(weights * jnp.sin(f(x, k))), (0, 1)))(x, kernel)

    np.testing.assert_allclose(transposed_conv(x, kernel), transposed(x, kernel), atol=1e-5)
    for g, e in zip(jax.tree.leaves(loss(layers.transposed_conv)), jax.tree.leaves(loss(transposed)), strict=True):
        np.testing.assert_allclose(g, e, atol=1e-5 * max(1, float(jnp.abs(e).max())))


def test_transposed_conv_taps():
    """Tap (i, j) joins x[h, w] to the output pixel (2 h + 2 - i, 2 w + 2 - j)."""
    x = jnp.zeros((1, 5, 5, 1)).at[0, 2, 1, 0].set(1.0)
    kernel = jnp.arange(1.0, 17).reshape(4, 4, 1, 1)
    expected = np.zeros((10, 10))
    for i in range(4):
        for j in range(4):
            expected[4 + 2 - i, 2 + 2 - j] = kernel[i, j, 0, 0]
    np.testing.assert_array_equal(transposed_conv(x, kernel)[0, :, :, 0], expected)


# Group norm.


def numpy_group_norm(x, scale, bias, groups, epsilon=1e-6):
    x = np.asarray(x, np.float64)
    grouped = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    centred = grouped - grouped.mean((1, 3), keepdims=True)
    normed = (centred / np.sqrt((centred**2).mean((1, 3), keepdims=True) + epsilon)).reshape(x.shape)
    wide = lambda v: np.broadcast_to(np.asarray(v, np.float64), (x.shape[0], x.shape[-1]))[:, None, None]  # noqa: E731
    return normed * wide(scale) + wide(bias)


@pytest.mark.parametrize("groups", [1, 2, 4, 12])
@pytest.mark.parametrize("per_example", [False, True])
def test_group_norm(groups, per_example):
    x = 2 * normal(0, 3, 5, 6, 12) + jnp.linspace(-1, 1, 12) + 0.5
    scale, bias = normal(1, *((3, 12) if per_example else (12,))), normal(2, *((3, 12) if per_example else (12,)))
    got = group_norm(x, scale, bias, groups)
    np.testing.assert_allclose(got, numpy_group_norm(x, scale, bias, groups), atol=3e-6)
    if not per_example:
        flax = nn.GroupNorm(num_groups=groups, epsilon=1e-6).apply({"params": {"scale": scale, "bias": bias}}, x)
        np.testing.assert_allclose(got, flax, atol=3e-6)


@pytest.mark.parametrize("activation", [None, nn.swish, nn.gelu])
def test_group_norm_gradients_are_flax_s(activation):
    x, scale, bias, weights = normal(0, 2, 4, 4, 8), normal(1, 8), normal(2, 8), normal(3, 2, 4, 4, 8)

    def flax(x, scale, bias):
        normed = nn.GroupNorm(4, epsilon=1e-6).apply({"params": {"scale": scale, "bias": bias}}, x)
        return normed if activation is None else activation(normed)

    ours = lambda x, s, b: layers.group_norm(x, s, b, 4, activation=activation)  # noqa: E731

    def gradients(f):
        return jax.jit(jax.grad(lambda *a: jnp.sum(weights * f(*a) ** 2), (0, 1, 2)))(x, scale, bias)

    got, expected = gradients(ours), gradients(flax)
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(g, e, atol=3e-5)


def test_group_norm_epsilon_and_constant_input():
    """A constant has no variance: what is left is the bias."""
    x = jnp.full((1, 4, 4, 4), 3.0)
    got = group_norm(x, jnp.ones(4), jnp.arange(4.0), 2)
    np.testing.assert_allclose(got, np.broadcast_to(np.arange(4.0), x.shape), atol=1e-6)
    small = 1e-3 * normal(1, 1, 4, 4, 4)
    got = group_norm(small, jnp.ones(4), jnp.zeros(4), 2)
    np.testing.assert_allclose(got, numpy_group_norm(small, np.ones(4), np.zeros(4), 2, 1e-6), atol=3e-6)
    assert np.std(got) < 0.8


@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_group_norm_of_bfloat16_keeps_float32_statistics(offset):
    """1024 pixels, whose sums bfloat16 could not hold: the result is the exact one, rounded."""
    x = (normal(0, 2, 32, 32, 8) + offset).astype(jnp.bfloat16)
    got = group_norm(x, jnp.ones(8), jnp.zeros(8), 4)
    assert got.dtype == jnp.bfloat16
    exact = numpy_group_norm(x, np.ones(8), np.zeros(8), 4)
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=2**-8, atol=1e-4)


def test_group_norm_with_an_activation_in_bfloat16():
    """The activation is that of the rounded norm; the gradients are too, in the dtypes of their arguments."""
    x, scale, bias, g = normal(0, 2, 4, 4, 8), normal(1, 8), normal(2, 8), normal(3, 2, 4, 4, 8)
    x, g = x.astype(jnp.bfloat16), g.astype(jnp.bfloat16)
    joined = jax.vjp(lambda *a: layers.group_norm(*a, 4, activation=nn.swish), x, scale, bias)
    apart = jax.vjp(lambda *a: nn.swish(layers.group_norm(*a, 4)), x, scale, bias)
    np.testing.assert_array_equal(joined[0], apart[0])
    for got, expected in zip(joined[1](g), apart[1](g), strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(*(np.asarray(v, np.float32) for v in (got, expected)), atol=0.05)


def test_group_norm_stores_no_derivative_of_its_activation():
    x, scale, bias = normal(0, 2, 4, 4, 8), normal(1, 8), normal(2, 8)

    def stored(function):
        """How many arrays as large as x, other than x itself, the gradient takes from the forward pass."""
        (pullback,) = jax.vjp(function, x, scale, bias)[1:]
        large = [leaf for leaf in jax.tree.leaves(pullback) if leaf.size == x.size]
        return sum(not np.array_equal(leaf, x) for leaf in large)

    assert stored(lambda *a: layers.group_norm(*a, 4, activation=nn.swish)) == 0
    assert stored(lambda *a: nn.swish(layers.group_norm(*a, 4))) > 0


# Dropout.


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("shape", [(8, 24, 24, 16), (20, 15, 17, 5)])
def test_dropout_rate_and_scale(rate, shape):
    """Kept elements are divided by 1 - rate; their number is binomial."""
    x = jnp.abs(normal(0, *shape)) + 1
    got = np.asarray(dropout(jax.random.key(1), x, rate))
    kept = got != 0
    np.testing.assert_allclose(got[kept], np.asarray(x)[kept] / (1 - rate), rtol=2e-7)
    n = kept.size
    for axis in (None, (0, 1, 2)):
        share = kept.mean(axis)
        m = n if axis is None else n // shape[-1]
        assert np.all(np.abs(share - (1 - rate)) <= 5 * np.sqrt(rate * (1 - rate) / m) + 2**-16)


def test_dropout_of_neighbours_is_independent():
    """Neighbouring channels, rows and columns are independent, and so are the two rows that share a random number."""
    kept = np.asarray(dropout(jax.random.key(2), jnp.ones((64, 32, 32, 4)), 0.3)) != 0
    atol = 5 / np.sqrt(64 * 32 * 32)
    np.testing.assert_allclose(np.corrcoef(kept.reshape(-1, 4), rowvar=False), np.eye(4), atol=atol)
    pairs = ((kept[:, :16], kept[:, 16:]), (kept[:, 1:], kept[:, :-1]), (kept[:, :, 1:], kept[:, :, :-1]))
    for first, second in pairs:
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < atol


def test_dropout_depends_on_the_key_and_keeps_the_dtype():
    x = jnp.ones((2, 8, 8, 8), jnp.bfloat16)
    first, again, other = (dropout(jax.random.key(i), x, 0.5) for i in (0, 0, 1))
    assert first.dtype == jnp.bfloat16
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_dropout_is_the_same_on_eight_devices():
    mesh = jax.make_mesh((8,), ("data",))
    sharded = NamedSharding(mesh, PartitionSpec("data"))
    x = normal(0, 16, 4, 4, 6)
    expected = dropout(jax.random.key(3), x, 0.4)
    f = jax.jit(lambda key, x: layers.dropout(key, x, 0.4), in_shardings=(None, sharded), out_shardings=sharded)
    got = f(jax.random.key(3), jax.device_put(x, sharded))
    assert len(got.sharding.device_set) == 8
    np.testing.assert_array_equal(got, expected)
