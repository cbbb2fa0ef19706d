"""Fields of the page's forms, checked and converted."""

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from ddpm_jax.data.pictures import Fit, open_picture
from ddpm_jax.runtime import images
from ddpm_jax.runtime.errors import UserError, first_line

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_PIXELS = 16_000_000  # of an uploaded picture; those from phones have 12 million

Form = Mapping[str, Any]


def text(form: Form, name: str, most: int | None = None) -> str:
    value = form.get(name, "")
    if not isinstance(value, str):
        raise UserError(f"{name} is a file; accepted: a value")
    value = value.strip()
    if most is not None and len(value) > most:
        raise UserError(f"{name} has {len(value):,} characters; accepted: at most {most:,}")
    return value


def choice(form: Form, name: str, accepted: Sequence[str], default: str) -> str:
    value = text(form, name)
    if value and value not in accepted:
        raise UserError(f"{name} is {value[:40]!r}; accepted: {', '.join(accepted)}")
    return value or default


def integer(form: Form, name: str, low: int, high: int, default: int | None = None) -> Any:
    value = text(form, name)
    if not value:
        return default
    if not (value.isascii() and value.isdecimal() and len(value) < 12 and low <= int(value) <= high):
        raise UserError(f"{name} is {value[:40]!r}; accepted: a whole number from {low} to {high}")
    return int(value)


def number(form: Form, name: str, low: float, high: float) -> float | None:
    value = text(form, name)
    if not value:
        return None
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not low <= found <= high:
        raise UserError(f"{name} is {value[:40]!r}; accepted: a number from {low:g} to {high:g}")
    return found


def opened(form: Form, name: str, fit: Fit) -> np.ndarray:
    """A file of a form as uint8 [H, W, C]; its header is checked before decoding."""
    upload = form.get(name)
    if upload is None or isinstance(upload, str):
        raise UserError(f"{name} is missing; accepted: a picture")
    file: BinaryIO = upload.file
    try:
        return open_picture(file, fit, FORMATS, MAX_PIXELS)
    except Exception as error:  # Pillow's decoders raise many kinds of errors
        raise UserError(f"{name} cannot be read as a picture: {first_line(error)}") from None


def data_url(picture: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(images.to_png(picture)).decode()
