"""The parts of the UNet as linen modules: initialisation, embeddings, residual and attention blocks, resampling.

Conventions are the original's (Ho et al. 2020): NHWC, swish, GroupNorm before each convolution, every kernel drawn from
a uniform distribution of variance 2 / (fan_in + fan_out), and the last layer of every residual branch starting at
(almost) zero so that the network starts as the identity along its skip connections.

Parameters are float32. `dtype` is the compute dtype of convolutions and matrix products; the statistics of norms,
softmax and the time embedding stay in float32.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ddpm_jax.models import layers
from ddpm_jax.models.attention import attend

Dtype = Any

CROSS_ATTENTION = ("separate", "joint", "alone")
ACTIVATIONS: dict[str, layers.Activation] = {
    "swish": nn.swish,
    "gelu": partial(nn.gelu, approximate=False),
    "mish": jax.nn.mish,
    "relu": nn.relu,
}


def kernel_init(scale: float = 1.0) -> nn.initializers.Initializer:
    """The original's variance scaling: fan_avg, uniform; a scale of 0 is replaced by 1e-10."""
    return nn.initializers.variance_scaling(max(scale, 1e-10), "fan_avg", "uniform")


def timestep_embedding(
    t: jax.Array,
    dim: int,
    max_period: float = 10_000.0,
    *,
    frequency_shift: float = 1.0,
    cosines_first: bool = False,
) -> jax.Array:
    """Sinusoids of the timestep (Vaswani et al. 2017).

    The defaults are the original's layout: sines first, and frequencies that end at 1 / max_period. Stable Diffusion
    uses a frequency_shift of 0 and cosines first.

    Args:
      t: [B], integer or float.
      dim: width of the embedding; if it is odd, the last entry is zero.
      max_period: period of the slowest sinusoid, divided by 2 pi, if frequency_shift is 1.
      frequency_shift: 0 to 1.
      cosines_first: whether the cosines come before the sines.

    Returns:
      float32 [B, dim] with frequencies max_period ** (-i / (dim // 2 - frequency_shift)).
    """
    half = dim // 2
    exponents = -jnp.log(max_period) * jnp.arange(half, dtype=jnp.float32) / max(half - frequency_shift, 1)
    angles = t.astype(jnp.float32)[:, None] * jnp.exp(exponents)
    parts = (jnp.cos(angles), jnp.sin(angles)) if cosines_first else (jnp.sin(angles), jnp.cos(angles))
    embedding = jnp.concatenate(parts, axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


class Dense(nn.Module):
    """A linear layer over the last axis; on images, a 1 x 1 convolution."""

    features: int
    init_scale: float = 1.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", kernel_init(self.init_scale), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = (v.astype(self.dtype) for v in (x, kernel, bias))
        y: jax.Array = checkpoint_name(layers.dense(x, kernel) + bias, layers.KEPT)
        return y


class Conv(nn.Module):
    """A 3 x 3 convolution with stride 1 that keeps the size."""

    features: int
    init_scale: float = 1.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", kernel_init(self.init_scale), (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = (v.astype(self.dtype) for v in (x, kernel, bias))
        y: jax.Array = checkpoint_name(layers.conv(x, kernel, ((1, 1), (1, 1))) + bias, layers.KEPT)
        return y


class GroupNorm(nn.Module):
    """Group normalisation with a learned scale and bias, optionally modulated per example; then the activation.

    With `scale_shift` [B, 2 C] the result is norm(x) * (1 + scale) + shift (Dhariwal & Nichol 2021, AdaGN).
    """

    num_groups: int = 32
    epsilon: float = 1e-6
    activation: layers.Activation | None = None

    @nn.compact
    def __call__(self, x: jax.Array, scale_shift: jax.Array | None = None) -> jax.Array:
        channels = x.shape[-1]
        if channels % self.num_groups:
            raise ValueError(
                f"{channels} channels cannot be normalised in {self.num_groups} groups: "
                "num_groups must divide the channels of every level and of its skip connections"
            )
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        if scale_shift is not None:
            factor, shift = jnp.split(scale_shift.astype(jnp.float32), 2, axis=-1)
            scale, bias = scale * (1 + factor), bias * (1 + factor) + shift
        normed: jax.Array = layers.group_norm(x, scale, bias, self.num_groups, self.epsilon, self.activation)
        return normed


class ResBlock(nn.Module):
    """norm, activation, conv; add the time embedding; norm, activation, dropout, conv; plus the input.

    Takes the input [B, H, W, C], the embedding [B, E] after its activation (None: nothing is added), and the skip
    connection [B, H, W, D], which is concatenated to the input's channels; returns [B, H, W, features]. With `resample`
    "down" (the mean of 2 x 2 pixels) or "up" (nearest neighbours) both branches change the size before the first
    convolution (as in BigGAN). The sum of both branches is divided by `residual_scale`.
    """

    features: int
    dropout: float = 0.0
    scale_shift: bool = False
    activation: str = "swish"
    resample: str = "none"
    residual_scale: float = 1.0
    num_groups: int = 32
    epsilon: float = 1e-6
    train: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array | None = None, skip: jax.Array | None = None) -> jax.Array:
        if skip is not None:
            x = jnp.concatenate([x, skip], axis=-1)
        norm = partial(GroupNorm, self.num_groups, self.epsilon, ACTIVATIONS[self.activation])
        h = norm(name="norm_0")(x)
        if self.resample == "down":
            x, h = (nn.avg_pool(v, (2, 2), strides=(2, 2)) for v in (x, h))
        elif self.resample == "up":
            x, h = (v.repeat(2, axis=1).repeat(2, axis=2) for v in (x, h))
        h = Conv(self.features, dtype=self.dtype, name="conv_0")(h)
        modulation = None
        if embedding is not None:
            width = self.features * (2 if self.scale_shift else 1)
            modulation = Dense(width, dtype=self.dtype, name="embedding")(embedding)
            if not self.scale_shift:
                h, modulation = h + modulation[:, None, None, :], None
        h = norm(name="norm_1")(h, modulation)
        if self.train and self.dropout > 0:
            h = layers.dropout(self.make_rng("dropout"), h, self.dropout)
        h = Conv(self.features, init_scale=0.0, dtype=self.dtype, name="conv_1")(h)
        if x.shape[-1] != self.features:
            x = Dense(self.features, dtype=self.dtype, name="shortcut")(x)
        return x + h if self.residual_scale == 1 else (x + h) / self.residual_scale


