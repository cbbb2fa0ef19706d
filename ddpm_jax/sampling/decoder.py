"""Converts between pictures and what is diffused: the last part of condition -> generation -> decoder.

A decoder gives the arrays of the diffusion their meaning: here they are the pixels themselves, scaled to [-1, 1], in
`latents.py` an autoencoder's latents. `ddpm_jax.config.make_decoder` makes it from a run's config; a kind of decoder is
one class and one line there.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.runtime import images, parallel


class Decoder(Protocol):
    """Turns what was diffused into 8-bit pictures, and pictures into what is diffused.

    Attributes:
      picture_shape: (H, W, C) of the pictures.
      shape: of what is diffused, without the batch.
      reads: the entries of a training batch that it needs.
    """

    @property
    def picture_shape(self) -> tuple[int, int, int]: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def reads(self) -> Mapping[str, jax.ShapeDtypeStruct]: ...

    def of_size(self, height: int, width: int) -> "Decoder":
        """The same for pictures of a different size; UserError for a size that is not supported."""
        ...

    def read(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of a batch of `host_batches` that `reads` names, on the host."""
        ...

    def of_batch(self, batch: Mapping[str, jax.Array], key: Callable[[str], jax.Array]) -> jax.Array:
        """x_0 [B, *shape] of a training batch, on the devices; `key` gives the step's key for a purpose."""
        ...

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        """x_0 [N, *shape] of uint8 pictures [N, H, W, C]."""
        ...

    def encode_mask(self, masks: np.ndarray) -> np.ndarray:
        """Turns bool masks [N, H, W, 1] of pictures into masks of what is diffused."""
        ...

    def decode(self, x_0: Any) -> np.ndarray:
        """uint8 pictures [..., H, W, C] of x_0 [..., *shape]; every process gets all of them."""
        ...


@dataclasses.dataclass(frozen=True)
class Pixels:
    """The pixels themselves, in [-1, 1].

    Attributes:
      picture_shape: (H, W, C).
      flip: whether training mirrors half of the images left to right.
    """

    picture_shape: tuple[int, int, int]
    flip: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.picture_shape

    @property
    def reads(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        return {"image": jax.ShapeDtypeStruct(self.picture_shape, jnp.uint8)}

    def of_size(self, height: int, width: int) -> "Pixels":
        return dataclasses.replace(self, picture_shape=(height, width, self.picture_shape[-1]))

    def read(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {"image": batch["image"]}

    def of_batch(self, batch: Mapping[str, jax.Array], key: Callable[[str], jax.Array]) -> jax.Array:
        pictures = random_flip(key("flip"), batch["image"]) if self.flip else batch["image"]
        return images.to_float(pictures)

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        return images.to_float(pictures)

    def encode_mask(self, masks: np.ndarray) -> np.ndarray:
        return masks

    def decode(self, x_0: Any) -> np.ndarray:
        return images.to_uint8(parallel.to_host(x_0))


def random_flip(key: jax.Array, pictures: jax.Array) -> jax.Array:
    """Mirrors each of the pictures [B, H, W, C] left to right with probability one half."""
    mirrored = jax.random.bernoulli(key, shape=pictures.shape[:1])
    return jnp.where(mirrored[:, None, None, None], pictures[:, :, ::-1], pictures)
