"""CLIP's text and image encoders, which are used frozen, and a small text encoder that is trained with the network.

Text encoders turn token ids int32 [B, L] into `TextStates`: a state for each token, to attend to, and one vector for
the whole text. The image encoder turns pixels [B, H, W, C] into `ImageStates`, the same for the patches of an image.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.blocks import Dtype, kernel_init
from ddpm_jax.models.transformer import TextStates, Transformer, layer_norm, mean_state


class ImageStates(NamedTuple):
    """An encoder's output for images.

    Attributes:
      patches: float32 [B, N, D], a state for each patch, row by row, before the last layer norm.
      pooled: float32 [B, D], the state of the whole image.
      projected: float32 [B, P], `pooled` in the space that CLIP shares with texts; None without a projection.
    """

    patches: jax.Array
    pooled: jax.Array
    projected: jax.Array | None = None


class CLIPTextEncoder(nn.Module):
    """CLIP's text encoder (Radford et al. 2021, arXiv:2103.00020), a causal Transformer.

    The defaults are those of ViT-L/14, which Stable Diffusion 1.x uses: 123,060,480 parameters. `tokens` are the states
    after the final layer norm; `pooled` is the one at the end token, which alone has seen the whole text.

    Attributes:
      vocab_size: number of tokens.
      max_length: the most tokens a text may have, as many as there are position embeddings.
      width: width of the states.
      num_layers, num_heads, mlp_width, activation, epsilon: of the Transformer.
      end_token: id of the end token; the pooled state is at its first position. None: at the largest id of the text.
      projection: width of the projection, which has no bias; None: no projection.
      dtype: compute dtype of matrix products; parameters and output are float32.
    """

    vocab_size: int = 49_408
    max_length: int = 77
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    end_token: int | None = 49_407
    projection: int | None = None
    dtype: Dtype = jnp.float32

    @property
    def vector_width(self) -> int:
        """Width of the state of the whole text, `projected` if there is a projection."""
        return self.projection or self.width

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array | None = None) -> TextStates:
        """Encodes texts.

        Args:
          ids: int32 [B, L] with L up to max_length, each row with its end token.
          mask: bool [B, L], the tokens that are not padding; None: all tokens, as in Stable Diffusion. Tokens do not
            attend to later ones, so a mask only changes the states of padding.

        Returns:
          The states, with `projected` if there is a projection.

        Raises:
          ValueError: more tokens than max_length.
        """
        x = _embed(self.vocab_size, self.max_length, self.width, ids)
        transformer = Transformer(
            self.num_layers,
            self.num_heads,
            self.mlp_width,
            causal=True,
            activation=self.activation,
            epsilon=self.epsilon,
            dtype=self.dtype,
            name="transformer",
        )
        tokens = layer_norm(self.epsilon, jnp.float32, "final_norm")(transformer(x, mask))
        end = jnp.argmax(ids if self.end_token is None else ids == self.end_token, axis=-1)
        pooled = jnp.take_along_axis(tokens, end[:, None, None], axis=1)[:, 0]
        return TextStates(tokens, pooled, _project(self.projection, pooled))


class CLIPImageEncoder(nn.Module):
    """CLIP's image encoder (Radford et al. 2021, arXiv:2103.00020), a Vision Transformer.

    The image is cut into non-overlapping patches (a convolution without bias whose stride is its size). A learned class
    token precedes them, and its state after the last layer norm is `pooled`. The defaults are those of ViT-L/14:
    303,179,776 parameters without the projection.

    Attributes:
      image_size: height and width of an image in pixels, one number if they are equal.
      patch_size: height and width of a patch; must divide both.
      channels: channels of an image.
      width: width of the states.
      num_layers, num_heads, mlp_width, activation, epsilon: of the Transformer.
      projection: width of the projection, which has no bias; None: no projection.
      dtype: compute dtype of matrix products; parameters and output are float32.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int = 14
    channels: int = 3
    width: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    mlp_width: int = 4096
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    projection: int | None = None
    dtype: Dtype = jnp.float32

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an image."""
        size = self.image_size
        return (*(size if isinstance(size, tuple) else (size, size)), self.channels)

    @nn.compact
    def __call__(self, images: jax.Array) -> ImageStates:
        """Encodes images.

        Args:
          images: float [B, *shape], normalised as in the training of the weights.

        Returns:
          The states, with `projected` if there is a projection.

        Raises:
          ValueError: images of a different shape, or a patch_size that does not divide image_size.
        """
        batch, (height, width, channels), patch = len(images), self.shape, self.patch_size
        if height % patch or width % patch:
            raise ValueError(f"patch_size {patch} does not divide image_size {self.image_size}")
        if images.shape[1:] != self.shape:
            raise ValueError(f"the images have shape {images.shape[1:]}; accepted: {self.shape}")
        rows, columns, initial = height // patch, width // patch, nn.initializers.normal(0.02)
        count = rows * columns
        # A matrix product over the pixels of each patch, which is faster than the same convolution on CPU.
        pixels = images.reshape(batch, rows, patch, columns, patch, channels).swapaxes(2, 3)
        pixels = pixels.reshape(batch, count, patch, patch, channels)
        options = {"use_bias": False, "kernel_init": kernel_init(), "dtype": self.dtype, "name": "patches"}
        patches = nn.DenseGeneral(self.width, axis=(-3, -2, -1), **options)(pixels)
        token = self.param("class_token", initial, (self.width,))
        x = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, self.width)), patches], axis=1)
        x += nn.Embed(count + 1, self.width, embedding_init=initial, name="positions")(jnp.arange(count + 1))
        x = Transformer(
            self.num_layers,
            self.num_heads,
            self.mlp_width,
            activation=self.activation,
            epsilon=self.epsilon,
            dtype=self.dtype,
            name="transformer",
        )(layer_norm(self.epsilon, jnp.float32, "pre_norm")(x)).astype(jnp.float32)
        pooled = layer_norm(self.epsilon, jnp.float32, "post_norm")(x[:, 0])
        return ImageStates(x[:, 1:], pooled, _project(self.projection, pooled))


class TextEncoder(nn.Module):
    """A small encoder that is trained with the network: each token attends to all others, and `pooled` is their mean.

    Padding is masked, so a text has the same states whatever length it is padded to.

    Attributes:
      vocab_size: number of tokens.
      max_length: the most tokens a text may have.
      width: width of the states; the MLPs are four times as wide.
      num_layers, num_heads: of the Transformer; with 0 layers, a state is the embedding of a token and its position.
      dtype: compute dtype of matrix products; parameters and output are float32.
    """

    vocab_size: int
    max_length: int
    width: int = 64
    num_layers: int = 2
    num_heads: int = 4
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> TextStates:
        """Encodes texts.

        Args:
          ids: int32 [B, L] with L up to max_length.
          mask: bool [B, L], the tokens that are not padding; at least one per text.

        Raises:
          ValueError: more tokens than max_length, or a width that num_heads does not divide.
        """
        x = _embed(self.vocab_size, self.max_length, self.width, ids)
        x = Transformer(self.num_layers, self.num_heads, 4 * self.width, dtype=self.dtype, name="transformer")(x, mask)
        tokens = layer_norm(1e-5, jnp.float32, "final_norm")(x)
        return TextStates(tokens, mean_state(tokens, mask))


def _project(width: int | None, pooled: jax.Array) -> jax.Array | None:
    """The pooled state projected to the space that texts and images share; called inside a module, like `_embed`."""
    return None if width is None else nn.Dense(width, use_bias=False, name="projection")(pooled)


def _embed(vocab_size: int, max_length: int, width: int, ids: jax.Array) -> jax.Array:
    """The sum of learned embeddings of each token and its position; called inside a module, which owns the
    parameters."""
    length = ids.shape[-1]
    if length > max_length:
        raise ValueError(f"a text of {length} tokens is longer than max_length, {max_length}")
    initial = nn.initializers.normal(0.02)
    tokens = nn.Embed(vocab_size, width, embedding_init=initial, name="tokens")(ids)
    return tokens + nn.Embed(max_length, width, embedding_init=initial, name="positions")(jnp.arange(length))
