"""Between pictures and what is diffused, both ways: the last part of condition -> generation -> decoder.

The diffusion sees arrays of any meaning. A decoder says what they are: here the pixels themselves, scaled to [-1, 1].
It is made once from a run's config (`ddpm_jax.config.make_decoder`); a kind of decoder is one class here and one line
there.
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
    """

    @property
    def picture_shape(self) -> tuple[int, int, int]: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def of_batch(self, batch: Mapping[str, jax.Array], key: Callable[[str], jax.Array]) -> jax.Array:
        """x_0 [B, *shape] of a training batch, on the devices; `key` gives the step's key for a purpose."""
        ...

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        """x_0 [N, *shape] of uint8 pictures [N, H, W, C]."""
        ...

    def encode_mask(self, masks: np.ndarray) -> np.ndarray:
        """bool masks [N, H, W, 1] of pictures, as masks of what is diffused."""
        ...

    def decode(self, x_0: Any) -> np.ndarray:
        """uint8 pictures [..., H, W, C] of x_0 [..., *shape], the whole on every process."""
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
