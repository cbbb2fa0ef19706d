"""Pictures from their files, brought to the size that a network takes."""

import dataclasses
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

# A JPEG is decoded no smaller than so many times the size wanted: below that, what its decoder averages would show.
_DRAFT = 2


@dataclasses.dataclass(frozen=True)
class Fit:
    """The size every image is brought to: scaled to cover it, then cropped at the centre.

    Attributes:
      height, width: in pixels.
      channels: 1 (grey) or 3 (RGB).
      background: what transparent parts become.
    """

    height: int
    width: int
    channels: int
    background: str = "white"

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.height, self.width, self.channels)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """uint8 [H, W, C] of a PIL image."""
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, self.background), image)
        mode = "L" if self.channels == 1 else "RGB"
        image = image if image.mode == mode else image.convert(mode)  # which would copy it
        if image.size != (self.width, self.height):
            scale = max(self.width / image.width, self.height / image.height)
            width = max(self.width, round(image.width * scale))
            height = max(self.height, round(image.height * scale))
            image = image.resize((width, height), Image.Resampling.LANCZOS)
            left, top = (width - self.width) // 2, (height - self.height) // 2
            image = image.crop((left, top, left + self.width, top + self.height))
        return np.asarray(image, np.uint8).reshape(self.shape)


@contextmanager
def opened(file: str | Path | BinaryIO, formats: tuple[str, ...] | None = None) -> Iterator[Image.Image]:
    """Pillow's image of a file, not decoded yet.

    Args:
      file: its path, or itself.
      formats: Pillow's names of those that are accepted; None: all.

    Raises:
      ValueError: a file that is no picture; Pillow's own sentence would show a Python object.
      OSError: it cannot be read.
    """
    try:
        image = Image.open(file, formats=formats)
    except UnidentifiedImageError:
        known = f"none of {', '.join(formats)}" if formats else "no picture of a known format"
        raise ValueError(f"it is {known}, or damaged") from None
    with image:
        yield image


def open_picture(
    file: bytes | str | Path | BinaryIO,
    fit: Fit,
    formats: tuple[str, ...] | None = None,
    max_pixels: int | None = None,
) -> np.ndarray:
    """uint8 [H, W, C] of a picture's file, turned as its EXIF data say.

    Args:
      file: its path, its bytes, or itself.
      fit: the size it is brought to.
      formats: Pillow's names of those that are accepted; None: all.
      max_pixels: None: Pillow's limit.

    Raises:
      ValueError: no picture, or more pixels than that, said before any is decoded.
      Exception: whatever Pillow raises if it is broken.
    """
    if isinstance(file, str | Path):
        data = Path(file).read_bytes()
    elif isinstance(file, bytes):
        data = file
    else:
        file.seek(0)  # it may have been read before
        data = file.read()
    limit = max_pixels or Image.MAX_IMAGE_PIXELS or math.inf
    if formats is None or "JPEG" in formats:
        plain = _plain_jpeg(data, fit, limit)
        if plain is not None:
            return plain
    with opened(io.BytesIO(data), formats) as image:
        if image.width * image.height > limit:
            whose = "the limit" if max_pixels else "Pillow's limit"
            raise ValueError(f"{image.width}x{image.height} is more than {whose} of {limit} pixels")
        image.draft(image.mode, (_DRAFT * max(fit.shape[:2]),) * 2)
        ImageOps.exif_transpose(image, in_place=True)
        return fit(image)


def _plain_jpeg(data: bytes, fit: Fit, limit: float) -> np.ndarray | None:
    """A JPEG in RGB or grey by libjpeg-turbo itself: Pillow's very bits, sooner.

    None for what Pillow shall see to: other formats and colours, pictures that may be turned, large or damaged ones.
    """
    head = data[: 1 << 16]
    if not head.startswith(b"\xff\xd8") or b"Exif" in head or b"Orientation" in head:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "Gray") or height * width > limit:
            return None
        # One much larger than wanted, on either side, is decoded at a half, a quarter or an eighth of its size.
        most = min(height, width) // (_DRAFT * max(fit.shape[:2]))
        part = next((part for part in (8, 4, 2) if part <= most), 1)
        pixels = simplejpeg.decode_jpeg(
            data, "GRAY" if colours == "Gray" else "RGB", min_height=-(-height // part), min_width=-(-width // part)
        )
    except ValueError:
        return None
    if pixels.shape == fit.shape:
        return pixels
    return fit(Image.fromarray(pixels.squeeze(-1) if colours == "Gray" else pixels))
