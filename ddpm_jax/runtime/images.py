"""Pictures: conversion to 8 bits, grids, and files written atomically."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from ddpm_jax.runtime.files import atomic_path

_LINE = 14  # height of a line of text, in pixels


def to_uint8(x: ArrayLike) -> np.ndarray:
    """Converts images in [-1, 1] to uint8 pictures of the same shape, rounded to the nearest of 256 levels."""
    return np.clip(np.round((np.asarray(x, np.float32) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def to_float(pictures: Any) -> Any:
    """Converts uint8 pictures to float32 in [-1, 1]; a NumPy array stays one, as does a jax array."""
    return pictures.astype(np.float32) / np.float32(127.5) - 1


def grid(images: np.ndarray, columns: int | None = None, tile: int = 64, gap: int = 2) -> np.ndarray:
    """Arranges many images in one picture, row by row.

    Args:
      images: uint8 [N, H, W, C].
      columns: images per row; None: about as many as there are rows.
      tile: images smaller than this are enlarged by an integer factor, so that every pixel is visible.
      gap: white pixels between images.

    Returns:
      uint8 [H', W', C].
    """
    count, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    factor = enlargement(height, width, tile)
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = height * factor + gap, width * factor + gap
    canvas = np.full((rows * height + gap, columns * width + gap, channels), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * height + gap, (index % columns) * width + gap
        canvas[top : top + height - gap, left : left + width - gap] = image
    return canvas


def captioned(image: np.ndarray, text: str, colour: str = "black", tile: int = 96) -> np.ndarray:
    """An image, uint8 [H, W, 1 or 3], above a line of text: uint8 [H', W', 3]. An image smaller than `tile` is enlarged
    as in `grid`, and text wider than the image is cut off."""
    font, factor = ImageFont.load_default(), enlargement(image.shape[0], image.shape[1], tile)
    picture = _picture(image.repeat(factor, axis=0).repeat(factor, axis=1))
    canvas = Image.new("RGB", (picture.width, picture.height + _LINE), "white")
    canvas.paste(picture)
    ImageDraw.Draw(canvas).text((picture.width / 2, picture.height + _LINE / 2), text, colour, font, anchor="mm")
    return np.asarray(canvas)


def enlargement(height: int, width: int, tile: int = 64) -> int:
    """The factor by which `grid` enlarges images."""
    return max(1, tile // max(height, width))


def show(images: ArrayLike, columns: int | None = None, tile: int = 64, gap: int = 6) -> Image.Image:
    """A picture of one or many images, for display in a notebook.

    Args:
      images: uint8 [N, H, W, C]; one image [H, W, C]; or a table [rows, columns, H, W, C].
      columns: images per row; None: about as many as there are rows. Must be None for a table.
      tile, gap: as in `grid`.

    Returns:
      A `PIL.Image.Image`, grey for C = 1 and RGB for C = 3.

    Raises:
      ValueError: images of a different type or shape, or none at all.
    """
    array = np.asarray(images)
    if array.dtype != np.uint8 or not 3 <= array.ndim <= 5 or array.shape[-1] not in (1, 3) or not array.size:
        raise ValueError(
            f"the images are {array.dtype} of shape {array.shape}; accepted: uint8 of shape (H, W, C), (N, H, W, C) or "
            "(rows, columns, H, W, C) with C of 1 or 3"
        )
    if columns is not None and (array.ndim == 5 or columns < 1):
        accepted = "None, since a table has its own" if array.ndim == 5 else "1 or more"
        raise ValueError(f"columns is {columns}; accepted: {accepted}")
    if array.ndim == 5:
        columns = array.shape[1]
    return _picture(grid(array.reshape(-1, *array.shape[-3:]), columns, tile, gap))


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)


def save_animation(path: str | os.PathLike, frames: np.ndarray, milliseconds: int = 150) -> Path:
    """Saves uint8 [N, H, W, 1 or 3] as a looping GIF or WebP, by the path's suffix; the last frame is shown longer."""
    pictures = [_picture(frame) for frame in frames]
    durations = [milliseconds] * (len(pictures) - 1) + [10 * milliseconds]
    with atomic_path(path) as temporary:
        pictures[0].save(temporary, save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return Path(path)


def to_png(image: np.ndarray) -> bytes:
    """Encodes uint8 [H, W, 1 or 3] as PNG."""
    file = io.BytesIO()
    _picture(image).save(file, "PNG", compress_level=1)
    return file.getvalue()


def save(path: str | os.PathLike, image: np.ndarray, text: Mapping[str, str] | None = None) -> Path:
    """Saves uint8 [H, W, 1 or 3] in the format of the path's suffix; a PNG can have text chunks, by keyword."""
    options: dict[str, Any] = {}
    if text and Path(path).suffix.lower() == ".png":
        options["pnginfo"] = chunks = PngImagePlugin.PngInfo()
        for keyword, value in text.items():
            chunks.add_itxt(keyword, value)
    with atomic_path(path) as temporary:
        _picture(image).save(temporary, **options)
    return Path(path)
