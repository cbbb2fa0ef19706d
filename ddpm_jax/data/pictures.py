"""Reads pictures from files and resizes them to the size that a network takes."""

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

# A JPEG is decoded to at least this many times the final size: below that, its decoder's averaging would be visible.
_DRAFT = 2


@dataclasses.dataclass(frozen=True)
class Fit:
    """The size of all images: they are scaled to cover it, then cropped at the centre.

    Attributes:
      height, width: in pixels.
      channels: 1 (grey) or 3 (RGB).
      background: the colour of transparent parts.
    """

    height: int
    width: int
    channels: int
    background: str = "white"

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.height, self.width, self.channels)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Converts a PIL image to uint8 [H, W, C]."""
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, self.background), image)
        mode = "L" if self.channels == 1 else "RGB"
        image = image if image.mode == mode else image.convert(mode)  # a needless convert would copy it
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
    """Opens a file as a Pillow image that is not decoded yet.

    Args:
      file: a path or a file object.
      formats: Pillow's names of the accepted formats; None: all.

    Raises:
      ValueError: a file that is not a picture; Pillow's own message would show a Python object.
      OSError: it cannot be read.
    """
    try:
        image = Image.open(file, formats=formats)
    except UnidentifiedImageError:
        known = f"not one of {', '.join(formats)}" if formats else "not a picture of a known format"
        raise ValueError(f"it is {known}, or damaged") from None
    with image:
        yield image


def open_picture(
    file: bytes | str | Path | BinaryIO,
    fit: Fit,
    formats: tuple[str, ...] | None = None,
    max_pixels: int | None = None,
) -> np.ndarray:
    """Reads a picture file as uint8 [H, W, C], rotated according to its EXIF data.

    Args:
      file: a path, bytes or a file object.
      fit: the size to resize it to.
      formats: Pillow's names of the accepted formats; None: all.
      max_pixels: the most pixels accepted; None: Pillow's limit.

    Raises:
      ValueError: not a picture, or more pixels than accepted, which is checked before decoding.
      Exception: whatever Pillow raises for a broken file.
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
    """Decodes an RGB or grey JPEG with libjpeg-turbo directly: the same bits as Pillow's, but faster.

    Returns None for what is left to Pillow: other formats and colours, pictures that may be rotated, and large or
    damaged ones.
    """
    head = data[: 1 << 16]
    if not head.startswith(b"\xff\xd8") or b"Exif" in head or b"Orientation" in head:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "Gray") or height * width > limit:
            return None
        # A picture whose sides are much larger than needed is decoded at a half, a quarter or an eighth of its size.
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
