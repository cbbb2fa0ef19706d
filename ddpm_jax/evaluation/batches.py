"""Images that come in any portions, in batches of one size."""

from collections.abc import Iterable

import numpy as np


def regroup(portions: Iterable[np.ndarray], size: int) -> Iterable[np.ndarray]:
    """The same images in portions of `size`, the last one smaller."""
    left: list[np.ndarray] = []
    for portion in portions:
        left.append(portion)
        while sum(map(len, left)) >= size:
            joined = np.concatenate(left)
            yield joined[:size]
            left = [joined[size:]]
    joined = np.concatenate(left) if left else np.zeros(0)
    if len(joined):
        yield joined
