"""Writes many images in files of a fixed number each, so that sampling can stop, resume, and be divided."""

import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.files import atomic_path

_NAME = re.compile(r"images_(\d{9})-(\d{9})\.npz")


def _path(folder: Path, first: int, last: int) -> Path:
    return folder / f"images_{first:09d}-{last:09d}.npz"


def files(folder: str | Path) -> list[tuple[Path, int, int]]:
    """(path, first, last) of the shards in a folder; first and last are numbers of images."""
    found = ((path, _NAME.fullmatch(path.name)) for path in sorted(Path(folder).expanduser().glob("images_*.npz")))
    return [(path, int(match[1]), int(match[2])) for path, match in found if match]


def check_part(part: tuple[int, int]) -> None:
    """Raises UserError unless the part is one of 0/N to N-1/N."""
    index, parts = part
    if not 0 <= index < parts:
        raise UserError(f"--part is {index}/{parts}; accepted: 0/N to N-1/N")


def missing(
    folder: Path, first: int, last: int, size: int, settings: Mapping[str, Any]
) -> tuple[list[tuple[int, int]], int]:
    """The missing shards of images first..last, as (first, last), and the number of those that exist.

    Shards are complete and start at multiples of the size, so ranges can grow and overlap. A file whose settings cannot
    be read counts as missing.

    Raises:
      UserError: an invalid range, or files made with different settings or of a different size.
    """
    if not 0 <= first <= last < 10**9:
        raise UserError(f"--images is {first}-{last}; accepted: FIRST-LAST from 0, such as 0-49999")
    if size < 1:
        raise UserError(f"--shard_size is {size}; at least 1 is needed")
    wanted = [(low, low + size - 1) for low in range(first // size * size, last + 1, size)]
    there = set()
    for path, low, high in files(folder):
        try:
            with np.load(path) as file:
                old = dict(json.loads(str(file["settings"])))
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            logging.warning("%s cannot be read (%s); it will be made again", path, type(error).__name__)
            continue
        changed = [
            f"{name}: {old.get(name)!r} -> {value!r}" for name, value in settings.items() if old.get(name) != value
        ]
        if changed:
            raise UserError(
                f"{str(folder)!r} holds images made with different settings ({'; '.join(changed)}); choose another "
                "--out"
            )
        if low % size or high - low + 1 != size:
            raise UserError(
                f"{str(folder)!r} has {path.name}, a shard of a different size; use that size or another --out"
            )
        there.add((low, high))
    return [span for span in wanted if span not in there], len(there.intersection(wanted))


def write(
    folder: Path,
    first: int,
    last: int,
    images: np.ndarray,
    record: Mapping[str, np.ndarray],
    settings: Mapping[str, Any],
) -> Path:
    """Writes one shard atomically; `record` has further arrays with an entry for each image."""
    path = _path(folder, first, last)
    index = np.arange(first, last + 1)
    with atomic_path(path) as temporary:
        arrays: dict[str, Any] = {"image": images, **record, "index": index, "settings": json.dumps(dict(settings))}
        np.savez_compressed(temporary, **arrays)
    return path
