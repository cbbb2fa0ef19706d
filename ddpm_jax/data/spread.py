"""A few examples of a data set, evenly spread over it."""

import numpy as np

from ddpm_jax.data.pipeline import Batch, stacked
from ddpm_jax.data.source import Source


def spread(source: Source, count: int) -> Batch:
    """`count` examples evenly spread over a source, or all if it has fewer, as a batch of `host_batches`."""
    numbers = _places(source, count)
    return stacked((source[int(number)] for number in numbers), len(numbers)) | {"index": numbers}


def spread_captions(source: Source, count: int) -> list[str]:
    """The first captions of the examples of `spread`."""
    return [source.captions[place][0] for place in _places(source, count).tolist()]


def _places(source: Source, count: int) -> np.ndarray:
    return np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int)
