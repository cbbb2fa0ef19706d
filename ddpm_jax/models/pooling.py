"""Attention pooling: one vector for all tokens of a text (DeepFloyd IF's, modelled on CLIP's; Radford et al. 2021)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.attention import attend
from ddpm_jax.models.blocks import Dense, Dtype
from ddpm_jax.models.transformer import layer_norm


class TokenPooling(nn.Module):
    """layer norm; attention from the tokens' mean plus a learned vector; projection; layer norm.

    The mean attends to itself and to the tokens.

    Attributes:
      features: width of the vector.
      num_heads: heads of the attention; must divide the tokens' width.
      dtype: compute dtype of matrix products.
    """

    features: int
    num_heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Pools the tokens.

        Args:
          tokens: [B, L, D].
          mask: bool [B, L], the tokens to pool, at least one per example; None: all.

        Returns:
          [B, features].

        Raises:
          ValueError: num_heads does not divide D.
        """
        batch, _, width = tokens.shape
        if width % self.num_heads:
            raise ValueError(f"pooling_heads {self.num_heads} does not divide the tokens' width {width}")
        tokens = layer_norm(1e-5, self.dtype, "norm_0")(tokens)
        where = None if mask is None else mask[..., None]
        mean = tokens.mean(axis=1, keepdims=True, where=where)
        mean += self.param("place", nn.initializers.normal(width**-0.5), (1, width)).astype(mean.dtype)
        sources = jnp.concatenate([mean, tokens], axis=1)
        if mask is not None:
            mask = jnp.concatenate([jnp.ones((batch, 1), bool), mask], axis=1)

        def project(name: str, source: jax.Array) -> jax.Array:
            projected = Dense(width, dtype=self.dtype, name=name)(source)
            return projected.reshape(batch, -1, self.num_heads, width // self.num_heads)

        pooled = attend(project("query", mean), project("key", sources), project("value", sources), mask)
        pooled = Dense(self.features, dtype=self.dtype, name="project")(pooled.reshape(batch, width))
        normed: jax.Array = layer_norm(1e-5, self.dtype, "norm_1")(pooled)
        return normed
