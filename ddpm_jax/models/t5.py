"""T5's text encoder (Raffel et al. 2020, arXiv:1910.10683), which Imagen uses frozen."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.models.blocks import Dtype
from ddpm_jax.models.transformer import TextStates, Transformer, mean_state, rms_norm


class T5Encoder(nn.Module):
    """The encoder of T5 and T5 v1.1: a Transformer with relative position embeddings.

    Each attention adds a learned bias to its logits, which depends on how far the key is after or before the query; all
    layers share it. Logits are not scaled, norms do not subtract the mean, and linear layers have no bias. The defaults
    are those of the small T5 v1.1: 35,332,800 parameters. XXL, which Imagen uses, has width 4,096, 24 layers, 64 heads
    of width 64 and mlp_width 10,240: 4,762,310,656 parameters.

    `tokens` are the states after the final norm. T5 has no state for the whole text, so `pooled` is the mean over the
    text's tokens, including its end token.

    Attributes:
      vocab_size: number of tokens.
      width: width of the states.
      num_layers, num_heads, head_width, mlp_width, activation, gated, epsilon: of the Transformer. The original T5 has
        "relu" and no gate.
      num_buckets: number of distance buckets, half of them for keys before the query. In each direction, half of the
        buckets hold one distance each, the others ranges that grow with the distance.
      max_distance: the distance from which all share one bucket; above a quarter of num_buckets.
      dtype: compute dtype of matrix products; parameters and output are float32.
    """

    vocab_size: int = 32_128
    width: int = 512
    num_layers: int = 8
    num_heads: int = 6
    head_width: int = 64
    mlp_width: int = 1024
    activation: str = "gelu_new"
    gated: bool = True
    num_buckets: int = 32
    max_distance: int = 128
    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32

    @property
    def max_length(self) -> None:
        """None: a text may have any number of tokens."""

    @property
    def vector_width(self) -> int:
        """Width of the state of the whole text."""
        return self.width

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array | None = None) -> TextStates:
        """Encodes texts.

        Args:
          ids: int32 [B, L].
          mask: bool [B, L], the tokens that are not padding, at least one per text; None: all tokens.
        """
        x = nn.Embed(self.vocab_size, self.width, embedding_init=nn.initializers.normal(1.0), name="tokens")(ids)
        biases = nn.Embed(self.num_buckets, self.num_heads, name="distances")
        distances = np.arange(ids.shape[1]) - np.arange(ids.shape[1])[:, None]  # [L, L], from query to key
        logit_bias = biases(distance_buckets(distances, self.num_buckets, self.max_distance)).transpose(2, 0, 1)
        transformer = Transformer(
            self.num_layers,
            self.num_heads,
            self.mlp_width,
            activation=self.activation,
            epsilon=self.epsilon,
            dtype=self.dtype,
            norm="rms",
            bias=False,
            gated=self.gated,
            head_width=self.head_width,
            scale=1.0,
            name="transformer",
        )
        states = transformer(x, mask, logit_bias.astype(jnp.float32))
        tokens = rms_norm(self.epsilon, jnp.float32, "final_norm")(states)
        return TextStates(tokens, mean_state(tokens, mask))


def distance_buckets(distances: np.ndarray, num_buckets: int, max_distance: int) -> np.ndarray:
    """The bucket, int32 from 0 to num_buckets - 1, of each distance.

    With n = num_buckets / 2 buckets for each direction and m = n / 2, a distance d below m has bucket d, and a larger
    one has m + (n - m) log(d / m) / log(max_distance / m), rounded down, at most n - 1. Keys after the query use the
    upper half of the buckets.

    Args:
      distances: int, position of the key minus that of the query.
      num_buckets, max_distance: as in `T5Encoder`.
    """
    each = num_buckets // 2
    exact = each // 2
    size = np.abs(distances)
    # In float32, as in the training of the weights, since rounding the logarithm can decide.
    share = np.log(np.maximum(size, 1).astype(np.float32) / exact) / np.float32(np.log(max_distance / exact))
    far = np.minimum(exact + (share * (each - exact)).astype(np.int32), each - 1)
    buckets: np.ndarray = np.where(distances > 0, each, 0) + np.where(size < exact, size, far)
    return buckets.astype(np.int32)
