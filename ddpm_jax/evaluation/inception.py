"""The Inception v3 that FID is defined by: the graph of 2015-12-05, as its PyTorch port has it.

It differs from the usual Inception v3 in its pooling: averages leave out the padding, the last block takes a maximum.
Images are brought to 299x299 bilinearly without anti-aliasing, as TensorFlow 1 did. Names are those of the port's file,
so that its weights find their places.
"""

from collections.abc import Mapping
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
_SPATIAL_CHANNELS = 7  # of sFID (Nash et al. 2021): the first of one layer's, on 17x17 pixels


def resize(images: jax.Array, size: int = SIZE) -> jax.Array:
    """float32 [B, size, size, C] of [B, H, W, C]: bilinear, the output's pixel i taken at i * H / size of the input,
    without half-pixel centres or anti-aliasing (TensorFlow 1's resize_bilinear)."""

    def weights(length: int) -> np.ndarray:
        position = np.arange(size, dtype=np.float32) * np.float32(length / size)
        low = np.floor(position).astype(int)
        fraction = position - low
        matrix = np.zeros((size, length), np.float32)
        np.add.at(matrix, (np.arange(size), low), 1 - fraction)
        np.add.at(matrix, (np.arange(size), np.minimum(low + 1, length - 1)), fraction)
        return matrix

    rows, columns = weights(images.shape[1]), weights(images.shape[2])
    exact = jax.lax.Precision.HIGHEST
    x = jnp.einsum("ih,bhwc->biwc", rows, images.astype(jnp.float32), precision=exact)
    return jnp.einsum("jw,biwc->bijc", columns, x, precision=exact)


class _Conv(nn.Module):
    """Convolution without bias, batch norm with fixed statistics, ReLU."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (*self.kernel, x.shape[-1], self.features))
        scale = self.param("scale", nn.initializers.ones, (self.features,))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        mean = self.param("mean", nn.initializers.zeros, (self.features,))
        variance = self.param("variance", nn.initializers.ones, (self.features,))
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            [(self.padding[0],) * 2, (self.padding[1],) * 2],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        return nn.relu((x - mean) * (scale / jnp.sqrt(variance + 1e-3)) + bias)


def _average(x: jax.Array) -> jax.Array:
    return nn.avg_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)), count_include_pad=False)


def _maximum(x: jax.Array, stride: int = 2) -> jax.Array:
    padding = ((1, 1), (1, 1)) if stride == 1 else "VALID"
    return nn.max_pool(x, (3, 3), (stride, stride), padding)


def _chain(x: jax.Array, *layers: _Conv) -> jax.Array:
    for layer in layers:
        x = layer(x)
    return x


def _join(*branches: jax.Array) -> jax.Array:
    return jnp.concatenate(branches, axis=-1)


class _A(nn.Module):
    pool_features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _join(
            _Conv(64, name="branch1x1")(x),
            _chain(x, _Conv(48, name="branch5x5_1"), _Conv(64, (5, 5), 1, (2, 2), name="branch5x5_2")),
            _chain(
                x,
                _Conv(64, name="branch3x3dbl_1"),
                _Conv(96, (3, 3), 1, (1, 1), name="branch3x3dbl_2"),
                _Conv(96, (3, 3), 1, (1, 1), name="branch3x3dbl_3"),
            ),
            _Conv(self.pool_features, name="branch_pool")(_average(x)),
        )


class _B(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _join(
            _Conv(384, (3, 3), 2, name="branch3x3")(x),
            _chain(
                x,
                _Conv(64, name="branch3x3dbl_1"),
                _Conv(96, (3, 3), 1, (1, 1), name="branch3x3dbl_2"),
                _Conv(96, (3, 3), 2, name="branch3x3dbl_3"),
            ),
            _maximum(x),
        )


class _C(nn.Module):
    """Also gives sFID's features: the first channels of branch1x1's convolution, before its norm."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        c, wide, high = self.width, ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
        first = _Conv(192, name="branch1x1")(x)
        kernel = self.variables["params"]["branch1x1"]["kernel"][0, 0, :, :_SPATIAL_CHANNELS]
        joined = _join(
            first,
            _chain(
                x,
                _Conv(c, name="branch7x7_1"),
                _Conv(c, *wide, name="branch7x7_2"),
                _Conv(192, *high, name="branch7x7_3"),
            ),
            _chain(
                x,
                _Conv(c, name="branch7x7dbl_1"),
                _Conv(c, *high, name="branch7x7dbl_2"),
                _Conv(c, *wide, name="branch7x7dbl_3"),
                _Conv(c, *high, name="branch7x7dbl_4"),
                _Conv(192, *wide, name="branch7x7dbl_5"),
            ),
            _Conv(192, name="branch_pool")(_average(x)),
        )
        return joined, jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)


