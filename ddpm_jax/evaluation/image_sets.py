"""Sets of images to evaluate, from a source, a folder, shards or an array; they can be read repeatedly, in portions."""

import dataclasses
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps

from ddpm_jax.data.files import IMAGE_KEYS, FolderSource
from ddpm_jax.data.pictures import Fit, opened
from ddpm_jax.data.source import Source
from ddpm_jax.data.sources import open_source
from ddpm_jax.runtime.errors import UserError, first_line
from ddpm_jax.sampling import shards

PORTION = 256  # images
_BROKEN = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)

Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class ImageSet(Iterable[np.ndarray]):
    """Images in portions, uint8 [n, H, W, C] each.

    Attributes:
      source: where the images come from, as JSON values.
      count: number of images.
      read: starts reading them.
    """

    source: dict[str, Any]
    count: int
    read: Callable[[], Iterator[np.ndarray]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.read()


def of_source(source: Source) -> ImageSet:
    """All images of a source, decoded in threads."""

    def read() -> Iterator[np.ndarray]:
        with ThreadPoolExecutor() as pool:
            for first in range(0, len(source), PORTION):
                numbers = range(first, min(first + PORTION, len(source)))
                yield np.stack(list(pool.map(lambda i: _image(source, i), numbers)))

    return ImageSet(source.describe(), len(source), read)


def _image(source: Source, index: int) -> np.ndarray:
    if not isinstance(source, FolderSource):
        return source[index]["image"]
    try:
        return source[index]["image"]
    except Exception as error:  # Pillow's decoders raise many kinds of errors
        raise UserError(f"{str(source.root / source.paths[index])!r} cannot be read: {first_line(error)}") from None


def open_images(path: str | Path, shape: Shape | None = None) -> ImageSet:
    """Opens the images of a folder of shards or pictures, or of a .npz or .npy file.

    Args:
      path: of the folder or file.
      shape: (H, W, C) to resize them to, like training images; None: they keep their size, which must be the same for
        all, and pictures become RGB.

    Raises:
      UserError: nothing there, no images in it, or, when they are read, one that is broken or of a different size.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _shards(path) if shards.files(path) else of_source(_pictures(path, shape))
    if shape is not None:
        with _Array(path) as array:
            fits = array.shape[1:] == shape
        if not fits:
            height, width, channels = shape
            return of_source(open_source("array", path=str(path), height=height, width=width, channels=channels))
    with _Array(path) as array:
        described = {"source": "array", "path": str(path), "num_images": array.shape[0], "shape": array.shape[1:]}
        return ImageSet(described, array.shape[0], lambda: read_array(path))


class _SameSize(Fit):
    """Refuses pictures of a different size instead of scaling them."""

    def __call__(self, image: Image.Image) -> np.ndarray:
        if image.size != (self.width, self.height):
            raise ValueError(
                f"it has {image.width}x{image.height} pixels, but the folder's first picture {self.width}x{self.height}"
            )
        return super().__call__(image)


def _pictures(path: Path, shape: Shape | None) -> FolderSource:
    if shape is not None:
        return FolderSource(str(path), Fit(*shape), labels=False)
    first = FolderSource(str(path), Fit(1, 1, 3), labels=False).paths[0]
    try:
        with opened(path / first) as image:
            width, height = ImageOps.exif_transpose(image).size
    except Exception as error:  # Pillow's decoders raise many kinds of errors
        raise UserError(f"{str(path / first)!r} cannot be read: {first_line(error)}") from None
    return FolderSource(str(path), _SameSize(height, width, 3), labels=False)


def _shards(folder: Path) -> ImageSet:
    found = shards.files(folder)
    count = sum(last - first + 1 for _, first, last in found)
    read = lambda: (portion for path, _, _ in found for portion in read_array(path))  # noqa: E731
    return ImageSet({"source": "shards", "path": str(folder), "num_images": count}, count, read)


def read_array(path: str | Path) -> Iterator[np.ndarray]:
    """Reads the images of a .npz or .npy file in portions, with one portion in memory at a time.

    The array in a .npz must have one of the names in `ddpm_jax.data.files.IMAGE_KEYS`.

    Raises:
      UserError: a file that is missing or truncated, or contains something other than uint8 [N, H, W] or [N, H, W, C].
    """
    with _Array(Path(path)) as array:
        yield from array


class _Array:
    """The array of images in a .npz or .npy file, opened for sequential reading."""

    def __init__(self, path: Path):
        self._path = path
        if not path.is_file():
            raise UserError(f"{str(path)!r} does not exist; accepted: a folder, or a .npz or .npy file of images")

    def __enter__(self) -> "_Array":
        try:
            self._archive = zipfile.ZipFile(self._path) if self._path.suffix == ".npz" else None
            self._file = self._path.open("rb") if self._archive is None else self._member(self._archive)
            version = np.lib.format.read_magic(self._file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = header(self._file)
        except _BROKEN as error:
            raise self._broken(error) from None
        if dtype != np.uint8 or fortran or len(shape) not in (3, 4) or 0 in shape:
            raise UserError(
                f"{str(self._path)!r} holds {dtype} {shape}; accepted: uint8 [N, H, W] or [N, H, W, C], from 0 to 255 "
                "as in image files, N at least 1"
            )
        self.shape = (*shape, 1) if len(shape) == 3 else shape
        return self

    def _member(self, archive: zipfile.ZipFile) -> IO[bytes]:
        name = next((key for key in IMAGE_KEYS if f"{key}.npy" in archive.namelist()), None)
        if name is None:
            names = [entry.removesuffix(".npy") for entry in archive.namelist()]
            raise UserError(
                f"{str(self._path)!r} has the arrays {names}; accepted names for images: {', '.join(IMAGE_KEYS)}"
            )
        return archive.open(f"{name}.npy")

    def __iter__(self) -> Iterator[np.ndarray]:
        for first in range(0, self.shape[0], PORTION):
            shape = (min(PORTION, self.shape[0] - first), *self.shape[1:])
            try:
                data = self._file.read(int(np.prod(shape)))
                yield np.frombuffer(data, np.uint8).reshape(shape)
            except _BROKEN as error:
                raise self._broken(error) from None

    def __exit__(self, *_: Any) -> None:
        self._file.close()
        if self._archive:
            self._archive.close()

    def _broken(self, error: Exception) -> UserError:
        return UserError(f"{str(self._path)!r} cannot be read as .npz or .npy: {first_line(error)}")
