"""The embedded data set: scikit-learn's 1,797 handwritten digits of 8x8 pixels, as a tensorflow-datasets builder.

Nothing is downloaded, and TensorFlow is not needed: the builder hands over finished PNGs.
"""

import io
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class Digits(tfds.core.GeneratorBasedBuilder):
    """Handwritten digits from UCI's "Optical Recognition of Handwritten Digits" (test part), as in scikit-learn."""

    name = "digits"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {
        "1.0.0": "The images of sklearn.datasets.load_digits, grey levels 0..16 spread over 0..255."
    }

    # tensorflow-datasets looks for a folder of metadata beside the builder unless told what there is.
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

    def _generate_examples(self):
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = np.round(digits.images * (255.0 / 16.0)).astype(np.uint8)
        for index, (image, label) in enumerate(zip(images, digits.target, strict=True)):
            png = io.BytesIO()
            Image.fromarray(image).save(png, format="png")
            yield index, {"image": png.getvalue(), "label": int(label)}
