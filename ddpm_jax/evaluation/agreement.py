"""How well pictures agree with the texts that they were made from.

    clip = load_clip("path/to/clip-vit-large-patch14")
    scores = clip_score(clip, pictures, texts)                    # [N]

    similarities = embed_pictures(clip, pictures) @ embed_texts(clip, captions).T
    share = retrieval(similarities, right)                        # right [N]: which caption a picture was made from

Pictures of numbers need no CLIP: `read_digits` says which number they show.
"""

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from ddpm_jax.data import digits
from ddpm_jax.diffusion.samplers import Progress
from ddpm_jax.evaluation.features import train_digits_classifier
from ddpm_jax.interop.transformers import CLIP
from ddpm_jax.runtime import parallel
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.sampling.clip import check_pictures, embed_pictures, embed_texts


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
      UserError: pictures of a different type or shape or none at all, or a different number of texts than of pictures.
    """
    check_pictures(pictures)
    if len(pictures) != len(texts):
        raise UserError(f"there are {len(pictures)} pictures and {len(texts)} texts; accepted: one text for each")
    count = len(set(texts))
    total = count + len(pictures)
    text_progress = progress and (lambda done, _: progress(done, total))
    text_units = embed_texts(clip, texts, mesh=mesh, batch_size=batch_size, progress=text_progress)
    picture_progress = progress and (lambda done, _: progress(count + done, total))
    picture_units = embed_pictures(clip, pictures, mesh=mesh, batch_size=batch_size, progress=picture_progress)
    return np.maximum(100 * np.sum(picture_units * text_units, axis=1), 0)


def retrieval(similarities: np.ndarray, right: np.ndarray, within: int = 1) -> float:
    """The share of pictures whose own caption is ranked first among all captions.

    A caption that is as similar as the picture's own one, or whose similarity is not a number, is ranked before it, so
    that a constant similarity is never right.

    Args:
      similarities: [N, M] of each picture and each caption; the captions all differ.
      right: integer [N], which caption is the picture's own.
      within: the lowest rank that counts; 5: the share of those ranked among the first five.

    Raises:
      ValueError: no pictures, or a `right` of a different length or beyond the captions.
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
      UserError: pictures of a different type or shape, or none at all.
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
