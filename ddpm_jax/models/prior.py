"""DALL-E 2's prior: a Transformer that denoises CLIP's image embedding, given a text."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.blocks import ACTIVATIONS, Dense, Dtype, timestep_embedding
from ddpm_jax.models.transformer import Transformer, layer_norm

ADDED_TOKENS = 4  # the text embedding, the timestep, the noised image embedding and the query
_CONDITIONING = ("tokens", "tokens_mask", "vector")
_EPSILON = 1e-5  # of every layer norm


class Prior(nn.Module):
    """Predicts the clean image embedding from a noised one (Ramesh et al. 2022, arXiv:2204.06125, section 2.2).

        net = Prior(width=256, num_layers=4, num_heads=4)
        cond = {"tokens": tokens, "tokens_mask": mask, "vector": vector}             # of CLIP's text encoder
        variables = net.init(jax.random.key(0), x, t, cond)                          # x: [B, 1, 1, D]
        x_0 = net.apply(variables, x, t, cond)                                       # [B, 1, 1, D]

    A causal Transformer runs over the states of the text's tokens, the text's embedding, the timestep, the noised image
    embedding and a learned query, whose output is the prediction. An embedding has the shape of an image of one pixel,
    so that diffusion and sampling work as for images. DALL-E 2 trains the network to predict x_0. The defaults are
    those of Karlo's prior: 1,022,028,544 parameters for embeddings of width 768.

    Attributes:
      width: width of the tokens in the Transformer.
      num_layers, num_heads: of the Transformer, whose MLPs are four times as wide.
      num_tokens: number of tokens of a text, padding included.
      time_width: width of the time embedding's hidden layer; None: width.
      time_activation: activation of that layer: "swish", "gelu", "mish" or "relu".
      project_tokens: whether the tokens' states pass through a dense layer; otherwise they must have width `width`.
      norm_vector: whether the text's embedding passes through a layer norm first.
      norm_in: whether there is a layer norm before the first block.
      dtype: compute dtype of matrix products; parameters and output are float32.
    """

    width: int = 2048
    num_layers: int = 20
    num_heads: int = 32
    num_tokens: int = 77
    time_width: int | None = None
    time_activation: str = "swish"
    project_tokens: bool = True
    norm_vector: bool = False
    norm_in: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, cond: Mapping[str, jax.Array], *, train: bool = False) -> jax.Array:
        """Predicts the clean embeddings (or the noise or v, depending on the loss).

        Args:
          x: [B, 1, 1, D], the noised embeddings.
          t: [B], integer or float.
          cond: a dict of
            "tokens": [B, num_tokens, C], the states of the text's tokens;
            "vector": [B, E], the text's embedding;
            "tokens_mask": bool [B, num_tokens], the tokens to attend to; without it, all.
          train: accepted like in all networks; there is no dropout here.

        Returns:
          float32 [B, 1, 1, D].

        Raises:
          ValueError: shapes or conditioning that do not fit.
        """
        self._check(x, t, cond)
        dense = {"dtype": self.dtype}
        time = timestep_embedding(t, self.width, frequency_shift=0.0, cosines_first=True)
        time = ACTIVATIONS[self.time_activation](Dense(self.time_width or self.width, name="time_0")(time))
        time = Dense(self.width, name="time_1")(time)
        tokens, vector = cond["tokens"], cond["vector"]
        if self.project_tokens:
            tokens = Dense(self.width, name="tokens", **dense)(tokens)
        if self.norm_vector:
            vector = layer_norm(_EPSILON, jnp.float32, "vector_norm")(vector)
        vector = Dense(self.width, name="vector", **dense)(vector)
        noised = Dense(self.width, name="x", **dense)(x.reshape(len(x), -1))
        initial = nn.initializers.normal(0.02)
        query = jnp.broadcast_to(self.param("query", initial, (self.width,)), time.shape)
        added = jnp.stack([part.astype(jnp.float32) for part in (vector, time, noised, query)], axis=1)
        h = jnp.concatenate([tokens.astype(jnp.float32), added], axis=1)
        h += self.param("positions", initial, (self.num_tokens + ADDED_TOKENS, self.width))
        if self.norm_in:
            h = layer_norm(_EPSILON, jnp.float32, "norm_in")(h)
        mask = cond.get("tokens_mask")
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (0, ADDED_TOKENS)), constant_values=True)
        h = Transformer(
            self.num_layers,
            self.num_heads,
            4 * self.width,
            causal=True,
            epsilon=_EPSILON,
            dtype=self.dtype,
            name="transformer",
        )(h, mask)
        h = layer_norm(_EPSILON, jnp.float32, "norm_out")(h[:, -1])
        return Dense(x.shape[-1], init_scale=0.0, name="out", **dense)(h).astype(jnp.float32).reshape(x.shape)

    def _check(self, x: jax.Array, t: jax.Array, cond: Mapping[str, jax.Array]) -> None:
        if self.time_activation not in ACTIVATIONS:
            raise ValueError(f"time_activation is {self.time_activation!r}; accepted: {', '.join(ACTIVATIONS)}")
        if x.ndim != 4 or x.shape[1:3] != (1, 1):
            raise ValueError(f"x has shape {x.shape}; accepted: [B, 1, 1, D], embeddings in place of images")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t has shape {t.shape}; accepted: {x.shape[:1]}, one entry per embedding")
        unknown = [name for name in cond if name not in _CONDITIONING]
        if unknown:
            raise ValueError(f"cond has {unknown[0]!r}; accepted: {', '.join(_CONDITIONING)}")
        for name in ("tokens", "vector"):
            if name not in cond:
                raise ValueError(
                    f"cond has no {name!r}; the prior needs the states of a text's tokens and its embedding"
                )
        tokens = cond["tokens"].shape
        if tokens[1] != self.num_tokens:
            raise ValueError(f"the texts have {tokens[1]} tokens; accepted: {self.num_tokens} (num_tokens)")
        if not self.project_tokens and tokens[2] != self.width:
            raise ValueError(
                f"the tokens' states have width {tokens[2]}; accepted without project_tokens: {self.width}"
            )
