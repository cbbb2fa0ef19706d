"""The embedded data set, handwritten digits, as scikit-learn has it."""

import numpy as np


def load() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [1797, 8, 8, 1], grey levels 0..16 spread over 0..255, and the digits that they show, int64 [1797]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None], digits.target
