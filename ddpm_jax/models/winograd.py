"""3 x 3 convolutions on CPUs by Winograd's minimal filtering F(2 x 2, 3 x 3) (Lavin & Gray 2016, arXiv:1509.09308).

With the matrices B, G and A below, a 4 x 4 tile d of the input and the kernel w give the 2 x 2 square

    A^T [(G w G^T) * (B^T d B)] A

of the output. For each of its 4 x 4 entries, the product in the middle is one matrix product over the channels: 16
multiplications per square where direct convolution takes 36. B and A contain only 0 and +-1, G only 0, 1 and +-1/2, so
float32 loses no more precision than in direct convolution.

The public functions are jit-compiled, so a network with many convolutions of one shape traces them once.
"""

from collections.abc import Sequence
from functools import reduce
from operator import add

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_B_T = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_A_T = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])

LEAST_WORK = 2**24  # multiplications of each tap of a kernel, over the whole batch; with less it is not faster

Grid = list[list[jax.Array]]  # a matrix of arrays


def suits(x: jax.Array, kernel: jax.Array, padding: Sequence[Sequence[int]]) -> bool:
    """Whether `conv` supports this convolution of stride 1 and is faster than XLA's own."""
    batch, height, width, channels = x.shape
    features = kernel.shape[-1]
    return (
        kernel.shape[:2] == (3, 3)
        and all(tuple(sides) == (1, 1) for sides in padding)
        and height % 2 == width % 2 == 0
        and x.dtype == jnp.float32
        and min(channels, features) >= 64
        and batch * height * width * channels * features >= LEAST_WORK
        and 4 * 4 * x.size < 2**30  # bytes of the tiles, which are all in memory at once
    )


@jax.jit
def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution of x [B, H, W, C] with a kernel [3, 3, C, D] that keeps the size: [B, H, W, D]."""
    places = _matmuls(_tiles(x), _sandwich(_G, _taps(kernel)), contract=(1, 0))
    return _image(_sandwich(_A_T, places), x.shape)


@jax.jit
def input_gradient(kernel: jax.Array, g: jax.Array) -> jax.Array:
    """d<g, conv(x, kernel)> / dx: [B, H, W, C] of a kernel [3, 3, C, D] and g [B, H, W, D].

    This is a convolution too, with the kernel transposed and flipped; flipping exchanges the first and last rows and
    columns of G w G^T.
    """
    weights = _sandwich(_G, _taps(kernel))
    flipped = [[weights[i][j] for j in (3, 1, 2, 0)] for i in (3, 1, 2, 0)]
    return _image(_sandwich(_A_T, _matmuls(_tiles(g), flipped, contract=(1, 1))), g.shape)


@jax.jit
def kernel_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    """d<g, conv(x, kernel)> / d kernel: [3, 3, C, D] of x [B, H, W, C] and g [B, H, W, D]."""
    squares = [[g[:, i::2, j::2].reshape(-1, g.shape[-1]) for j in range(2)] for i in range(2)]
    taps = _sandwich(_G.T, _matmuls(_tiles(x), _sandwich(_A_T.T, squares), contract=(0, 0)))
    return jnp.stack([jnp.stack(row) for row in taps])


def _combine(weights: np.ndarray, terms: Sequence[jax.Array]) -> jax.Array:
    """sum_i weights[i] terms[i]; the compiler drops the multiplications by +-1."""
    return reduce(add, (float(weight) * term for weight, term in zip(weights, terms, strict=True) if weight))


def _sandwich(m: np.ndarray, grid: Grid) -> Grid:
    """m grid m^T."""
    product = [[_combine(weights, column) for column in zip(*grid, strict=True)] for weights in m]
    return [[_combine(weights, row) for weights in m] for row in product]


def _matmuls(left: Grid, right: Grid, contract: tuple[int, int]) -> Grid:
    """The matrix product at each grid place, summed over the axes `contract` of the left and the right."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return [
        [lax.dot_general(a, b, dimensions) for a, b in zip(*rows, strict=True)]
        for rows in zip(left, right, strict=True)
    ]


def _taps(kernel: jax.Array) -> Grid:
    return [[kernel[i, j] for j in range(3)] for i in range(3)]


def _tiles(x: jax.Array) -> Grid:
    """B^T d B of every tile of x [B, H, W, C]: 4 x 4 arrays [B * H / 2 * W / 2, C]."""
    _, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    tiles = _sandwich(_B_T, [[x[:, i : i + height : 2, j : j + width : 2] for j in range(4)] for i in range(4)])
    return [[place.reshape(-1, channels) for place in row] for row in tiles]


def _image(squares: Grid, shape: Sequence[int]) -> jax.Array:
    """[B, H, W, C] of the 2 x 2 arrays [B * H / 2 * W / 2, C] that hold the corners of its squares."""
    batch, height, width, _ = shape
    corners = [[corner.reshape(batch, height // 2, width // 2, -1) for corner in row] for row in squares]
    rows = jnp.stack([jnp.stack(row, axis=3) for row in corners], axis=2)
    return rows.reshape(batch, height, width, -1)
