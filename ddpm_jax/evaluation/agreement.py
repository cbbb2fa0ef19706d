"""How well pictures agree with the texts that they were made from.

    clip = load_clip("path/to/clip-vit-large-patch14")
    scores = clip_score(clip, pictures, texts)                    # [N]

    similarities = embed_pictures(clip, pictures) @ embed_texts(clip, captions).T
    share = retrieval(similarities, right)                        # right [N]: which caption a picture was made from

Pictures of numbers need no CLIP: `read_digits` says which number they show.
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

from ddpm_jax.data import digits
from ddpm_jax.evaluation.features import Output, in_batches, train_digits_classifier
from ddpm_jax.interop.transformers import CLIP
from ddpm_jax.models.clip import CLIPImageEncoder, CLIPTextEncoder
from ddpm_jax.runtime import parallel
from ddpm_jax.runtime.errors import UserError

Progress = Callable[[int, int], None]


def clip_score(
    clip: CLIP,
    pictures: np.ndarray,
    texts: Sequence[str],
    *,
    mesh: Mesh | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> np.ndarray:
    """CLIPScore of each picture and its text: max(100 cos(picture, text), 0) (Hessel et al. 2021, arXiv:2104.08718).

    The paper's factor is 2.5 and its texts begin with "A photo depicts"; here the factor is 100 and texts are taken as
    they are, as in torchmetrics. Texts longer than CLIP takes are cut.

    Args:
      clip: of `load_clip`.
      pictures: uint8 [N, H, W, 1 or 3].
      texts: N of them.
      mesh, batch_size: as in `embed_pictures`.
      progress: called with how many pictures and different texts are encoded, and how many there are.

    Returns:
      float32 [N], from 0 to 100.

    Raises:
      UserError: pictures of another type or shape or none at all, or another number of texts than of pictures.
    """
    _check(pictures)
    if len(pictures) != len(texts):
        raise UserError(f"there are {len(pictures)} pictures and {len(texts)} texts; accepted: one text for each")
    count = len(set(texts))
    total = count + len(pictures)
    text_progress = progress and (lambda done, _: progress(done, total))
    text_units = embed_texts(clip, texts, mesh=mesh, batch_size=batch_size, progress=text_progress)
    picture_progress = progress and (lambda done, _: progress(count + done, total))
    picture_units = embed_pictures(clip, pictures, mesh=mesh, batch_size=batch_size, progress=picture_progress)
    return np.maximum(100 * np.sum(picture_units * text_units, axis=1), 0)


def embed_pictures(
    clip: CLIP,
    pictures: np.ndarray,
    *,
    mesh: Mesh | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
    normalized: bool = True,
) -> np.ndarray:
    """Pictures in the space that CLIP shares with texts.

    Grey pictures become RGB, or coloured ones grey, as CLIP takes them. Pictures are prepared as transformers'
    CLIPImageProcessorPil does it: resized by Pillow's bicubic filter to the smallest size that covers CLIP's, cropped
    at the centre, and normalised.

    Args:
      clip: of `load_clip`.
      pictures: uint8 [N, H, W, 1 or 3].
      mesh: of `parallel.make_mesh`, all processes giving the same pictures; None: all devices.
      batch_size: pictures at a time, rounded up to a multiple of the devices.
      progress: called with how many pictures are encoded, and N.
      normalized: scaled to length 1.

    Returns:
      float32 [N, P], if normalized of length 1 each; the dot product of two is their cosine similarity.

    Raises:
      UserError: pictures of another type or shape, or none at all.
    """
    _check(pictures)
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
    """Texts in the space that CLIP shares with pictures; equal texts are encoded once.

    Args:
      clip: of `load_clip`.
      texts: N of them; those longer than CLIP takes are cut.
      mesh, batch_size: as in `embed_pictures`.
      progress: called with how many different texts are encoded, and how many there are.
      normalized: scaled to length 1.

    Returns:
      float32 [N, P], if normalized of length 1 each.

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
    # Scores must not depend on the device: by default, GPUs and TPUs round what they multiply.
    with jax.default_matmul_precision("highest"):
        for output in in_batches(apply, portions, mesh or parallel.make_mesh(), batch_size):
            done.append(output["unit"])
            if progress:
                progress(sum(map(len, done)), total)
    return np.concatenate(done)


def _parts(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (rows[first : first + size] for first in range(0, len(rows), size))


def _check(pictures: np.ndarray) -> None:
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] not in (1, 3):
        raise UserError(
            f"the pictures are {pictures.dtype} of shape {pictures.shape}; accepted: uint8 [N, H, W, 1 or 3], from 0 "
            "to 255 as they are saved"
        )
    if not pictures.size:
        raise UserError("there are no pictures to judge")


def prepare(pictures: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 [N, *shape] of uint8 [N, H, W, 1 or 3]: bicubically resized to cover the shape's size, the centre cropped.
    The side that is longer than it has to be is rounded down, as transformers does it."""
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


def retrieval(similarities: np.ndarray, right: np.ndarray, within: int = 1) -> float:
    """The share of pictures whose own caption is ranked first among all captions.

    A caption that is as similar as the picture's own one, or whose similarity is not a number, is ranked before it, so
    that a constant similarity is never right.

    Args:
      similarities: [N, M] of each picture and each caption; the captions all differ.
      right: integer [N], which caption is the picture's own.
      within: the lowest rank that counts; 5: the share of those ranked among the first five.

    Raises:
      ValueError: no pictures, or a `right` of another length or beyond the captions.
    """
    count, captions = similarities.shape
    right = np.asarray(right)
    if not count or right.shape != (count,) or not 0 <= right.min() <= right.max() < captions:
        raise ValueError(f"right must be {count} numbers from 0 to {captions - 1}, at least one")
    own = similarities[np.arange(count), right][:, None]
    ranks = np.sum(~(similarities < own), axis=1)  # its own one is among these
    return float(np.mean(ranks <= within))


def read_digits(pictures: np.ndarray, *, mesh: Mesh | None = None, batch_size: int = 512) -> np.ndarray:
    """The numbers that pictures of embedded digits show, read digit by digit by the digits classifier.

    Args:
      pictures: uint8 [N, 8, 8 k, 1], k digits side by side, k up to 18.
      mesh, batch_size: of the digits, as in `embed_pictures`.

    Returns:
      int64 [N]. The classifier takes any picture for some digit, however little it looks like one.

    Raises:
      UserError: pictures of another type or shape, or none at all.
    """
    count = digits.side_by_side(pictures.shape[1:])
    if pictures.dtype != np.uint8 or not 1 <= count <= 18 or not len(pictures):
        raise UserError(
            f"the pictures are {pictures.dtype} of shape {pictures.shape}; accepted: uint8 [N, 8, 8 k, 1], at least "
            "one picture of k digits side by side"
        )
    size = digits.SIZE
    pieces = pictures.reshape(-1, size, count, size, 1).swapaxes(1, 2).reshape(-1, size, size, 1)
    judge = train_digits_classifier()
    found = judge.of([pieces], mesh or parallel.make_mesh(), batch_size)["logits"].argmax(-1)
    return found.reshape(-1, count) @ 10 ** np.arange(count)[::-1]
