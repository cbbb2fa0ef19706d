"""Arithmetic of traced programs, counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from ddpm_jax.models import layers
from ddpm_jax.planning.flops import matrix_flops

PRODUCT = 2 * 8 * 16 * 32
CONV = 2 * 4 * 8 * 8 * 9 * 64 * 128


def flops(function, *shapes):
    return matrix_flops(jax.make_jaxpr(function)(*(jnp.zeros(shape) for shape in shapes)))


def conv(x, kernel):
    return layers.conv(x, kernel, ((1, 1), (1, 1)))


def strided(x, kernel):
    return lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def gradient(function):
    return jax.grad(lambda *arguments: jnp.sum(function(*arguments) ** 2), argnums=(0, 1))


class TestMatrixFlops:
    @pytest.mark.parametrize(
        ("function", "shapes", "expected"),
        [
            (jnp.matmul, [(8, 16), (16, 32)], PRODUCT),
            (gradient(jnp.matmul), [(8, 16), (16, 32)], 3 * PRODUCT),
            (conv, [(4, 8, 8, 64), (3, 3, 64, 128)], CONV),  # with Winograd's formulation beside it
            (gradient(conv), [(4, 8, 8, 64), (3, 3, 64, 128)], 3 * CONV),
            (strided, [(4, 16, 16, 64), (3, 3, 64, 128)], CONV),
            (gradient(strided), [(4, 16, 16, 64), (3, 3, 64, 128)], 3 * CONV),
            (jax.jit(jax.checkpoint(jnp.matmul)), [(8, 16), (16, 32)], PRODUCT),
        ],
    )
    def test_counts_two_for_each_product_and_sum(self, function, shapes, expected):
        assert flops(function, *shapes) == expected

    def test_a_loop_counts_as_often_as_it_runs(self):
        def loop(x, w):
            return lax.scan(lambda x, _: (x @ w, None), x, length=7)[0]

        assert flops(loop, (8, 16), (16, 16)) == 7 * 2 * 8 * 16 * 16

    def test_of_two_branches_the_more_expensive_counts(self):
        def branch(x, w):
            return lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: jnp.zeros((8, 32)))

        assert flops(branch, (8, 16), (16, 32)) == PRODUCT
