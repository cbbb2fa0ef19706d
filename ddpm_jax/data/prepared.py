"""Data sets that tensorflow-datasets prepares on disk, read without TensorFlow."""

import functools
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from ddpm_jax.data.pictures import Fit, open_picture
from ddpm_jax.data.source import Example, description
from ddpm_jax.runtime.errors import UserError, nearest


def open_prepared(
    name: str, split: str, data_dir: str | None, fit: Fit, labels: bool, caption: str = ""
) -> "TfdsSource":
    """A split of a data set, which is prepared first if necessary; arguments as in `open_source`."""
    builder = _prepared_builder(name, data_dir)
    try:
        return TfdsSource(builder, split, fit, labels, caption)
    except (ValueError, NotImplementedError) as error:
        raise UserError(
            f"split {split!r} of data set {builder.info.full_name!r} cannot be read: {_one_line(error)}"
        ) from None


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
        return description(self, "tfds", fingerprint, name=self.full_name, split=self.split)


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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
