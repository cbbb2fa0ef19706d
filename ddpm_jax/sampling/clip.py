"""Embeds pictures and texts in the shared space of a CLIP.

    clip = load_clip("path/to/clip-vit-large-patch14")
    similarities = embed_pictures(clip, pictures) @ embed_texts(clip, captions).T

`ddpm_jax.evaluation.agreement` computes scores from them.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial
from PIL import Image

from ddpm_jax.diffusion.samplers import Progress
from ddpm_jax.interop.transformers import CLIP
from ddpm_jax.models.clip import CLIPImageEncoder, CLIPTextEncoder
from ddpm_jax.runtime import parallel
from ddpm_jax.runtime.batches import Output, in_batches
from ddpm_jax.runtime.errors import UserError


def embed_pictures(
    clip: CLIP,
    pictures: np.ndarray,
    *,
    mesh: Mesh | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
    normalized: bool = True,
) -> np.ndarray:
    """Embeds pictures in the space that CLIP shares with texts.

    Grey pictures become RGB, or coloured ones grey, as the CLIP needs them. Pictures are prepared as by transformers'
    CLIPImageProcessorPil: resized by Pillow's bicubic filter to the smallest size that covers CLIP's, cropped
    at the centre, and normalised.

    Args:
      clip: from `load_clip`.
      pictures: uint8 [N, H, W, 1 or 3].
      mesh: from `parallel.make_mesh`; all processes pass the same pictures. None: all devices.
      batch_size: pictures at a time, rounded up to a multiple of the number of devices.
      progress: called with (pictures encoded, N).
      normalized: scale each embedding to length 1.

    Returns:
      float32 [N, P]; the dot product of two normalized embeddings is their cosine similarity.

    Raises:
      UserError: pictures of a different type or shape, or none at all.
    """
    check_pictures(pictures)
    net = _PictureUnits(clip.image, clip.image_mean, clip.image_std, normalized)
    apply = Partial(_apply_of(net), {"params": {"encoder": clip.params["image"]}})
    portions = (prepare(part, clip.image.shape) for part in _parts(pictures, batch_size))
    return _embedded(apply, portions, len(pictures), mesh, batch_size, progress)


def embed_texts(
    clip: CLIP,
    texts: Sequence[str],
    *,
    mesh: Mesh | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
    normalized: bool = True,
) -> np.ndarray:
    """Embeds texts in the space that CLIP shares with pictures; equal texts are encoded once.

    Args:
      clip: from `load_clip`.
      texts: N of them; texts that are too long for CLIP are cut.
      mesh, batch_size: as in `embed_pictures`.
      progress: called with (different texts encoded, all different texts).
      normalized: scale each embedding to length 1.

    Returns:
      float32 [N, P].

    Raises:
      UserError: no texts, or one that is not Unicode.
    """
    if not len(texts):
        raise UserError("there are no texts to encode")
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    ids = clip.tokenizer.encode(list(places)).ids
    apply = Partial(_apply_of(_TextUnits(clip.text, normalized)), {"params": {"encoder": clip.params["text"]}})
    units = _embedded(apply, _parts(ids, batch_size), len(ids), mesh, batch_size, progress)
    return units[[places[text] for text in texts]]


class _PictureUnits(nn.Module):
    encoder: CLIPImageEncoder
    mean: tuple[float, ...]
    std: tuple[float, ...]
    normalized: bool = True

    def __call__(self, pictures: jax.Array) -> Output:
        pixels = pictures.astype(jnp.float32) / 255
        return _unit(self.encoder((pixels - jnp.array(self.mean)) / jnp.array(self.std)).projected, self.normalized)


class _TextUnits(nn.Module):
    encoder: CLIPTextEncoder
    normalized: bool = True

    def __call__(self, ids: jax.Array) -> Output:
        return _unit(self.encoder(ids).projected, self.normalized)


@functools.lru_cache(maxsize=8)
def _apply_of(net: nn.Module) -> Callable[..., Any]:
    """`net.apply`, the same object for equal modules, so that a second call finds the program of the first."""
    return net.apply


def _unit(x: Any, normalized: bool) -> Output:
    return {"unit": x / jnp.linalg.norm(x, axis=-1, keepdims=True) if normalized else x}


def _embedded(
    apply: Partial,
    portions: Iterator[np.ndarray],
    total: int,
    mesh: Mesh | None,
    batch_size: int,
    progress: Progress | None,
) -> np.ndarray:
    done: list[np.ndarray] = []
    # Scores must not depend on the device: by default, GPUs and TPUs round the factors of matrix products.
    with jax.default_matmul_precision("highest"):
        for output in in_batches(apply, portions, mesh or parallel.make_mesh(), batch_size):
            done.append(output["unit"])
            if progress:
                progress(sum(map(len, done)), total)
    return np.concatenate(done)


def _parts(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (rows[first : first + size] for first in range(0, len(rows), size))


def check_pictures(pictures: np.ndarray) -> None:
    """Raises UserError unless the pictures are uint8 [N, H, W, 1 or 3]."""
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] not in (1, 3):
        raise UserError(
            f"the pictures are {pictures.dtype} of shape {pictures.shape}; accepted: uint8 [N, H, W, 1 or 3], from 0 "
            "to 255 as they are saved"
        )
    if not pictures.size:
        raise UserError("there are no pictures to judge")


def prepare(pictures: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Resizes uint8 [N, H, W, 1 or 3] bicubically to cover the shape, and crops the centre: uint8 [N, *shape].

    The longer side is rounded down, as in transformers.
    """
    if pictures.shape[1:] == shape:
        return pictures
    (height, width), (rows, columns, channels) = pictures.shape[1:3], shape
    covers_height = rows * width >= columns * height
    size = (rows * width // height, rows) if covers_height else (columns, columns * height // width)
    left, top = (size[0] - columns) // 2, (size[1] - rows) // 2
    prepared = np.empty((len(pictures), *shape), np.uint8)
    for place, picture in zip(prepared, pictures, strict=True):
        image = Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture)
        resized = image.convert("RGB" if channels == 3 else "L").resize(size, Image.Resampling.BICUBIC)
        place[:] = np.asarray(resized).reshape(*size[::-1], channels)[top : top + rows, left : left + columns]
    return prepared
