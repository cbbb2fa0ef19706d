"""The Transformer that the encoders of text share (Vaswani et al. 2017, arXiv:1706.03762), norms before each part.

Parameters are float32. `dtype` is what matrix products compute in; the statistics of norms and the softmax stay in
float32. A mask is boolean and names the tokens that may be attended to; a row of it needs at least one.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.attention import attend
from ddpm_jax.models.blocks import Dense, Dtype, kernel_init

ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # of the original CLIP
}


def layer_norm(epsilon: float, dtype: Dtype, name: str) -> nn.LayerNorm:
    """Layer normalisation over the last axis (Ba et al. 2016), with a learned scale and bias; its output is in `dtype`.

    The variance is the mean of squared deviations: Flax's faster difference of means loses digits on the few large
    channels that trained encoders have.
    """
    return nn.LayerNorm(epsilon, dtype=dtype, use_fast_variance=False, name=name)


class Attention(nn.Module):
    """Multi-head attention, softmax(q k^T / sqrt(width of a head)) v, and a projection that starts at (almost) zero.

    Attributes:
      num_heads: must divide the width of the input.
      causal: a token attends to itself and to those before it.
      bias: whether query, key and value have one; the output always does.
      dtype: what matrix products compute in.
    """

    num_heads: int
    causal: bool = False
    bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None, mask: jax.Array | None = None) -> jax.Array:
        """Attends from x to the context.

        Args:
          x: [B, L, C].
          context: [B, M, D]; None: x itself.
          mask: bool [B, M], the tokens of the context that are attended to; None: all.

        Returns:
          [B, L, C].

        Raises:
          ValueError: num_heads does not divide C.
        """
        width = x.shape[-1]
        if width % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide the width {width}")

        def project(name: str, source: jax.Array) -> jax.Array:
            if self.bias:
                projected = Dense(width, dtype=self.dtype, name=name)(source)
            else:
                options = {"use_bias": False, "kernel_init": kernel_init(), "dtype": self.dtype}
                projected = nn.Dense(width, name=name, **options)(source)
            return projected.reshape(*source.shape[:2], self.num_heads, width // self.num_heads)

        context = x if context is None else context
        query, key, value = project("query", x), project("key", context), project("value", context)
        attended = attend(query, key, value, mask, self.causal)
        return Dense(width, init_scale=0.0, dtype=self.dtype, name="out")(attended.reshape(x.shape))


class Transformer(nn.Module):
    """Blocks of norm, self-attention, residual, norm, MLP, residual.

    There is no norm behind the last block; the modules that use it have their own.

    Attributes:
      num_layers: blocks.
      num_heads: heads of every attention; must divide the width of the input.
      mlp_width: width of the MLP's hidden layer.
      causal: a token sees itself and those before it.
      activation: of the MLP, "gelu" (exact) or "quick_gelu", x * sigmoid(1.702 x).
      epsilon: of every layer norm.
      dtype: what matrix products compute in.
    """

    num_layers: int
    num_heads: int
    mlp_width: int
    causal: bool = False
    activation: str = "gelu"
    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Transforms the tokens.

        Args:
          x: [B, L, C].
          mask: bool [B, L], the tokens that others attend to; None: all. What comes out at the others is of no use.

        Returns:
          [B, L, C] in `dtype`.

        Raises:
          ValueError: num_heads does not divide C, or an activation that there is not.
        """
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}; accepted: {', '.join(ACTIVATIONS)}")
        x = x.astype(self.dtype)
        for i in range(self.num_layers):
            block = TransformerBlock(
                self.num_heads,
                self.mlp_width,
                self.causal,
                self.activation,
                self.epsilon,
                self.dtype,
                name=f"block_{i}",
            )
            x = block(x, mask)
        return x


class TransformerBlock(nn.Module):
    """One block of a `Transformer`, with its attributes."""

    num_heads: int
    mlp_width: int
    causal: bool
    activation: str
    epsilon: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        h = layer_norm(self.epsilon, self.dtype, "norm_0")(x)
        x = x + Attention(self.num_heads, self.causal, dtype=self.dtype, name="attention")(h, mask=mask)
        h = layer_norm(self.epsilon, self.dtype, "norm_1")(x)
        h = ACTIVATIONS[self.activation](Dense(self.mlp_width, dtype=self.dtype, name="mlp_0")(h))
        return x + Dense(x.shape[-1], init_scale=0.0, dtype=self.dtype, name="mlp_1")(h)
