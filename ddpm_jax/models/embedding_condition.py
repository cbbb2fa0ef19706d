"""The condition of DALL-E 2's decoder: an image embedding, along with a text."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.blocks import Dense, Dtype
from ddpm_jax.models.transformer import layer_norm


class EmbeddingCondition(nn.Module):
    """An image embedding and a text as the condition of the decoder's UNet (Ramesh et al. 2022, section 2.1).

    The image embedding becomes a few tokens that precede the text's; it is also added to the timestep embedding, as the
    text's embedding is. Where it is dropped, a learned embedding replaces it.

    Attributes:
      width: width of the tokens that the UNet attends to.
      time_width: width of the UNet's time embedding, four times its base width.
      num_tokens: number of tokens that the image embedding becomes.
      dtype: compute dtype of matrix products; parameters and output are float32.
    """

    width: int
    time_width: int
    num_tokens: int = 4
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, embedding: jax.Array, cond: Mapping[str, jax.Array], dropped: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """The condition of the UNet.

        Args:
          embedding: [B, D], image embeddings with the mean and variance of CLIP's.
          cond: the text's entries, if there is a text: "tokens" [B, L, C], the states of its tokens, "vector" [B, E],
            its embedding, and optionally "tokens_mask" bool [B, L].
          dropped: bool [B], the examples whose image embedding is dropped; None: none.

        Returns:
          "tokens" [B, num_tokens + L, width], "vector" [B, time_width], to be added to the time embedding as it is, and
          "tokens_mask" if cond has one.
        """
        dense = {"dtype": self.dtype}
        null = self.param("null", nn.initializers.normal(0.02), embedding.shape[-1:])
        if dropped is not None:
            embedding = jnp.where(dropped[:, None], null, embedding)
        vector = Dense(self.time_width, name="embedding_to_time", **dense)(embedding)
        if "vector" in cond:
            vector += Dense(self.time_width, name="vector_to_time", **dense)(cond["vector"])
        tokens = Dense(self.num_tokens * self.width, name="embedding_to_tokens", **dense)(embedding)
        tokens = tokens.reshape(-1, self.width, self.num_tokens).swapaxes(1, 2).astype(jnp.float32)
        if "tokens" in cond:
            text = Dense(self.width, name="tokens", **dense)(cond["tokens"])
            tokens = jnp.concatenate([tokens, layer_norm(1e-5, jnp.float32, "tokens_norm")(text)], axis=1)
        found = {"tokens": tokens, "vector": vector.astype(jnp.float32)}
        if "tokens_mask" in cond:
            mask = cond["tokens_mask"]
            found["tokens_mask"] = jnp.pad(mask, ((0, 0), (self.num_tokens, 0)), constant_values=True)
        return found


class Embedded(nn.Module):
    """A network conditioned on an image embedding.

    Attributes:
      net: called with (x, t, cond, train=...), a `UNet` with vector_embedding "none".
      condition: makes the network's `cond`.
    """

    net: nn.Module
    condition: EmbeddingCondition

    def __call__(self, x: jax.Array, t: jax.Array, cond: Mapping[str, jax.Array], *, train: bool = False) -> jax.Array:
        """The network's output; `cond` has "embedding" [B, D], "embedding_dropped" bool [B], and a text's entries."""
        rest = {name: value for name, value in cond.items() if name not in ("embedding", "embedding_dropped")}
        whole = self.condition(cond["embedding"], rest, cond["embedding_dropped"])
        output: jax.Array = self.net(x, t, whole, train=train)
        return output
