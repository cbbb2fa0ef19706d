"""Regroups portions of images into batches of equal size."""

from collections.abc import Iterable, Iterator

import numpy as np


def regroup(portions: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same images in portions of `size`, the last one smaller."""
    left: list[np.ndarray] = []
    for portion in portions:
        while sum(map(len, left)) + len(portion) >= size:
            taken = size - sum(map(len, left))
            yield np.concatenate([*left, portion[:taken]])
            left, portion = [], portion[taken:]
        if len(portion):
            left.append(portion)
    if left:
        yield np.concatenate(left)
