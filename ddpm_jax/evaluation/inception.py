"""The Inception v3 that defines FID: the graph of 2015-12-05, as in its PyTorch port.

It differs from the usual Inception v3 in its pooling: averages exclude the padding, and the last block uses a maximum.
Images are resized to 299x299 bilinearly without anti-aliasing, as TensorFlow 1 did.

The computation is arranged for speed: batch norms, whose statistics are fixed, are folded into the convolutions when
the weights are read; the 1x1 convolutions that share an input are one matrix product; pooling is done by sums and
maxima of shifted maps. `benchmarks/evaluation.py` measures the effect.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ddpm_jax.interop import tensors as tensors_lib

SIZE = 299
NUM_FEATURES, NUM_LOGITS = 2048, 1008
_SPATIAL_CHANNELS = 7  # for sFID (Nash et al. 2021): the first channels of one layer, on 17x17 pixels
_SPATIAL_LAYER = ("Mixed_6d", "branch1x1")
_EPSILON = 1e-3  # of the batch norms
_EXACT = jax.lax.Precision.HIGHEST  # float32 products, even if the hardware's default is less precise


def resize(images: jax.Array, size: int = SIZE) -> jax.Array:
    """Resizes [B, H, W, C] to float32 [B, size, size, C] bilinearly: output pixel i is sampled at i * H / size, without
    half-pixel centres or anti-aliasing (TensorFlow 1's resize_bilinear)."""

    def weights(length: int) -> np.ndarray:
        position = np.arange(size, dtype=np.float32) * np.float32(length / size)
        low = np.floor(position).astype(int)
        fraction = position - low
        matrix = np.zeros((size, length), np.float32)
        np.add.at(matrix, (np.arange(size), low), 1 - fraction)
        np.add.at(matrix, (np.arange(size), np.minimum(low + 1, length - 1)), fraction)
        return matrix

    rows, columns = weights(images.shape[1]), weights(images.shape[2])
    x = jnp.einsum("ih,bhwc->biwc", rows, images.astype(jnp.float32), precision=_EXACT)
    return jnp.einsum("jw,biwc->bijc", columns, x, precision=_EXACT)


class _Weights(nn.Module):
    """Kernel [*size, C, features] and bias [features] of a convolution with its batch norm."""

    features: int
    size: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, channels: int) -> tuple[jax.Array, jax.Array]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (*self.size, channels, self.features))
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,))


def _conv(
    x: jax.Array,
    name: str,
    features: int,
    size: tuple[int, int] = (3, 3),
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
) -> jax.Array:
    """Convolution and ReLU."""
    kernel, bias = _Weights(features, size, name=name)(x.shape[-1])
    pads = [(padding[0],) * 2, (padding[1],) * 2]
    numbers = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, pads, dimension_numbers=numbers, precision=_EXACT)
    return nn.relu(x + bias)


def _heads(
    x: jax.Array, features: Mapping[str, int], pool: Callable[[jax.Array], jax.Array] | None = None
) -> list[jax.Array]:
    """Several 1x1 convolutions of one input, with ReLU: one matrix product, split into its parts.

    Args:
      x: [B, H, W, C].
      features: number of features, by name.
      pool: applied to the last one before its ReLU. There an average gives the same result as before the convolution,
        with fewer channels to pool.
    """
    kernels, biases = zip(*(_Weights(n, name=name)(x.shape[-1]) for name, n in features.items()), strict=True)
    product = jnp.matmul(x, jnp.concatenate(kernels, axis=-1)[0, 0], precision=_EXACT) + jnp.concatenate(biases)
    parts = jnp.split(product, np.cumsum(list(features.values()))[:-1], axis=-1)
    if pool:
        parts[-1] = pool(parts[-1])
    return [nn.relu(part) for part in parts]


def _shifts(x: jax.Array, axis: int, stride: int = 1) -> list[jax.Array]:
    """The three values under a window of size 3, at each of its positions."""
    last = x.shape[axis] - 3
    return [jax.lax.slice_in_dim(x, i, i + last + 1, stride, axis) for i in range(3)]


def _maximum(x: jax.Array, stride: int = 2) -> jax.Array:
    if stride == 1:
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    for axis in (1, 2):
        a, b, c = _shifts(x, axis, stride)
        x = jnp.maximum(jnp.maximum(a, b), c)
    return x


