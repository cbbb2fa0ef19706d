"""DALL-E 2's image embeddings (Ramesh et al. 2022): the prior diffuses them, and the decoder draws pictures from them.

Between stages and for users, an embedding is CLIP's, with length 1. Networks see it times the root of its width, so
its entries have about unit variance. Karlo's networks were trained on embeddings of CLIP's own length, for which there
is `Units`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.editing import slerp
from ddpm_jax.interop.transformers import CLIP
from ddpm_jax.runtime import parallel
from ddpm_jax.runtime.cache import Cache
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.sampling.clip import embed_pictures, embed_texts

_MOST = 1 << 20  # embeddings of training images in the cache


@dataclasses.dataclass(frozen=True, eq=False)
class Units:
    """The scale of embeddings of CLIP's own length: networks see (embedding - mean) / std.

    Attributes:
      mean, std: numbers, or float32 [D].
    """

    mean: Any = 0.0
    std: Any = 1.0


@dataclasses.dataclass(frozen=True)
class Embedder:
    """A frozen CLIP.

    Attributes:
      width: of its embeddings, D.
      open: reads it at its first use.
      units: None: embeddings have length 1, and networks see them times the root of D.
    """

    width: int
    open: Callable[[], CLIP]
    units: Units | None = None

    def of_pictures(self, pictures: np.ndarray) -> np.ndarray:
        """The embeddings of uint8 pictures [N, H, W, C]: float32 [N, D], of length 1 without `units`."""
        with jax.transfer_guard("allow"):
            return embed_pictures(self._clip, pictures, **self._options)

    def of_texts(self, texts: Sequence[str]) -> np.ndarray:
        """The embeddings of texts: float32 [N, D], of length 1 without `units`."""
        with jax.transfer_guard("allow"):
            return embed_texts(self._clip, texts, **self._options)

    def between(self, first: np.ndarray, second: np.ndarray, weights: Sequence[float]) -> np.ndarray:
        """float32 [len(weights), D] along the arc between the embeddings of two pictures, uint8 [H, W, C]."""
        ends = self.of_pictures(np.stack([first, second]))
        return np.asarray(slerp(jnp.asarray(ends[0]), jnp.asarray(ends[1]), weights))

    def turned(self, picture: np.ndarray, caption: str, target: str, weights: Sequence[float]) -> np.ndarray:
        """float32 [len(weights), D]: a picture's embedding rotated towards the difference of two captions' embeddings.

        Raises:
          UserError: both captions have the same embedding.
        """
        old, new = self.of_texts([caption, target])
        length = np.linalg.norm(new - old)
        if not length > 0:
            raise UserError(
                f"the captions {caption!r} and {target!r} have the same embedding; accepted: captions with different "
                "embeddings"
            )
        (start,) = self.of_pictures(picture[None])
        difference = (new - old) * (np.linalg.norm(start) / length)
        return np.asarray(slerp(jnp.asarray(start), jnp.asarray(difference), weights))

    def of_batch(self, batch: Mapping[str, Any]) -> np.ndarray:
        """float32 [B, 1, 1, D] for a batch of `host_batches`; each picture is embedded once."""
        pictures = dict(zip(batch["index"].tolist(), batch["image"], strict=True))
        rows = self._cache(
            batch["index"].tolist(),
            lambda numbers: self.of_pictures(np.stack([pictures[number] for number in numbers])),
        )
        return np.stack(rows)[:, None, None]

    def scaled(self, embeddings: Any) -> Any:
        """Scales embeddings for the network."""
        if self.units is not None:
            return (embeddings - self.units.mean) / self.units.std
        return np.float32(self.width**0.5) * embeddings

    def unscaled(self, values: np.ndarray) -> np.ndarray:
        """The inverse of `scaled`."""
        if self.units is not None:
            return values * self.units.std + self.units.mean
        return values / np.linalg.norm(values, axis=-1, keepdims=True)

    @property
    def _options(self) -> dict[str, Any]:
        """One device of this process: the processes of a job embed different pictures."""
        local = parallel.make_mesh(devices=jax.local_devices()[:1])
        return {"mesh": local, "batch_size": parallel.cacheable_chunk(32), "normalized": self.units is None}

    @functools.cached_property
    def _clip(self) -> CLIP:
        return self.open()

    @functools.cached_property
    def _cache(self) -> Cache[int, np.ndarray]:
        return Cache(_MOST)


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """The decoder of a prior, which diffuses embeddings: it returns them as they are.

    Attributes:
      embedder: of the training pictures.
    """

    embedder: Embedder

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        return (1, 1, self.embedder.width)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.picture_shape

    @property
    def reads(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        return {"embedding": jax.ShapeDtypeStruct(self.shape, jnp.float32)}

    def of_size(self, height: int, width: int) -> "Embeddings":
        raise UserError(f"height and width are {height} and {width}; this run draws embeddings, which have none")

    def read(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {"embedding": self.embedder.of_batch(batch)}

    def of_batch(self, batch: Mapping[str, jax.Array], key: Callable[[str], jax.Array]) -> jax.Array:
        return self.embedder.scaled(batch["embedding"])

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        raise UserError("this run draws embeddings; accepted for edits of pictures: a run that draws pictures")

    def encode_mask(self, masks: np.ndarray) -> np.ndarray:
        raise UserError("this run draws embeddings, of which no part can be masked")

    def decode(self, x_0: Any) -> np.ndarray:
        """float32 [..., 1, 1, D]."""
        return self.embedder.unscaled(parallel.to_host(x_0))


@dataclasses.dataclass(frozen=True)
class ImageEmbedding:
    """The further input of DALL-E 2's decoder: the embedding of the image to draw.

    Attributes:
      embedder: of the training pictures.
      dropout: the share of training examples whose embedding is dropped, for guidance.
    """

    embedder: Embedder
    dropout: float
    needs: ClassVar[str] = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, 1, self.embedder.width)

    @property
    def reads(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        return {"embedding": jax.ShapeDtypeStruct(self.shape, jnp.float32)}

    @property
    def cond(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        embedding = jax.ShapeDtypeStruct((self.embedder.width,), jnp.float32)
        return {"embedding": embedding, "embedding_dropped": jax.ShapeDtypeStruct((), jnp.bool_)}

    def of_size(self, height: int, width: int) -> "ImageEmbedding":
        return self

    def of_examples(self, batch: Mapping[str, Any]) -> np.ndarray:
        return self.embedder.of_batch(batch)

    def of_training(self, batch: Mapping[str, jax.Array], key: Callable[[str], jax.Array]) -> dict[str, jax.Array]:
        embedding = self.embedder.scaled(batch["embedding"][:, 0, 0])
        return {
            "embedding": embedding,
            "embedding_dropped": jax.random.bernoulli(key("embedding_dropout"), self.dropout, (len(embedding),)),
        }

    def check(self, values: Any) -> np.ndarray:
        values = np.asarray(values, np.float32)
        if values.shape[1:] != self.shape:
            raise UserError(f"the embeddings have shape {values.shape}; accepted: (N, 1, 1, {self.embedder.width})")
        return values

    def of_images(self, values: np.ndarray, seed: int, numbers: np.ndarray) -> dict[str, Any]:
        return {
            "embedding": self.embedder.scaled(values[:, 0, 0]),
            "embedding_dropped": np.zeros(len(values), bool),
        }

    def null(self, cond: Mapping[str, Any]) -> dict[str, Any]:
        return {**cond, "embedding_dropped": np.ones_like(cond["embedding_dropped"])}

    def settings(self) -> dict[str, Any]:
        return {}