class _D(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _join(
            _chain(x, _Conv(192, name="branch3x3_1"), _Conv(320, (3, 3), 2, name="branch3x3_2")),
            _chain(
                x,
                _Conv(192, name="branch7x7x3_1"),
                _Conv(192, (1, 7), 1, (0, 3), name="branch7x7x3_2"),
                _Conv(192, (7, 1), 1, (3, 0), name="branch7x7x3_3"),
                _Conv(192, (3, 3), 2, name="branch7x7x3_4"),
            ),
            _maximum(x),
        )


class _E(nn.Module):
    pool: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide, high = ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))
        y = _Conv(384, name="branch3x3_1")(x)
        z = _chain(x, _Conv(448, name="branch3x3dbl_1"), _Conv(384, (3, 3), 1, (1, 1), name="branch3x3dbl_2"))
        return _join(
            _Conv(320, name="branch1x1")(x),
            _Conv(384, *wide, name="branch3x3_2a")(y),
            _Conv(384, *high, name="branch3x3_2b")(y),
            _Conv(384, *wide, name="branch3x3dbl_3a")(z),
            _Conv(384, *high, name="branch3x3dbl_3b")(z),
            _Conv(192, name="branch_pool")(_average(x) if self.pool == "average" else _maximum(x, 1)),
        )


class InceptionV3(nn.Module):
    """The network, from 8-bit images of any size to all that metrics use."""

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Features of images.

        Args:
          images: uint8 [B, H, W, 3], or float from 0 to 255.

        Returns:
          "pool" [B, 2048], the last average pooling; "logits" [B, 1008], without the bias, as the Inception Score takes
          them; "spatial" [B, 2023], of sFID.
        """
        x = (resize(images) - 128.0) / 128.0
        x = _Conv(32, (3, 3), 2, name="Conv2d_1a_3x3")(x)
        x = _Conv(32, (3, 3), name="Conv2d_2a_3x3")(x)
        x = _Conv(64, (3, 3), 1, (1, 1), name="Conv2d_2b_3x3")(x)
        x = _maximum(x)
        x = _Conv(80, name="Conv2d_3b_1x1")(x)
        x = _Conv(192, (3, 3), name="Conv2d_4a_3x3")(x)
        x = _maximum(x)
        for name, width in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = _A(width, name=name)(x)
        x = _B(name="Mixed_6a")(x)
        spatial = x
        for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x, first = _C(width, name=name)(x)
            spatial = first if name == "Mixed_6d" else spatial
        x = _D(name="Mixed_7a")(x)
        x = _E("average", name="Mixed_7b")(x)
        x = _E("maximum", name="Mixed_7c")(x)
        pool = x.mean((1, 2))
        logits = nn.Dense(NUM_LOGITS, precision=jax.lax.Precision.HIGHEST, name="fc")(pool)
        logits -= self.variables["params"]["fc"]["bias"]
        return {"pool": pool, "logits": logits, "spatial": spatial.reshape(len(x), -1)}


def params_of(path: str | Path, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The parameters from the tensors of the PyTorch port's file.

    Raises:
      UserError: a tensor that is missing, too many, or of another shape.
    """
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.uint8)
    shapes = flatten_dict(jax.eval_shape(InceptionV3().init, jax.random.key(0), image)["params"])
    wanted, places = {}, {}
    for place, leaf in shapes.items():
        *module, kind = place
        name = ".".join([*module, kind if kind == "bias" and module == ["fc"] else _KINDS[kind]])
        name = name.replace("fc.conv.", "fc.")
        shape = leaf.shape
        wanted[name] = {4: lambda s: (s[3], s[2], s[0], s[1]), 2: lambda s: s[::-1]}.get(len(shape), lambda s: s)(shape)
        places[name] = place
    counted = {name: value for name, value in tensors.items() if not name.endswith(".num_batches_tracked")}
    tensors_lib.check(path, counted, wanted)
    found = {}
    for name, place in places.items():
        value = counted[name]
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T if value.ndim == 2 else value
        found[place] = np.ascontiguousarray(value)
    return unflatten_dict(found)


_KINDS = {
    "kernel": "conv.weight",
    "scale": "bn.weight",
    "bias": "bn.bias",
    "mean": "bn.running_mean",
    "variance": "bn.running_var",
}
