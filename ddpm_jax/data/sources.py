"""Sources of images: tensorflow-datasets, the built-in digits and numbers, a folder, or an array on disk.

A source is a sequence of examples {"image": uint8 [H, W, C], "label": int}, all of the config's size. It is cheap to
open and decodes an image only on access, from any thread or worker process. If captions are requested, the source's
`captions` has them by image.
"""

import functools
import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from absl import logging
from PIL import Image

from ddpm_jax.data.captions import read_captions
from ddpm_jax.data.numbers import NumbersSource
from ddpm_jax.data.pictures import Fit, open_picture
from ddpm_jax.runtime.errors import UserError, nearest

SOURCES = ("digits", "numbers", "tfds", "folder", "array")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
IMAGE_KEYS = ("image", "images", "x", "arr_0")  # accepted names of a .npz's images
_LABEL_KEYS = ("label", "labels", "y", "arr_1")
_CAPTION_KEYS = ("caption", "captions", "text")

Example = dict[str, Any]


class Source(Protocol):
    """A sequence of examples, with the description that a workdir records.

    Attributes:
      shape: (H, W, C) of every image.
      class_names: one per label; empty if the images have no classes.
      captions: one or more for each image; empty if none were requested.
    """

    shape: tuple[int, int, int]
    class_names: tuple[str, ...]

    @property
    def captions(self) -> Sequence[tuple[str, ...]]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def describe(self) -> dict[str, Any]:
        """A JSON-serialisable description with a fingerprint of the examples (of a folder: of file names and sizes)."""
        ...


