"""Images judged against real ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddpm_jax import workdir
from ddpm_jax.commands.job import Job, calls_bar, training_images
from ddpm_jax.data.sources import open_source
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import evaluate as evaluate_lib
from ddpm_jax.evaluation.features import load_inception, train_digits_classifier
from ddpm_jax.run import Run


def evaluate(
    job: Job, *, num_images: int | None, features: str, against: str, generated: str | None, batch_size: int | None
) -> dict[str, Any]:
    """Judges samples against real images, and adds the result to evaluation.json and evaluation.md in the workdir.

    Args:
      job: the run and how it samples.
      num_images: how many to sample; None: 1,000.
      features: "digits", or the file of FID's Inception.
      against: "data", the images that the run learned from, or a folder, a .npz or a .npy file of images.
      generated: such a folder or file, or a folder of shards, in the place of samples.
      batch_size: images at a time; None: the config's.

    Returns:
      The numbers by name.
    """
    run, seed = job.run, job.seed
    judge = train_digits_classifier() if features == "digits" else load_inception(features)
    folder = workdir.check_writable(job.folder)
    size = batch_size or run.config.sample.batch_size
    real = _image_batches(run, "against", against)
    told: dict[str, Any] = {"against": against if against != "data" else f"{run.dataset['source']}, training images"}
    if generated is not None:
        fake = _image_batches(run, "generated", generated)
        told |= {"generated": generated}
    else:
        with calls_bar("sampling") as bar:
            pictures = run.sample(num_images or 1000, seed, batch_size=size, progress=bar.update, **job.options)
        fake = iter([pictures])
        told |= run.settings(seed=seed, batch_size=size, **job.options)
    result = evaluate_lib.compare(judge, real, fake, run.mesh, batch_size=size, seed=seed) | told
    if jax.process_index() == 0:
        evaluate_lib.record(folder, result)
        for name, value in result.items():
            if name in told:
                continue
            print(f"{name}: {value:.5g}" if isinstance(value, float) else f"{name}: {value}")
        print(f"{run.weights}: {folder / evaluate_lib.TABLE}")
    return result


def _image_batches(run: Run, flag: str, name: str) -> Iterator[np.ndarray]:
    """uint8 [n, H, W, C] portions of the training images ("data"), of shards, of a folder, or of an array's file."""
    path = Path(name).expanduser()
    shard_files = sorted(path.glob("images_*.npz")) if path.is_dir() else []
    if shard_files:
        return (np.load(file)["image"] for file in shard_files)
    if name == "data":
        source = training_images(run)
    else:
        height, width, channels = run.shape
        kind = "folder" if path.is_dir() else "array"
        try:
            source = open_source(kind, path=str(path), height=height, width=width, channels=channels)
        except UserError as error:
            raise UserError(f"--{flag}: {error}") from None
    firsts = range(0, len(source), 256)
    return (np.stack([source[i]["image"] for i in range(f, min(f + 256, len(source)))]) for f in firsts)
