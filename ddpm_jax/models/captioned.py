"""A network together with the text encoder that is trained with it."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax


class Captioned(nn.Module):
    """A network conditioned on a text: an encoder turns the text's tokens into the states that the network attends to.

    Attributes:
      net: called with (x, t, cond, train=...), such as a `UNet`.
      encoder: called with (ids, mask), such as a `TextEncoder` or a `CLIPTextEncoder`.
      mask_padding: whether the network attends only to the tokens of a text, not to its padding.
      pooled: whether the network also takes the state of the whole text.
      encode_padding: whether the encoder treats padding like other tokens.
    """

    net: nn.Module
    encoder: nn.Module
    mask_padding: bool = True
    pooled: bool = True
    encode_padding: bool = False

    def __call__(self, x: jax.Array, t: jax.Array, cond: Mapping[str, jax.Array], *, train: bool = False) -> jax.Array:
        """The network's output.

        Args:
          x, t, train: passed to the network.
          cond: "ids" int32 [B, L] and "ids_mask" bool [B, L] of texts, or the result of `encode`.
        """
        output: jax.Array = self.net(x, t, self.encode(cond) if "ids" in cond else cond, train=train)
        return output

    def encode(self, cond: Mapping[str, jax.Array]) -> dict[str, Any]:
        """Converts the texts to the network's own condition, so that sampling runs the encoder once: "tokens" and, if
        the network takes them, "tokens_mask" and "vector", besides the other entries of the condition."""
        states = self.encoder(cond["ids"], None if self.encode_padding else cond["ids_mask"])
        encoded = {name: value for name, value in cond.items() if name not in ("ids", "ids_mask")}
        encoded["tokens"] = states.tokens
        if self.mask_padding:
            encoded["tokens_mask"] = cond["ids_mask"]
        if self.pooled:
            encoded["vector"] = states.pooled if states.projected is None else states.projected
        return encoded