def _description(source: Source, kind: str, fingerprint: str, **details: Any) -> dict[str, Any]:
    return {
        "source": kind,
        **details,
        "num_images": len(source),
        "shape": list(source.shape),
        "class_names": list(source.class_names),
        "fingerprint": fingerprint,
    }


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
        return _description(self, "array", digest.hexdigest(), path=self.path)


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
        return _description(
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


class TfdsSource:
    """One split of a tensorflow-datasets builder, read from array_record files without TensorFlow."""

    def __init__(self, builder: Any, split: str, fit: Fit, labels: bool, caption: str = ""):
        import tensorflow_datasets as tfds

        self.fit, self.shape = fit, fit.shape
        info = builder.info
        self.full_name, self.split = info.full_name, split
        if "image" not in info.features:
            raise UserError(f"data set {info.name!r} has no 'image' (it has {', '.join(info.features)})")
        if labels and "label" not in info.features:
            raise UserError(f"data set {info.name!r} has no 'label', so model.class_conditional must be False")
        if caption and caption not in info.features:
            raise UserError(
                f"data.caption is {caption!r}, which data set {info.name!r} does not have (it has "
                f"{', '.join(info.features)}).{nearest(caption, info.features)}"
            )
        self.class_names: tuple[str, ...] = tuple(info.features["label"].names) if labels else ()
        self._labels, self._caption = labels, caption
        # Images stay encoded until they are accessed; tensorflow-datasets' own decoder would need OpenCV.
        self._data = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        if not len(self._data):
            raise UserError(f"split {split!r} of data set {info.name!r} is empty")

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Example:
        example = self._data[index]
        picture = open_picture(example["image"], self.fit)
        return {"image": picture, "label": int(example["label"]) if self._labels else 0}

    @functools.cached_property
    def captions(self) -> list[tuple[str, ...]]:
        """Read once from all examples, without decoding their images."""
        return [self._captions(index) for index in range(len(self))] if self._caption else []

    def _captions(self, index: int) -> tuple[str, ...]:
        values = np.atleast_1d(np.asarray(self._data[index][self._caption], object)).tolist()
        texts = [value.decode() if isinstance(value, bytes) else str(value) for value in values]
        texts = [text.strip() for text in texts if text.strip()]
        if not texts:
            raise UserError(
                f"example {index} of {self.full_name!r} has an empty {self._caption!r}; every image needs a caption"
            )
        return tuple(texts)

    def describe(self) -> dict[str, Any]:
        # tensorflow-datasets writes the same bytes for the same version, so name and split identify the examples.
        identity = json.dumps([self.full_name, self.split, len(self), list(self.shape), *filter(None, [self._caption])])
        fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        return _description(self, "tfds", fingerprint, name=self.full_name, split=self.split)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def _prepared_builder(name: str, data_dir: str | None) -> Any:
    """A builder whose array_record files are on disk; prepares them first if necessary."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    with _quiet():
        return _find_or_prepare(name, data_dir)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses tensorflow-datasets' warning that a data set is not prepared yet."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def prepared_name(kind: str, name: str) -> str | None:
    """tensorflow-datasets' name of a source of this kind and name; None if it does not prepare such sources."""
    return {"digits": "digits", "tfds": name}.get(kind)


def tfds_folder(name: str, data_dir: str | None = None) -> tuple[Path, bool]:
    """Where the files of a tensorflow-datasets data set are or would be, and whether they exist.

    Raises:
      UserError: no such data set.
    """
    with _quiet():
        builder = _builder(name, data_dir)
        return Path(builder.data_path), builder.is_prepared()


def _builder(name: str, data_dir: str | None) -> Any:
    import tensorflow_datasets as tfds

    from ddpm_jax.data.builders import Cifar10, Digits

    own: dict[str, Any] = {"digits": Digits, "cifar10": Cifar10}
    options = {"data_dir": data_dir, "file_format": "array_record"}
    try:
        return own[name](**options) if name in own else tfds.builder(name, **options)
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        raise UserError(f"data.name is {name!r}: {_one_line(error)}{_suggestion(name)}") from None


def _find_or_prepare(name: str, data_dir: str | None) -> Any:
    import tensorflow_datasets as tfds

    builder = _builder(name, data_dir)
    if builder.is_prepared():
        return builder
    _check_network(builder)
    try:
        builder.download_and_prepare()
    except ImportError as error:
        raise UserError(
            f"preparing data set {name!r} needs a package that is not installed ({_one_line(error)}); "
            "pip install 'ddpm-jax[tensorflow]' installs TensorFlow, which only this step needs"
        ) from None
    except (AssertionError, OSError, tfds.download.DownloadError) as error:
        raise UserError(f"data set {name!r} could not be prepared: {_one_line(error)}") from None
    return builder


def _suggestion(name: str) -> str:
    import tensorflow_datasets as tfds

    dataset, _, variant = name.partition("/")
    datasets = tfds.list_builders(with_community_datasets=False)
    if variant and dataset in datasets:
        return nearest(variant, tfds.builder_cls(dataset).builder_configs)
    return nearest(dataset, datasets)


def check_network(name: str, data_dir: str | None = None) -> None:
    """UserError, within seconds, if a data set is not prepared and cannot be downloaded from here."""
    with _quiet():
        _check_network(_builder(name, data_dir))


def _check_network(builder: Any) -> None:
    """Fails within seconds, whereas a download would be retried for minutes."""
    import requests

    for url in list(builder.url_infos or {})[:1]:
        try:
            requests.head(url, timeout=5, allow_redirects=True)
        except requests.RequestException:
            host = url.split("/")[2]
            raise UserError(
                f"data set {builder.info.name!r} is not prepared in {builder.data_dir} and {host} cannot be reached; "
                "prepare it on a machine with a network, with --mode=prepare, and copy that folder, or give its path "
                "with --config.data.data_dir"
            ) from None


def open_source(
    kind: str,
    *,
    name: str = "",
    split: str = "train",
    path: str = "",
    data_dir: str | None = None,
    height: int,
    width: int,
    channels: int,
    labels: bool = False,
    captions: bool = False,
    caption: str = "",
    num_digits: int = 2,
    held_out: Sequence[int] = (),
    skipped: Sequence[str] = (),
) -> Source:
    """Opens a source of images.

    Args:
      kind: "digits" or "numbers" (built-in), "tfds" (by `name`), "folder" or "array" (by `path`).
      name: of a tensorflow-datasets data set: "cifar10", "celeb_a_hq/256", "lsun/church_outdoor".
      split: of that data set, including slicing notation: "train[:1000]".
      path: of the folder, or of the .npz or .npy file.
      data_dir: where tensorflow-datasets keeps its files; None: its default.
      height, width, channels: of the returned images.
      labels: whether to return the images' classes.
      captions: whether to return the images' captions.
      caption: the name of the caption feature in a tensorflow-datasets data set.
      num_digits, held_out: for "numbers"; see `NumbersSource`.
      skipped: for a folder, the files to leave out.

    Raises:
      UserError: something is missing or unreadable; it is named.
    """
    if channels not in (1, 3):
        raise UserError(f"data.channels is {channels}; accepted: 1 (grey) or 3 (RGB)")
    fit = Fit(height, width, channels)
    if kind == "folder":
        return FolderSource(path, fit, labels, skipped, captions)
    if kind == "array":
        return ArraySource(path, fit, labels, captions)
    if kind == "numbers":
        if labels:
            raise UserError("data.source 'numbers' has captions but no classes; model.class_conditional must be False")
        return NumbersSource(num_digits, held_out, fit)
    if captions and not (kind == "tfds" and caption):
        what = "data.caption must name the text feature" if kind == "tfds" else "accepted: numbers, tfds, folder, array"
        raise UserError(f"data.source is {kind!r}, but the run needs captions; {what}")
    prepared = prepared_name(kind, name)
    if prepared:
        builder = _prepared_builder(prepared, data_dir)
        try:
            return TfdsSource(builder, split, fit, labels, caption if captions else "")
        except (ValueError, NotImplementedError) as error:
            raise UserError(
                f"split {split!r} of data set {builder.info.full_name!r} cannot be read: {_one_line(error)}"
            ) from None
    raise UserError(f"data.source is {kind!r}; accepted: {', '.join(SOURCES)}")
