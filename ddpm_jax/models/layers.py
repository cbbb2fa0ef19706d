"""The operations that dominate a UNet's run time: convolution, matrix product, upsampling convolution, group norm.

They are pure functions on NHWC arrays, written so that XLA compiles them well on every backend; `blocks.py` gives them
parameters. None changes the mathematics of its layer: the tests compare each with `jax.lax` or Flax.
"""

from collections.abc import Callable
from functools import partial, reduce
from operator import add
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.xla_metadata import set_xla_metadata

from ddpm_jax.models import winograd

Padding = tuple[tuple[int, int], tuple[int, int]]
Activation = Callable[[jax.Array], jax.Array]
_Pair = tuple[jax.Array, jax.Array]  # x and the kernel, or their gradients

KEPT = "kept"  # `jax.checkpoint`'s name for values that are small or slow to recompute

_LARGE_KERNEL = 2**20  # elements; see `_waiting`
_FEW_PIXELS, _HUGE_KERNEL, _WIDE_KERNEL = 512, 2**22, 2**19  # of the whole batch; elements; see `_suits_matmul`
_CACHED = 3 * 2**18  # bytes of a gradient, the most that `_kernel_gradient_on_cpu` reads at a time
_MOST_PARTS = 8  # of a batch there

_Arrays = TypeVar("_Arrays", jax.Array, _Pair)


@jax.jit
def _identity(x: _Arrays) -> _Arrays:
    return x


def _materialize(x: _Arrays) -> _Arrays:
    """Returns x, but computed once and written to memory.

    XLA's CPU backend repeats a chain of cheap operations in each of its consumers, and the gradient that arrives at a
    layer is a long chain with many consumers. XLA does not look through a call that must not be inlined.
    """
    with set_xla_metadata(inlineable="false"):
        y: _Arrays = _identity(x)
        return y


@jax.custom_vjp
def _materialize_on_cpu(x: _Pair) -> _Pair:
    """Returns x; on CPUs x and its gradient are computed once and written to memory."""
    y: _Pair = lax.platform_dependent(x, cpu=_materialize, default=lambda x: x)
    return y


def _materialize_forward(x: _Pair) -> tuple[_Pair, None]:
    return _materialize_on_cpu(x), None


def _materialize_backward(_: None, g: _Pair) -> tuple[_Pair]:
    return (_materialize_on_cpu(g),)


_materialize_on_cpu.defvjp(_materialize_forward, _materialize_backward)