class AttentionBlock(nn.Module):
    """norm, multi-head attention among the pixels (or p x p patches), added to the input [B, H, W, C].

    There are `num_heads` heads, or with `head_channels` as many heads of that width as fit into C. Logits are scaled by
    a head's width ** -0.5. With `patch_size` p > 1 a token is a patch's p * p * C features (as in ViT), which divides
    the cost of the attention matrix by p ** 4. With `num_groups` 0 there is no norm.

    If `context` [B, L, D] is given, as in text-conditional models, the tokens also attend to it, or to the part of it
    selected by `mask` [B, L]: with `cross_attention` "separate" in a second attention that follows; with "joint" in the
    same softmax, over the context's keys and the tokens' own (GLIDE: Nichol et al. 2021, arXiv:2112.10741); with
    "alone" instead of to one another. With `context_groups` above 0, the last two apply a group norm to the context.
    """

    num_heads: int = 1
    head_channels: int | None = None
    patch_size: int = 1
    cross_attention: str = "separate"
    context_groups: int = 0
    num_groups: int = 32
    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None, mask: jax.Array | None = None) -> jax.Array:
        _, height, width, channels = x.shape
        p = self.patch_size
        if height % p or width % p:
            raise ValueError(f"attention_patch_size {p} does not divide a {height}x{width} level that has attention")
        if self.head_channels and self.head_channels > channels:
            raise ValueError(f"head_channels {self.head_channels} is more than the {channels} channels of a level")
        if not self.head_channels and channels % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide the {channels} channels of a level")
        tokens = self._to_patches(self._normed(x, "norm"))
        if context is None or self.cross_attention == "separate":
            x = x + self._from_patches(self._attend(tokens, {"": tokens}), x.shape)
        else:
            x = x + self._from_patches(self._attend_with(tokens, context, mask), x.shape)
        if context is not None and self.cross_attention == "separate":
            tokens = self._to_patches(self._normed(x, "cross_norm"))
            x = x + self._from_patches(self._attend(tokens, {"cross_": context}, mask, prefix="cross_"), x.shape)
        return x

    def _normed(self, x: jax.Array, name: str) -> jax.Array:
        return GroupNorm(self.num_groups, self.epsilon, name=name)(x) if self.num_groups else x

    def _to_patches(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        p = self.patch_size
        x = x.reshape(batch, height // p, p, width // p, p, channels).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(batch, height * width // p**2, p * p * channels)

    def _from_patches(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        batch, height, width, channels = shape
        p = self.patch_size
        x = x.reshape(batch, height // p, width // p, p, p, channels).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(shape)

    def _attend_with(self, tokens: jax.Array, context: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Attention to the context and, unless cross_attention is "alone", to the tokens in the same softmax."""
        if self.context_groups:
            # The statistics are over the tokens as well, padding included, as in DeepFloyd IF.
            norm = GroupNorm(self.context_groups, 1e-5, name="context_norm")
            context = norm(context[:, None])[:, 0]
        if self.cross_attention == "alone":
            return self._attend(tokens, {"cross_": context}, mask)
        if mask is not None:
            mask = jnp.concatenate([mask, jnp.ones(tokens.shape[:2], bool)], axis=1)
        return self._attend(tokens, {"cross_": context, "": tokens}, mask)

    def _attend(
        self, tokens: jax.Array, sources: dict[str, jax.Array], mask: jax.Array | None = None, prefix: str = ""
    ) -> jax.Array:
        """Attention from the tokens to all sources, a dict from the prefix of the projections' names."""
        width = tokens.shape[-1] // self.patch_size**2
        num_heads = width // self.head_channels if self.head_channels else self.num_heads
        heads = (num_heads, self.head_channels or width // num_heads)
        inner = math.prod(heads)

        def project(name: str, source: jax.Array) -> jax.Array:
            projected = Dense(inner, dtype=self.dtype, name=name)(source)
            return projected.reshape(*source.shape[:2], *heads)

        def joined(name: str) -> jax.Array:
            parts = [project(of + name, source) for of, source in sources.items()]
            return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)

        attended = attend(project(prefix + "query", tokens), joined("key"), joined("value"), mask)
        attended = attended.reshape(*tokens.shape[:2], inner)
        return Dense(tokens.shape[-1], init_scale=0.0, dtype=self.dtype, name=prefix + "out")(attended)


class Downsample(nn.Module):
    """Halves height and width: a strided 3 x 3 convolution (the original's), or pooling over 2 x 2.

    The convolution pads at the right and bottom only, as TensorFlow's SAME does; with `symmetric`, by one pixel on
    every side, as PyTorch does.
    """

    method: str = "conv"
    symmetric: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.method in ("avg_pool", "max_pool"):
            pool: Callable[..., jax.Array] = nn.avg_pool if self.method == "avg_pool" else nn.max_pool
            return pool(x, (2, 2), strides=(2, 2))
        padding = 1 if self.symmetric else "SAME"
        return nn.Conv(x.shape[-1], (3, 3), 2, padding, kernel_init=kernel_init(), dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbours, then a 3 x 3 convolution (the original's), or a transposed 4 x 4
    convolution of stride 2 (the article's).

    With nearest neighbours, `size` may be one less along a side, if the corresponding halving rounded up.
    """

    method: str = "nearest"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, size: tuple[int, ...] | None = None) -> jax.Array:
        channels = x.shape[-1]
        taps = 4 if self.method == "transposed" else 3
        kernel = self.param("kernel", kernel_init(), (taps, taps, channels, channels))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        doubled = (2 * x.shape[1], 2 * x.shape[2])
        if size is not None and tuple(size) != doubled:
            x, kernel, bias = (v.astype(self.dtype) for v in (x, kernel, bias))
            x = x.repeat(2, axis=1).repeat(2, axis=2)[:, : size[0], : size[1]]
            return layers.conv(x, kernel, ((1, 1), (1, 1))) + bias
        conv = layers.upsample_conv if self.method == "nearest" else layers.transposed_conv
        return conv(x.astype(self.dtype), kernel) + bias.astype(self.dtype)
