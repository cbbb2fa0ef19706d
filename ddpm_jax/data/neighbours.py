"""Nearest neighbours in a source, to see whether a network has memorised its training set."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from ddpm_jax.data.source import Source

_BLOCK_BYTES = 64 << 20  # of uint8 images compared at a time


def nearest(
    pictures: np.ndarray,
    source: Source,
    count: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    mirrored: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest images by root mean square distance, computed block by block.

    Args:
      pictures: uint8 [N, H, W, C].
      source: images of the same shape.
      count: number of neighbours for each picture.
      progress: called with (images compared, all images).
      mirrored: whether to compare with the images' mirror images as well.

    Returns:
      Their indices, int64 [N, count], nearest first, and the distances, float64 [N, count] in grey levels, 0 to 255.
    """
    # Accelerators round the factors of a product to bfloat16 or TF32, where half-integers below 128 are exact.
    wanted = pictures.reshape(len(pictures), -1).astype(np.float32) - 127.5
    wanted_square = np.square(wanted).sum(1, dtype=np.float64)
    numbers, squares = np.zeros((len(pictures), 0), np.int64), np.zeros((len(pictures), 0))
    size = max(1, _BLOCK_BYTES // wanted.shape[1])
    for first in range(0, len(source), size):
        block = np.stack([source[i]["image"] for i in range(first, min(first + size, len(source)))])
        found = np.full((len(pictures), len(block)), np.inf)
        for images in (block, block[:, :, ::-1]) if mirrored else (block,):
            flat = images.reshape(len(block), -1).astype(np.float32) - 127.5
            products = np.asarray(jnp.asarray(wanted) @ jnp.asarray(flat).T, np.float64)
            square = wanted_square[:, None] - 2 * products + np.square(flat).sum(1, dtype=np.float64)
            found = np.minimum(found, square)
        numbers = np.concatenate([numbers, np.tile(np.arange(first, first + len(block)), (len(pictures), 1))], axis=1)
        squares = np.concatenate([squares, found], axis=1)
        best = np.argsort(squares, axis=1, kind="stable")[:, :count]
        numbers, squares = np.take_along_axis(numbers, best, 1), np.take_along_axis(squares, best, 1)
        progress(first + len(block), len(source))
    return numbers, np.sqrt(np.maximum(squares, 0.0) / wanted.shape[1])
