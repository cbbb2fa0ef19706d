"""The Transformer that the encoders share (Vaswani et al. 2017, arXiv:1706.03762), with pre-normalisation.

Parameters are float32. `dtype` is the compute dtype of matrix products; the statistics of norms and the softmax stay
in float32. A mask is boolean and selects the tokens to attend to, at least one per row.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.attention import attend
from ddpm_jax.models.blocks import Dense, Dtype, kernel_init

Layer = Callable[[jax.Array], jax.Array]

ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": lambda x: nn.gelu(x, approximate=True),  # T5 v1.1's
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # the original CLIP's
    "relu": nn.relu,
}


class TextStates(NamedTuple):
    """An encoder's output for texts.

    Attributes:
      tokens: float32 [B, L, D], a state for each token. The states of padding are meaningless and must be masked.
      pooled: float32 [B, D], the state of the whole text.
      projected: float32 [B, P], `pooled` in the space that CLIP shares with images; None without a projection.
    """

    tokens: jax.Array
    pooled: jax.Array
    projected: jax.Array | None = None


def mean_state(tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The mean [B, D] of the states [B, L, D] of a text's tokens, those selected by the mask, bool [B, L]."""
    if mask is None:
        return tokens.mean(axis=1)
    return jnp.einsum("bl,bld->bd", mask / jnp.sum(mask, axis=-1, keepdims=True), tokens)


def layer_norm(epsilon: float, dtype: Dtype, name: str) -> nn.LayerNorm:
    """Layer normalisation over the last axis (Ba et al. 2016), with a learned scale and bias; its output is in `dtype`.

    The variance is the mean of squared deviations: Flax's faster formula, a difference of means, loses precision on the
    few large channels that trained encoders have.
    """
    return nn.LayerNorm(epsilon, dtype=dtype, use_fast_variance=False, name=name)


def rms_norm(epsilon: float, dtype: Dtype, name: str) -> nn.RMSNorm:
    """Root mean square normalisation over the last axis (Zhang & Sennrich 2019), with a learned scale; its output is in
    `dtype`."""
    return nn.RMSNorm(epsilon, dtype=dtype, name=name)


NORMS = {"layer": layer_norm, "rms": rms_norm}


def dense(features: int, bias: bool, dtype: Dtype, name: str, init_scale: float = 1.0) -> Layer:
    """A linear layer, with or without a bias."""
    if bias:
        return Dense(features, init_scale, dtype, name=name)
    return nn.Dense(features, use_bias=False, kernel_init=kernel_init(init_scale), dtype=dtype, name=name)


class Attention(nn.Module):
    """Multi-head attention, softmax(q k^T / sqrt(width of a head)) v, and a projection that starts at (almost) zero.

    Attributes:
      num_heads: number of heads.
      causal: whether a token attends only to itself and the tokens before it.
      bias: whether query, key and value have a bias.
      dtype: compute dtype of matrix products.
      head_width: width of each head; None: the input's width divided by num_heads.
      scale: the factor of q k^T; None: 1 / sqrt(width of a head).
      out_bias: whether the projection has a bias.
    """

    num_heads: int
    causal: bool = False
    bias: bool = True
    dtype: Dtype = jnp.float32
    head_width: int | None = None
    scale: float | None = None
    out_bias: bool = True

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        mask: jax.Array | None = None,
        logit_bias: jax.Array | None = None,
    ) -> jax.Array:
        """Attends from x to the context.

        Args:
          x: [B, L, C].
          context: [B, M, D]; None: x itself.
          mask: bool [B, M], the tokens of the context to attend to; None: all.
          logit_bias: [num_heads, L, M], added to the logits.

        Returns:
          [B, L, C].

        Raises:
          ValueError: num_heads does not divide C, and there is no head_width.
        """
        heads, width = self.num_heads, x.shape[-1]
        if self.head_width is None and width % heads:
            raise ValueError(f"num_heads {heads} does not divide the width {width}")
        head_width = self.head_width or width // heads

        def project(name: str, source: jax.Array) -> jax.Array:
            projected = dense(heads * head_width, self.bias, self.dtype, name)(source)
            return projected.reshape(*source.shape[:2], heads, head_width)

        context = x if context is None else context
        query, key, value = project("query", x), project("key", context), project("value", context)
        attended = attend(query, key, value, mask, self.causal, logit_bias, self.scale)
        attended = attended.reshape(*x.shape[:2], heads * head_width)
        return dense(width, self.out_bias, self.dtype, "out", init_scale=0.0)(attended)


