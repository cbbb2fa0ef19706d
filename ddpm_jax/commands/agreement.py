"""How well the pictures of a text-conditional run match their prompts."""

from pathlib import Path

import jax
import numpy as np

from ddpm_jax.commands.job import Job, calls_bar
from ddpm_jax.data import digits
from ddpm_jax.data.dataset import training_images
from ddpm_jax.data.numbers import in_words, numbers_of
from ddpm_jax.data.spread import spread, spread_captions
from ddpm_jax.evaluation import agreement
from ddpm_jax.interop.transformers import CLIP
from ddpm_jax.run import Run
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.progress import ProgressBar
from ddpm_jax.sampling import shards
from ddpm_jax.training.clips import load_clip

_NUM_NUMBERS = 256  # samples whose digits are read, for numbers in the training set and for held-out ones


def numbers_read(job: Job, batch_size: int) -> dict[str, float]:
    """The share of samples whose digits are all read correctly, for numbers in the training set and for held-out ones,
    by name.

    It is empty for a run on other images or digits of a different size, and if prompts were given.
    """
    dataset, run = job.run.dataset, job.run
    if dataset["source"] != "numbers" or "shown_captions" not in dataset or job.options.get("prompts"):
        return {}
    num_digits, held_out = dataset["num_digits"], set(dataset["held_out"])
    if digits.side_by_side(run.shape) != num_digits:
        return {}
    found: dict[str, float] = {}
    for what, numbers in (
        ("captions in the data", [number for number in numbers_of(num_digits) if number not in held_out]),
        ("held-out captions", sorted(held_out)),
    ):
        if numbers:
            options = {**job.options, "prompts": [in_words(number) for number in numbers]}
            with calls_bar(f"sampling {what}") as bar:
                pictures = run.sample(_NUM_NUMBERS, job.seed, batch_size=batch_size, progress=bar.update, **options)
            right = agreement.read_digits(pictures, mesh=run.mesh) == np.resize(numbers, _NUM_NUMBERS)
            found[f"numbers read right, {what}"] = float(np.mean(right))
    return found


def open_clip(run: Run, folder: str) -> CLIP:
    """The CLIP of --clip_model; UserError if it cannot be read, or for a run trained without captions."""
    if "shown_captions" not in run.dataset:
        raise UserError("--clip_model scores pictures with their prompts, but this run was trained without captions")
    return load_clip(folder)


def clip_scores(run: Run, clip: CLIP, folder: Path, count: int) -> dict[str, float]:
    """The mean CLIPScore of the first `count` samples in a folder of shards and their prompts, and of as many training
    images and their captions, by name."""
    pictures: list[np.ndarray] = []
    prompts: list[str] = []
    for path, _, _ in shards.files(folder):
        with np.load(path) as file:
            pictures.append(file["image"])
            prompts += file["prompt"].tolist()
    source = training_images(run.config, run.dataset)
    found: dict[str, float] = {}
    for name, images, texts in (
        ("CLIPScore", np.concatenate(pictures)[:count], prompts[:count]),
        ("CLIPScore of training images", spread(source, count)["image"], spread_captions(source, count)),
    ):
        with ProgressBar(f"scoring, {name}", 0, enabled=jax.process_index() == 0) as bar:
            scores = agreement.clip_score(clip, images, texts, mesh=run.mesh, progress=bar.update)
        found[name] = float(np.mean(scores))
    return found
