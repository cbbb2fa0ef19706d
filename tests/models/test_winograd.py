import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.models import layers, winograd

PADDING = ((1, 1), (1, 1))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def numpy_conv(x, kernel):
    """The convolution in float64, tap by tap."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), *PADDING, (0, 0)))
    height, width = x.shape[1] - 2, x.shape[2] - 2
    kernel = np.asarray(kernel, np.float64)
    return sum(x[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3))


@pytest.mark.parametrize("shape", [(2, 2, 2, 3), (1, 4, 4, 1), (3, 6, 4, 5), (2, 8, 10, 64)])
def test_conv(shape):
    x, kernel = normal(0, *shape), normal(1, 3, 3, shape[-1], 6)
    expected = numpy_conv(x, kernel)
    np.testing.assert_allclose(jax.jit(winograd.conv)(x, kernel), expected, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize("shape", [(2, 2, 2, 3), (3, 6, 4, 5), (2, 8, 10, 64)])
def test_gradients(shape):
    """The convolution is bilinear: <g, conv(x, k)> = <x, dx> = <k, dk>, for every x and k, so by unit vectors."""
    x, kernel, g = normal(0, *shape), normal(1, 3, 3, shape[-1], 6), normal(2, *shape[:3], 6)
    dx, dkernel = jax.jit(winograd.input_gradient)(kernel, g), jax.jit(winograd.kernel_gradient)(x, g)
    g64 = np.asarray(g, np.float64)
    rng = np.random.default_rng(3)
    for got, other, size in (
        (dx, lambda unit: numpy_conv(unit, kernel), 40),
        (dkernel, lambda unit: numpy_conv(x, unit), 40),
    ):
        for index in rng.choice(got.size, min(size, got.size), replace=False):
            unit = np.zeros(got.size)
            unit[index] = 1
            expected = np.sum(g64 * other(unit.reshape(got.shape)))
            np.testing.assert_allclose(got.ravel()[index], expected, atol=1e-5 * np.abs(got).max())


def test_rounds_like_the_plain_convolution():
    """Errors against float64 of the size that XLA's float32 convolution has."""
    x, kernel = normal(0, 2, 16, 16, 128), normal(1, 3, 3, 128, 128)
    exact = numpy_conv(x, kernel)

    def error(y):
        return np.linalg.norm(y - exact) / np.linalg.norm(exact)

    plain = jax.lax.conv_general_dilated(x, kernel, (1, 1), PADDING, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert error(jax.jit(winograd.conv)(x, kernel)) < max(4 * error(plain), 1e-6)


X, KERNEL = jnp.zeros((1, 32, 32, 128)), jnp.zeros((3, 3, 128, 128))


@pytest.mark.parametrize(
    ("x", "kernel", "padding", "suits"),
    [
        (X, KERNEL, PADDING, True),
        (X[:, :16], KERNEL, PADDING, False),  # too little to do
        (X[:, :31], KERNEL, PADDING, False),  # an odd size
        (X, KERNEL[:2], ((1, 0), (1, 1)), False),
        (X, KERNEL, ((0, 0), (0, 0)), False),
        (X.astype(jnp.bfloat16), KERNEL.astype(jnp.bfloat16), PADDING, False),
        (jnp.zeros((16, 64, 64, 3)), jnp.zeros((3, 3, 3, 128)), PADDING, False),  # too few channels
    ],
)
def test_what_suits(x, kernel, padding, suits):
    assert winograd.suits(x, kernel, padding) == suits


def test_layer_takes_this_way_on_a_cpu():
    """If it suits, its value and both gradients equal these functions' bit for bit, and lax's up to rounding."""
    x, kernel, g = normal(0, 1, 32, 32, 128), normal(1, 3, 3, 128, 128), normal(2, 1, 32, 32, 128)

    @jax.jit
    def both(x, kernel, g):
        y, vjp = jax.vjp(lambda x, kernel: layers.conv(x, kernel, PADDING), x, kernel)
        plain, plain_vjp = jax.vjp(
            lambda x, kernel: jax.lax.conv_general_dilated(
                x, kernel, (1, 1), PADDING, dimension_numbers=("NHWC", "HWIO", "NHWC")
            ),
            x,
            kernel,
        )
        return (y, *vjp(g)), (plain, *plain_vjp(g))

    got, plain = both(x, kernel, g)
    ours = (
        jax.jit(winograd.conv)(x, kernel),
        jax.jit(winograd.input_gradient)(kernel, g),
        jax.jit(winograd.kernel_gradient)(x, g),
    )
    for a, b, c in zip(got, ours, plain, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c, atol=1e-5 * float(jnp.abs(c).max()))
