"""Images from files on disk: an array, or a folder."""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddpm_jax.data.captions import read_captions
from ddpm_jax.data.pictures import Fit, open_picture
from ddpm_jax.data.source import Example, description
from ddpm_jax.runtime.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
IMAGE_KEYS = ("image", "images", "x", "arr_0")  # accepted names of a .npz's images
_LABEL_KEYS = ("label", "labels", "y", "arr_1")
_CAPTION_KEYS = ("caption", "captions", "text")


class ArraySource:
    """Images of a .npy file, or of a .npz with `image` (or `images`, `x`, `arr_0`) and optionally `label` or
    `caption`, strings [N] or [N, K]; empty strings are ignored."""

    def __init__(self, path: str, fit: Fit, labels: bool, captions: bool = False):
        self.path, self.fit, self.shape = path, fit, fit.shape
        images, label = self._read(Path(path), labels)
        self.captions = _array_captions(Path(path), len(images)) if captions else []
        found = f"{images.dtype} {images.shape}"
        if images.ndim == 3:
            images = images[..., None]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3, 4) or not images.size:
            raise UserError(
                f"data.path {path!r} holds {found}; "
                "accepted: uint8 [N, H, W] or [N, H, W, C] with N >= 1 and 1, 3 or 4 channels"
            )
        self.images = images
        self.labels = label
        self.class_names: tuple[str, ...] = () if label is None else tuple(str(i) for i in range(int(label.max()) + 1))

    def _read(self, path: Path, labels: bool) -> tuple[np.ndarray, np.ndarray | None]:
        if not path.is_file():
            raise UserError(f"data.path {str(path)!r} is not a file; accepted: an .npz or .npy of uint8 images")
        try:
            loaded = np.load(path, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                if labels:
                    raise UserError(f"data.path {str(path)!r} is an array without labels; use an .npz with 'label'")
                return loaded, None
            with loaded:
                key = next((k for k in IMAGE_KEYS if k in loaded), None)
                if key is None:
                    raise UserError(
                        f"data.path {str(path)!r} has the arrays {sorted(loaded)}; "
                        f"accepted names for the images: {', '.join(IMAGE_KEYS)}"
                    )
                images = loaded[key]
                if not labels:
                    return images, None
                label_key = next((k for k in _LABEL_KEYS if k in loaded), None)
                label = None if label_key is None else loaded[label_key]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
            raise UserError(
                f"data.path {str(path)!r} cannot be read as .npz or .npy: it is damaged or of another format"
            ) from None
        if not images.size:
            return images, None  # refused by the caller
        if label is None or label.shape != images.shape[:1] or label.dtype.kind not in "iu" or label.min() < 0:
            found = "no labels" if label is None else f"labels {label.dtype} {label.shape}"
            raise UserError(
                f"data.path {str(path)!r} has {found}; one of {', '.join(_LABEL_KEYS)} must hold "
                f"non-negative integers [{len(images)}]"
            )
        return images, label

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        image = self.images[index]
        if image.shape != self.shape:
            image = self.fit(Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image))
        return {"image": image, "label": 0 if self.labels is None else int(self.labels[index])}

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256(str(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(json.dumps(self.captions).encode() if self.captions else b"")
        if self.labels is not None:
            digest.update(np.ascontiguousarray(self.labels, np.int64).data)
        return description(self, "array", digest.hexdigest(), path=self.path)


def _array_captions(path: Path, count: int) -> list[tuple[str, ...]]:
    """The captions of a readable .npz."""
    with np.load(path, allow_pickle=False) as loaded:
        key = next((k for k in _CAPTION_KEYS if k in getattr(loaded, "files", ())), None)
        values = None if key is None else loaded[key]
    if values is None or values.dtype.kind != "U" or values.ndim not in (1, 2) or len(values) != count:
        found = "no captions" if values is None else f"captions {values.dtype} {values.shape}"
        raise UserError(
            f"data.path {str(path)!r} has {found}; one of {', '.join(_CAPTION_KEYS)} must hold strings [{count}] or "
            f"[{count}, K]"
        )
    captions = [tuple(text.strip() for text in row if text.strip()) for row in values.reshape(count, -1).tolist()]
    if () in captions:
        raise UserError(f"data.path {str(path)!r} has no caption for image {captions.index(())}; every image needs one")
    return captions


class FolderSource:
    """All png, jpg, webp and bmp files under a folder, sorted by path.

    With `labels` the class of an image is its top-level sub-folder; with `captions` its captions are those of
    `read_captions`.
    """

    def __init__(self, path: str, fit: Fit, labels: bool, skipped: Sequence[str] = (), captions: bool = False):
        self.root, self.fit, self.shape = Path(path), fit, fit.shape
        if not path:
            raise UserError("data.path is empty; give the folder with the images: --config.data.path=...")
        if not self.root.is_dir():
            raise UserError(f"data.path {path!r} is not a folder")
        found = (p for p in self.root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        self.skipped = tuple(skipped)
        self.paths = sorted({p.relative_to(self.root).as_posix() for p in found} - set(self.skipped))
        if not self.paths:
            raise UserError(f"data.path {path!r} holds no images; accepted: {', '.join(IMAGE_SUFFIXES)} files")
        self.class_names: tuple[str, ...] = ()
        self.labels: list[int] | None = None
        if labels:
            loose = next((p for p in self.paths if "/" not in p), None)
            if loose:
                raise UserError(f"image {loose!r} is not in a sub-folder of {path!r}, which would name its class")
            folders = [p.split("/", 1)[0] for p in self.paths]
            self.class_names = tuple(sorted(set(folders)))
            self.labels = [self.class_names.index(folder) for folder in folders]
        self.captions = read_captions(self.root, self.paths) if captions else []

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        array = open_picture(self.root / self.paths[index], self.fit)
        return {"image": array, "label": 0 if self.labels is None else self.labels[index]}

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(f"{path}\0{(self.root / path).stat().st_size}\n".encode())
        digest.update(json.dumps(self.captions).encode() if self.captions else b"")
        return description(
            self, "folder", digest.hexdigest(), path=str(self.root.resolve()), skipped=list(self.skipped)
        )

    def find_broken(self, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, str]:
        """Decodes every image once; returns the path and error of each that fails."""

        def check(index: int) -> str | None:
            try:
                self[index]
            except Exception as error:  # Pillow's decoders raise many kinds of errors
                return str(error) or type(error).__name__
            return None

        broken = {}
        with ThreadPoolExecutor() as pool:
            for index, error in enumerate(pool.map(check, range(len(self)))):
                if error:
                    broken[self.paths[index]] = error
                progress(index + 1, len(self))
        return broken
