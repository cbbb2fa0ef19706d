"""The input pipeline: images per second from the disk to a step's batches, on synthetic images.

    python benchmarks/input.py

A data set like CIFAR-10's training images is prepared as tensorflow-datasets files; every image is decoded once and
kept, so there are two speeds: for the first epoch, and for later ones, on the host and on the device. Larger data sets
are folders of JPEG files of quality 90, smooth pictures with noise, decoded when needed: as large as the network needs,
or larger. Images per second and core are per second of processor time, over all threads.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from common import print_json
from PIL import Image

from ddpm_jax.data import pipeline
from ddpm_jax.data.pictures import Fit
from ddpm_jax.data.prepared import TfdsSource
from ddpm_jax.data.sources import open_source
from ddpm_jax.runtime import memory, parallel


def picture(rng, height, width):
    """uint8 [height, width, 3]: slowly varying colours with noise; JPEG needs 2 to 3 bits per pixel."""
    slow = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(slow) + rng.normal(0, 8, (height, width, 1)), 0, 255).astype(np.uint8)


def write_jpegs(folder, count, height, width):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(picture(rng, height, width)).save(folder / f"{i:04d}.jpg", quality=90)
    return folder


def prepare_cifar10(folder, count):
    """A prepared builder like cifar10: 32x32 PNGs in array_record files."""
    import tensorflow_datasets as tfds

    from ddpm_jax.data.builders import _png

    tfds.disable_progress_bar()

    class Pictures(tfds.core.GeneratorBasedBuilder):
        """Synthetic pictures with the features of CIFAR-10."""

        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = None

        def _info(self):
            features = {
                "id": tfds.features.Text(),
                "image": tfds.features.Image(shape=(32, 32, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            rng = np.random.default_rng(0)
            for i in range(count):
                yield i, {"id": f"train_{i:05d}", "image": _png(picture(rng, 32, 32)), "label": i % 10}

    builder = Pictures(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()
    return builder


def measure(batches):
    """Images per second, and images per second of processor time, from the first batch to the last."""
    images, wall, cpu = 0, time.perf_counter(), time.process_time()
    for batch in batches:
        images += len(batch["label"])
    return images / (time.perf_counter() - wall), images / (time.process_time() - cpu)


def main(options, root):
    memory.keep_freed_memory()
    rates, rates_per_core = {}, {}

    def tell(name, rate, per_core=None):
        rates[name] = round(rate)
        if per_core:
            rates_per_core[name] = round(per_core)
        print(f"{name:58} {rate:10,.0f} images/s" + (f" {per_core:10,.0f} a core" if per_core else ""), flush=True)

    def batches_of(source, batch_size, epochs, **arguments):
        steps = {"first_step": 0, "last_step": int(epochs * len(source)) // batch_size}
        return pipeline.host_batches(source, seed=0, batch_size=batch_size, **steps, **arguments)

    source = TfdsSource(prepare_cifar10(root / "tfds", options.images), "train", Fit(32, 32, 3), labels=False)
    kept = batches_of(source, 128, epochs=41)
    epoch = len(source) // 128
    tell("32x32 PNG in array_record, first epoch, decoding", *measure(itertools.islice(kept, epoch + 1)))
    tell("20 more epochs, kept: batches of 128 on the host", *measure(itertools.islice(kept, 20 * epoch)))
    sharding = parallel.batch_sharding(parallel.make_mesh())
    on_device = pipeline.prefetch((jax.device_put(batch, sharding) for batch in kept), depth=2)
    tell("and 20 on the device", *measure(on_device))

    for (height, width), count, epochs in (((256, 256), 256, 24), ((512, 512), 256, 4), ((1536, 2048), 32, 8)):
        folder = write_jpegs(root / f"{width}x{height}", count, height, width)
        kibibytes = sum(path.stat().st_size for path in folder.iterdir()) / count / 1024
        source = open_source("folder", path=str(folder), height=256, width=256, channels=3)
        name = f"JPEG {width}x{height} ({kibibytes:.0f} KiB) to 256x256"
        tell(f"{name}, threads", *measure(batches_of(source, 32, epochs, cache_bytes=0)))
        if height == 256:
            rate, _ = measure(batches_of(source, 32, epochs, cache_bytes=0, num_workers=2))
            tell(f"{name}, 2 processes", rate)
    print_json("input", images_per_second=rates, images_per_second_and_core=rates_per_core)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--images", type=int, default=50_000, help="of the set like CIFAR-10")
    with tempfile.TemporaryDirectory() as folder:
        main(arguments.parse_args(), Path(folder))