class Transformer(nn.Module):
    """Blocks of norm, self-attention, residual, norm, MLP, residual.

    There is no norm after the last block; the modules that use it have their own.

    Attributes:
      num_layers: number of blocks.
      num_heads: heads of every attention.
      mlp_width: width of the MLP's hidden layer.
      causal: whether a token attends only to itself and the tokens before it.
      activation: of the MLP: "gelu" (exact), "gelu_new" (approximated by tanh), "quick_gelu" (x * sigmoid(1.702 x)) or
        "relu".
      epsilon: of every norm.
      dtype: compute dtype of matrix products.
      norm: "layer" or "rms".
      bias: whether the linear layers have a bias.
      gated: whether the MLP's hidden layer is multiplied by a second linear layer of the same width (Shazeer 2020,
        arXiv:2002.05202).
      head_width, scale: as in `Attention`.
    """

    num_layers: int
    num_heads: int
    mlp_width: int
    causal: bool = False
    activation: str = "gelu"
    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32
    norm: str = "layer"
    bias: bool = True
    gated: bool = False
    head_width: int | None = None
    scale: float | None = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None, logit_bias: jax.Array | None = None) -> jax.Array:
        """Transforms the tokens.

        Args:
          x: [B, L, C].
          mask: bool [B, L], the tokens to attend to; None: all. The outputs at the others are meaningless.
          logit_bias: [num_heads, L, L], added to the logits of every attention.

        Returns:
          [B, L, C] in `dtype`.

        Raises:
          ValueError: num_heads does not divide C and there is no head_width, or an unknown activation or norm.
        """
        for name, value, known in (("activation", self.activation, ACTIVATIONS), ("norm", self.norm, NORMS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; accepted: {', '.join(known)}")
        x = x.astype(self.dtype)
        for i in range(self.num_layers):
            block = TransformerBlock(
                self.num_heads,
                self.mlp_width,
                self.causal,
                self.activation,
                self.epsilon,
                self.dtype,
                self.norm,
                self.bias,
                self.gated,
                self.head_width,
                self.scale,
                name=f"block_{i}",
            )
            x = block(x, mask, logit_bias)
        return x


class TransformerBlock(nn.Module):
    """One block of a `Transformer`, with its attributes."""

    num_heads: int
    mlp_width: int
    causal: bool
    activation: str
    epsilon: float
    dtype: Dtype
    norm: str
    bias: bool
    gated: bool
    head_width: int | None
    scale: float | None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, logit_bias: jax.Array | None) -> jax.Array:
        norm, bias = NORMS[self.norm], self.bias
        attention = Attention(
            self.num_heads,
            self.causal,
            bias,
            self.dtype,
            self.head_width,
            self.scale,
            out_bias=bias,
            name="attention",
        )
        h = norm(self.epsilon, self.dtype, "norm_0")(x)
        x = x + attention(h, mask=mask, logit_bias=logit_bias)
        normed = norm(self.epsilon, self.dtype, "norm_1")(x)
        h = ACTIVATIONS[self.activation](dense(self.mlp_width, bias, self.dtype, "mlp_0")(normed))
        if self.gated:
            h *= dense(self.mlp_width, bias, self.dtype, "mlp_linear")(normed)
        return x + dense(x.shape[-1], bias, self.dtype, "mlp_1", init_scale=0.0)(h)
