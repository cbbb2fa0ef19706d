"""Pictures in files, and the source that reads a folder of them."""

import numpy as np
from PIL import Image

from ddpm_jax.data.sources import open_source

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def folder(path, height=4, width=4, channels=3, **options):
    return open_source("folder", path=str(path), height=height, width=width, channels=channels, **options)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image, tuple):
        image = Image.new("RGB", (4, 4), image)
    elif not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image, np.uint8) if np.asarray(image).dtype != np.uint16 else image)
    image.save(path, **options)


def stripes(*colours, width=4, height=4):
    """Vertical stripes, `width` pixels each."""
    return np.repeat(np.array([colours], np.uint8), width, axis=1).repeat(height, axis=0)


def examples(source):
    """The examples as a sorted list, whatever their order."""
    return sorted(
        (example["image"].tobytes(), example["label"]) for example in map(source.__getitem__, range(len(source)))
    )
