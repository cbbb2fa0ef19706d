"""The spatial transformer: attention from an image to itself and to a text (Rombach et al. 2022, arXiv:2112.10752)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.blocks import Dense, Dtype, GroupNorm
from ddpm_jax.models.transformer import ACTIVATIONS, Attention, layer_norm


class SpatialTransformer(nn.Module):
    """norm, projection, `depth` blocks over the pixels as tokens, projection; plus the input [B, H, W, C].

    Each block is layer norm and self-attention, layer norm and cross-attention to the context, layer norm and an MLP of
    width 4 C with GEGLU (Shazeer 2020, arXiv:2002.05202), each with a residual connection. The last projection starts
    at (almost) zero, so that the module starts as the identity.

    The projections are 1 x 1 convolutions in Stable Diffusion 1.x and linear layers in 2.x, which are equivalent.

    Attributes:
      depth: number of blocks.
      num_heads: heads of every attention; must divide C. Not with head_width.
      head_width: channels of a head, so that there are C / head_width heads; must divide C. Not with num_heads.
      num_groups: groups of the group norm.
      dtype: compute dtype of matrix products.
    """

    depth: int = 1
    num_heads: int | None = None
    head_width: int | None = None
    num_groups: int = 32
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Attends from the pixels to one another and to the context.

        Args:
          x: [B, H, W, C].
          context: [B, L, D], the states of a text's tokens.
          mask: bool [B, L], the tokens to attend to, at least one per example; None: all.

        Returns:
          [B, H, W, C].

        Raises:
          ValueError: heads that do not divide C, or neither or both of num_heads and head_width.
        """
        batch, height, width, channels = x.shape
        h = GroupNorm(self.num_groups, name="norm")(x).reshape(batch, height * width, channels)
        h = Dense(channels, dtype=self.dtype, name="project_in")(h)
        for i in range(self.depth):
            h = _Block(self._heads(channels), self.dtype, name=f"block_{i}")(h, context, mask)
        h = Dense(channels, init_scale=0.0, dtype=self.dtype, name="project_out")(h)
        return x + h.reshape(x.shape)

    def _heads(self, channels: int) -> int:
        if (self.num_heads is None) == (self.head_width is None):
            raise ValueError(
                f"num_heads is {self.num_heads} and head_width is {self.head_width}; accepted: one of the two"
            )
        if self.head_width is None:
            return self.num_heads  # type: ignore[return-value]
        if channels % self.head_width:
            raise ValueError(f"head_width {self.head_width} does not divide the {channels} channels of a level")
        return channels // self.head_width


class _Block(nn.Module):
    num_heads: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array, mask: jax.Array | None) -> jax.Array:
        def attention(name: str) -> Attention:
            return Attention(self.num_heads, bias=False, dtype=self.dtype, name=name)

        def norm(name: str) -> nn.LayerNorm:
            return layer_norm(1e-5, self.dtype, name)

        x = x + attention("attention")(norm("norm_0")(x))
        x = x + attention("cross")(norm("norm_1")(x), context, mask)
        channels = x.shape[-1]
        h = Dense(8 * channels, dtype=self.dtype, name="mlp_0")(norm("norm_2")(x))
        h, gate = jnp.split(h, 2, axis=-1)
        return x + Dense(channels, dtype=self.dtype, name="mlp_1")(h * ACTIVATIONS["gelu"](gate))