def _waiting(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """The kernel; a large one only once x has been computed.

    XLA would otherwise transform the kernels of a whole network at once, or convert them from bfloat16 to float32, in
    which CPUs compute, and hold them all. An optimization_barrier does not prevent that on CPUs.
    """
    return kernel if kernel.size <= _LARGE_KERNEL else kernel + (0.0 * x.reshape(-1)[0]).astype(kernel.dtype)


def _conv(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _suits_matmul(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether a convolution is faster on CPUs as one matrix product (`benchmarks/layers.py`).

    XLA swaps an image and its kernel if the image has no more pixels than the kernel has taps, and then takes many
    times as long. A kernel that is far larger than the images takes most of the time to read, and Winograd's algorithm
    would write it once more. If there is too little work for that algorithm, the gradient of XLA's own convolution
    spends most of its time transposing a wide kernel.
    """
    batch, height, width, channels = x.shape
    pixels, taps = height * width, kernel.shape[0] * kernel.shape[1]
    few = batch * pixels < _FEW_PIXELS and kernel.size >= _HUGE_KERNEL
    little = batch * pixels * channels * kernel.shape[-1] < winograd.LEAST_WORK and kernel.size >= _WIDE_KERNEL
    return pixels <= taps or few or little


def _suits_winograd(x: jax.Array, kernel: jax.Array, padding: Padding) -> bool:
    return winograd.suits(x, kernel, padding) and not _suits_matmul(x, kernel)


def _conv_as_matmul(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """`_conv` as one matrix product of the kernel and the pixels that each output pixel sees."""
    height, width = kernel.shape[:2]
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
    seen = [x[:, i : i + rows, j : j + columns] for i in range(height) for j in range(width)]
    return jnp.concatenate(seen, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def _conv_on_cpu(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    return (_conv_as_matmul if _suits_matmul(x, kernel) else _conv)(x, kernel, padding)


def _kernel_gradient_on_cpu(x: jax.Array, kernel: jax.Array, padding: Padding, g: jax.Array) -> jax.Array:
    """d<g, conv(x, kernel)> / d kernel, computed for a part of the batch at a time.

    XLA computes it as a convolution with g as the kernel, and reads all of g for each channel of x. That is fast only
    if g fits into the cache. The parts interleave, so that a batch divided over devices leaves each device a share of
    every part. There is no loop over them, because in one XLA takes 10 to 100 times as long.
    """
    batch, devices = x.shape[0], jax.device_count()
    whole = [n for n in range(1, _MOST_PARTS + 1) if batch % (n * devices) == 0] or [1]
    parts = next((n for n in whole if g.nbytes // (n * devices) <= _CACHED), whole[-1])

    def gradient(x: jax.Array, g: jax.Array) -> jax.Array:
        dkernel: jax.Array
        (dkernel,) = jax.linear_transpose(lambda kernel: _conv_on_cpu(x, kernel, padding), kernel)(g)
        return dkernel

    if parts == 1 or _suits_matmul(x, kernel):
        return gradient(x, g)
    x, g = (v.reshape(batch // parts, parts, *v.shape[1:]) for v in (x, g))
    return reduce(add, (gradient(x[:, i], g[:, i]) for i in range(parts)))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """Convolution with stride 1 whose gradient is fast on CPUs too.

    On CPUs large 3 x 3 convolutions and both of their gradients use Winograd's algorithm (`winograd.py`), those of few
    pixels and many channels are matrix products, and the kernel gradients of the others are computed for a part of the
    batch at a time (`benchmarks/layers.py` compares each with XLA's own). Like all functions with a custom
    gradient, this one supports reverse-mode differentiation only.

    Args:
      x: [B, H, W, C].
      kernel: [h, w, C, D].
      padding: ((top, bottom), (left, right)), each smaller than the kernel's size.

    Returns:
      [B, H', W', D].
    """

    def cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
        if _suits_winograd(x, kernel, padding):
            y: jax.Array = winograd.conv(x, _waiting(kernel, x))
            return y
        if kernel.dtype == jnp.bfloat16:
            kernel = _waiting(kernel, x)
        return _conv_on_cpu(x, kernel, padding)

    y: jax.Array = lax.platform_dependent(x, kernel, cpu=cpu, default=partial(_conv, padding=padding))
    return y


def _conv_forward(x: jax.Array, kernel: jax.Array, padding: Padding) -> tuple[jax.Array, _Pair]:
    return conv(x, kernel, padding), (x, kernel)


def _conv_backward(padding: Padding, residuals: _Pair, g: jax.Array) -> _Pair:
    x, kernel = residuals

    def default(x: jax.Array, kernel: jax.Array, g: jax.Array) -> _Pair:
        (dx,) = jax.linear_transpose(lambda x: _conv(x, kernel, padding), x)(g)
        (dkernel,) = jax.linear_transpose(lambda kernel: _conv(x, kernel, padding), kernel)(g)
        return dx, dkernel

    def cpu(x: jax.Array, kernel: jax.Array, g: jax.Array) -> _Pair:
        g = _materialize(g)
        if _suits_winograd(x, kernel, padding):
            return winograd.input_gradient(kernel, g), winograd.kernel_gradient(x, g)
        (dx,) = jax.linear_transpose(lambda x: _conv_on_cpu(x, kernel, padding), x)(g)
        return dx, _kernel_gradient_on_cpu(x, kernel, padding, g)

    gradients: _Pair = lax.platform_dependent(x, kernel, g, cpu=cpu, default=default)
    return gradients


conv.defvjp(_conv_forward, _conv_backward)


@jax.custom_vjp
def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., C] times a kernel [C, D], with a gradient that is fast on CPUs too; reverse mode only, like `conv`."""
    if kernel.dtype == jnp.bfloat16:
        kernel = lax.platform_dependent(x, kernel, cpu=lambda x, kernel: _waiting(kernel, x), default=lambda _, k: k)
    return x @ kernel


def _dense_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, _Pair]:
    return dense(x, kernel), (x, kernel)


def _dense_backward(residuals: _Pair, g: jax.Array) -> _Pair:
    x, kernel = residuals
    g = lax.platform_dependent(g, cpu=_materialize, default=lambda g: g)
    pixels, g_pixels = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return g @ kernel.T, pixels.T @ g_pixels


dense.defvjp(_dense_forward, _dense_backward)


def upsample_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Doubles height and width: each pixel repeated over a 2 x 2 square, then a 3 x 3 convolution that keeps the size.

    An output pixel sees only 2 x 2 pixels of x; which ones depends on whether its row and column are even. So the four
    kinds of pixels are four 2 x 2 convolutions of x itself, whose taps are sums of the kernel's: 16 multiplications
    where convolving the enlarged image takes 36.

    Args:
      x: [B, H, W, C].
      kernel: [3, 3, C, D]; its taps are summed in its own dtype.

    Returns:
      [B, 2 H, 2 W, D].
    """
    taps = [[kernel[i, j] for j in range(3)] for i in range(3)]
    joined = (((0,), (1, 2)), ((0, 1), (2,)))  # which rows, or columns, of the kernel fall on the same pixel of x

    def phase(a: int, b: int) -> jax.Array:
        sums = [
            [reduce(add, (taps[i][j] for i in rows for j in columns)) for columns in joined[b]] for rows in joined[a]
        ]
        return jnp.stack([jnp.stack(row) for row in sums])

    return _interleaved(x, phase)


def transposed_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Doubles height and width: a convolution with a 4 x 4 kernel over x with zeros between its pixels.

    Like `upsample_conv` it is four 2 x 2 convolutions of x itself, without arithmetic on zeros.

    Args:
      x: [B, H, W, C].
      kernel: [4, 4, C, D]; tap (i, j) connects x[h, w] to the output pixel (2 h + 2 - i, 2 w + 2 - j).

    Returns:
      [B, 2 H, 2 W, D].
    """
    return _interleaved(x, lambda a, b: kernel[a::2, b::2])


def _interleaved(x: jax.Array, phase: Callable[[int, int], jax.Array]) -> jax.Array:
    """The image whose pixels (2 h + a, 2 w + b) are x convolved with the kernel phase(a, b) of 2 x 2 taps."""
    batch, height, width, _ = x.shape
    phases = [[conv(x, phase(a, b).astype(x.dtype), ((1 - a, a), (1 - b, b))) for b in range(2)] for a in range(2)]
    y = jnp.stack([jnp.stack(row, axis=3) for row in phases], axis=2)
    return y.reshape(batch, 2 * height, 2 * width, y.shape[-1])


@partial(jax.jit, static_argnames=("num_groups", "epsilon", "activation"))
def group_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    num_groups: int,
    epsilon: float = 1e-6,
    activation: Activation | None = None,
) -> jax.Array:
    """Group normalisation (Wu & He 2018), then `scale` and `bias`, and an activation.

    It sums over the pixels first and over the channels of a group second, so that the large array is read once for the
    statistics and once for a single multiply-add per element. Statistics and multiply-add are in float32. On CPUs the
    small arrays between the sums and the multiply-add are written to memory. Otherwise XLA would compute them again for
    every pixel, and the lookup of each element's group would keep it from using vector instructions. Reverse mode only,
    like `conv`.

    Args:
      x: [B, H, W, C], C divisible by num_groups.
      scale, bias: [C], or [B, C] if they depend on the example.
      num_groups: groups of neighbouring channels that share a mean and a variance.
      epsilon: added to the variance.
      activation: of each element, computed in x's dtype; None: none.

    Returns:
      [B, H, W, C] in x's dtype.
    """
    batch, height, width, channels = x.shape
    y = x.astype(jnp.float32)
    size = height * width * channels // num_groups
    grouped = (batch, num_groups, channels // num_groups)
    sums, sums_of_squares = _materialize_on_cpu((jnp.sum(y, axis=(1, 2)), jnp.sum(y * y, axis=(1, 2))))
    mean = sums.reshape(grouped).sum(-1, keepdims=True) / size
    mean_of_squares = sums_of_squares.reshape(grouped).sum(-1, keepdims=True) / size
    variance = jnp.maximum(mean_of_squares - mean**2, 0.0)
    inverse = lax.rsqrt(variance + epsilon)
    scale = jnp.broadcast_to(scale, (batch, channels)).reshape(grouped) * inverse
    bias = jnp.broadcast_to(bias, (batch, channels)).reshape(grouped) - mean * scale
    whole = (batch, 1, 1, channels)
    scale, bias = checkpoint_name(_materialize_on_cpu((scale.reshape(whole), bias.reshape(whole))), KEPT)
    return _scaled(x, scale, bias) if activation is None else _activated(x, scale, bias, activation)


def _scaled(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) * scale + bias).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _activated(x: jax.Array, scale: jax.Array, bias: jax.Array, activation: Activation) -> jax.Array:
    """activation(x * scale + bias); its gradient computes the activation again.

    Otherwise the activation's derivative, which is as large as the result, would be written to memory and read again.
    """
    return activation(_scaled(x, scale, bias))


def _activated_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, activation: Activation
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return _activated(x, scale, bias, activation), (x, scale, bias)


def _activated_backward(
    activation: Activation, kept: tuple[jax.Array, jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, scale, bias = kept
    scale, bias = _materialize_on_cpu((scale, bias))  # otherwise XLA joins this with the forward pass, and stores it
    (g,) = jax.vjp(activation, _scaled(x, scale, bias))[1](g)
    g = lax.platform_dependent(g, cpu=_materialize, default=lambda g: g).astype(jnp.float32)
    of_scale, of_bias = (jnp.sum(v, axis=(1, 2), keepdims=True) for v in (g * x.astype(jnp.float32), g))
    return (g * scale).astype(x.dtype), of_scale, of_bias


_activated.defvjp(_activated_forward, _activated_backward)


def dropout(key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
    """Zeroes each element with probability `rate`, rounded to 16 bits, and divides the others by 1 - rate.

    Two elements share one 32-bit random number, which halves the cost: elements in the picture's upper half use the
    lower 16 bits, those in the lower half the upper 16. (Sharing among neighbouring channels would create arrays of
    pairs, which a TPU pads to whole tiles of 128.)
    """
    height = x.shape[1]
    bits = jax.random.bits(key, (x.shape[0], (height + 1) // 2, *x.shape[2:]), jnp.uint32)
    bits = jnp.concatenate([bits & 0xFFFF, bits >> 16], axis=1)[:, :height]
    keep = checkpoint_name(bits >= round(rate * 2**16), KEPT)
    return jnp.where(keep, x / (1 - rate), 0)
