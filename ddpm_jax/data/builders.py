"""Two tensorflow-datasets builders that work without TensorFlow: they yield images already encoded as PNG."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.image_classification import cifar

from ddpm_jax.data import digits


def _png(image: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, format="png")
    return data.getvalue()


class Digits(tfds.core.GeneratorBasedBuilder):
    """The embedded data set: handwritten digits of 8x8 pixels from UCI's "Optical
    Recognition of Handwritten Digits" (test part), as in scikit-learn."""

    name = "digits"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {
        "1.0.0": "The images of sklearn.datasets.load_digits, grey levels 0..16 spread over 0..255."
    }

    # Without these, tensorflow-datasets looks for a folder of metadata beside the builder.
    pkg_dir_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (image, label) in enumerate(zip(*digits.load(), strict=True)):
            yield index, {"image": _png(image[..., 0]), "label": int(label)}


with tfds.core.registered.skip_registration():

    class Cifar10(cifar.Cifar10):
        """tensorflow-datasets' CIFAR-10, with its name, version, order and checksum, so that either builder can read
        what the other prepared. It only unpacks the archive and encodes the images without TensorFlow."""

        name = "cifar10"
        pkg_dir_path = Path(cifar.__file__).parent
        url_infos = cifar.Cifar10.url_infos  # sizes and checksums of the downloads

        def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
            archive = dl_manager.download(self._cifar_info.url)
            names = self._read(archive, self._cifar_info.label_files[0]).decode().split("\n")
            self.info.features["label"].names = [name for name in names if name]
            return {
                "train": self._generate_examples("train_", archive, self._cifar_info.train_files),
                "test": self._generate_examples("test_", archive, self._cifar_info.test_files),
            }

        def _read(self, archive: Any, name: str) -> bytes:
            with tarfile.open(archive) as tar:
                member = tar.extractfile(self._cifar_info.prefix + name)
                assert member is not None
                return member.read()

        def _generate_examples(
            self, prefix: str, archive: Any, names: list[str]
        ) -> Iterator[tuple[int, dict[str, Any]]]:
            index = 0
            for name in names:
                records = np.frombuffer(self._read(archive, name), np.uint8).reshape(-1, 1 + 3 * 32 * 32)
                images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                for label, image in zip(records[:, 0], images, strict=True):
                    yield index, {"id": f"{prefix}{index:05d}", "image": _png(image), "label": int(label)}
                    index += 1