def _average(x: jax.Array) -> jax.Array:
    """The average over 3x3 pixels with stride 1, excluding padding at the border."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for axis in (1, 2):
        x = sum(_shifts(x, axis)[1:], _shifts(x, axis)[0])
    counts = [np.convolve(np.ones(n), np.ones(3), "same") for n in x.shape[1:3]]
    return x * jnp.asarray(1 / np.outer(*counts), x.dtype)[:, :, None]


def _join(*branches: jax.Array) -> jax.Array:
    return jnp.concatenate(branches, axis=-1)


class _A(nn.Module):
    pool_features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        heads = {"branch1x1": 64, "branch5x5_1": 48, "branch3x3dbl_1": 64, "branch_pool": self.pool_features}
        a, b, c, d = _heads(x, heads, _average)
        b = _conv(b, "branch5x5_2", 64, (5, 5), 1, (2, 2))
        c = _conv(c, "branch3x3dbl_2", 96, padding=(1, 1))
        c = _conv(c, "branch3x3dbl_3", 96, padding=(1, 1))
        return _join(a, b, c, d)


class _B(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        a = _conv(x, "branch3x3", 384, stride=2)
        (b,) = _heads(x, {"branch3x3dbl_1": 64})
        b = _conv(b, "branch3x3dbl_2", 96, padding=(1, 1))
        b = _conv(b, "branch3x3dbl_3", 96, stride=2)
        return _join(a, b, _maximum(x))


class _C(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n, wide, high = self.width, ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
        heads = {"branch1x1": 192, "branch7x7_1": n, "branch7x7dbl_1": n, "branch_pool": 192}
        a, b, c, d = _heads(x, heads, _average)
        b = _conv(b, "branch7x7_2", n, *wide)
        b = _conv(b, "branch7x7_3", 192, *high)
        c = _conv(c, "branch7x7dbl_2", n, *high)
        c = _conv(c, "branch7x7dbl_3", n, *wide)
        c = _conv(c, "branch7x7dbl_4", n, *high)
        c = _conv(c, "branch7x7dbl_5", 192, *wide)
        return _join(a, b, c, d)


class _D(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        a, b = _heads(x, {"branch3x3_1": 192, "branch7x7x3_1": 192})
        a = _conv(a, "branch3x3_2", 320, stride=2)
        b = _conv(b, "branch7x7x3_2", 192, (1, 7), 1, (0, 3))
        b = _conv(b, "branch7x7x3_3", 192, (7, 1), 1, (3, 0))
        b = _conv(b, "branch7x7x3_4", 192, stride=2)
        return _join(a, b, _maximum(x))


class _E(nn.Module):
    pool: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide, high = ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))
        heads = {"branch1x1": 320, "branch3x3_1": 384, "branch3x3dbl_1": 448}
        if self.pool == "average":
            a, b, c, d = _heads(x, heads | {"branch_pool": 192}, _average)
        else:
            a, b, c = _heads(x, heads)
            (d,) = _heads(_maximum(x, 1), {"branch_pool": 192})
        c = _conv(c, "branch3x3dbl_2", 384, padding=(1, 1))
        return _join(
            a,
            _conv(b, "branch3x3_2a", 384, *wide),
            _conv(b, "branch3x3_2b", 384, *high),
            _conv(c, "branch3x3dbl_3a", 384, *wide),
            _conv(c, "branch3x3dbl_3b", 384, *high),
            d,
        )


class InceptionV3(nn.Module):
    """The network, from 8-bit images of any size to everything that the metrics use."""

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Features of images.

        Args:
          images: uint8 [B, H, W, 3], or float from 0 to 255.

        Returns:
          "pool" [B, 2048], the last average pooling; "logits" [B, 1008], without the bias, as the Inception Score uses
          them; "spatial" [B, 2023], for sFID: the first channels of one convolution, without its batch norm.
        """
        x = (resize(images) - 128.0) / 128.0
        x = _conv(x, "Conv2d_1a_3x3", 32, stride=2)
        x = _conv(x, "Conv2d_2a_3x3", 32)
        x = _maximum(_conv(x, "Conv2d_2b_3x3", 64, padding=(1, 1)))
        (x,) = _heads(x, {"Conv2d_3b_1x1": 80})
        x = _maximum(_conv(x, "Conv2d_4a_3x3", 192))
        for name, width in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = _A(width, name=name)(x)
        x = _B(name="Mixed_6a")(x)
        spatial = x
        for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            if name == _SPATIAL_LAYER[0]:
                kernel = self.param("spatial", nn.initializers.lecun_normal(), (x.shape[-1], _SPATIAL_CHANNELS))
                spatial = jnp.matmul(x, kernel, precision=_EXACT)
            x = _C(width, name=name)(x)
        x = _D(name="Mixed_7a")(x)
        x = _E("average", name="Mixed_7b")(x)
        x = _E("maximum", name="Mixed_7c")(x)
        pool = x.mean((1, 2))
        logits = nn.Dense(NUM_LOGITS, use_bias=False, precision=_EXACT, name="fc")(pool)
        return {"pool": pool, "logits": logits, "spatial": spatial.reshape(len(x), -1)}


def params_of(path: str | Path, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Converts the tensors of the PyTorch port's file to parameters, folding batch norms into convolutions in float64.

    Raises:
      UserError: a tensor that is missing, unexpected, or of a different shape.
    """
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.uint8)
    shapes = flatten_dict(jax.eval_shape(InceptionV3().init, jax.random.key(0), image)["params"])
    layers = [place[:-1] for place in shapes if place[-1] == "kernel" and place != ("fc", "kernel")]
    wanted: dict[str, tuple[int, ...]] = {"fc.weight": (NUM_LOGITS, NUM_FEATURES), "fc.bias": (NUM_LOGITS,)}
    for layer in layers:
        height, width, channels, features = shapes[(*layer, "kernel")].shape
        wanted[".".join((*layer, "conv.weight"))] = (features, channels, height, width)
        wanted |= {".".join((*layer, "bn", kind)): (features,) for kind in _NORM}
    counted = {name: value for name, value in tensors.items() if not name.endswith(".num_batches_tracked")}
    tensors_lib.check(path, counted, wanted)

    found: dict[tuple[str, ...], np.ndarray] = {("fc", "kernel"): np.ascontiguousarray(counted["fc.weight"].T)}
    for layer in layers:
        kernel = counted[".".join((*layer, "conv.weight"))].transpose(2, 3, 1, 0)
        scale, bias, mean, variance = (counted[".".join((*layer, "bn", kind))].astype(np.float64) for kind in _NORM)
        scale = scale / np.sqrt(variance + _EPSILON)
        found[(*layer, "kernel")] = np.ascontiguousarray(kernel * scale, np.float32)
        found[(*layer, "bias")] = (bias - mean * scale).astype(np.float32)
        if layer == _SPATIAL_LAYER:
            found[("spatial",)] = np.ascontiguousarray(kernel[0, 0, :, :_SPATIAL_CHANNELS])
    return unflatten_dict(found)


_NORM = ("weight", "bias", "running_mean", "running_var")
