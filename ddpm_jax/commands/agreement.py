"""How well the pictures of a run that learned from captions agree with what they were asked to be."""

from collections.abc import Sequence

import jax
import numpy as np

from ddpm_jax.commands.job import Job, calls_bar
from ddpm_jax.data.dataset import training_images
from ddpm_jax.data.numbers import in_words, numbers_of
from ddpm_jax.data.sources import Source
from ddpm_jax.evaluation import agreement, image_sets
from ddpm_jax.interop.transformers import CLIP, read_clip
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.progress import ProgressBar

_NUM_NUMBERS = 256  # samples whose digits are read, of seen numbers and of held-out ones


def judge_agreement(job: Job, clip: str | None, pictures: int, batch_size: int) -> dict[str, float]:
    """Numbers by their names; none for a run without captions.

    Args:
      job: the run and how it samples; without prompts, captions of the training images are its prompts.
      clip: the folder of a `CLIPModel`, for CLIPScore; None: no score.
      pictures: samples that are scored.
      batch_size: images at a time.

    Raises:
      UserError: a clip for a run without captions, or one that cannot be read.
    """
    run = job.run
    knows_captions = "shown_captions" in run.dataset
    if clip and not knows_captions:
        raise UserError("--clip_model scores pictures with their prompts, and this run did not learn from captions")
    if not knows_captions:
        return {}
    found: dict[str, float] = {}
    if run.dataset["source"] == "numbers" and not job.options.get("prompts"):
        found |= _numbers_read(job, batch_size)
    if clip:
        found |= _clip_scores(job, read_clip(clip), pictures, batch_size)
    return found


def captions_of(source: Source, count: int) -> list[str]:
    """The first caption of each of so many images that are evenly spread over a source."""
    return [source.captions[place][0] for place in image_sets.places(source, count).tolist()]


def _sample(job: Job, count: int, prompts: Sequence[str], batch_size: int, what: str) -> np.ndarray:
    options = {**job.options, "prompts": list(prompts)}
    with calls_bar(f"sampling {what}") as bar:
        return job.run.sample(count, job.seed, batch_size=batch_size, progress=bar.update, **options)


def _numbers_read(job: Job, batch_size: int) -> dict[str, float]:
    """The share of samples whose digits are all read right, of numbers that were learned and of those held out."""
    dataset = job.run.dataset
    num_digits, held_out = dataset["num_digits"], set(dataset["held_out"])
    if job.run.shape != (8, 8 * num_digits, 1):
        return {}
    found: dict[str, float] = {}
    for what, numbers in (
        ("captions in the data", [number for number in numbers_of(num_digits) if number not in held_out]),
        ("held-out captions", sorted(held_out)),
    ):
        if numbers:
            pictures = _sample(job, _NUM_NUMBERS, [in_words(number) for number in numbers], batch_size, what)
            right = agreement.read_digits(pictures, mesh=job.run.mesh) == np.resize(numbers, _NUM_NUMBERS)
            found[f"numbers read right, {what}"] = float(np.mean(right))
    return found


def _clip_scores(job: Job, clip: CLIP, count: int, batch_size: int) -> dict[str, float]:
    """The mean score of samples and their prompts, and beside it that of training images and their captions."""
    run = job.run
    source = training_images(run.config, run.dataset)
    real, captions = image_sets.spread(source, count)["image"], captions_of(source, count)
    prompts = job.options.get("prompts") or captions
    samples = _sample(job, count, prompts, batch_size, "for CLIPScore")
    found: dict[str, float] = {}
    for name, pictures, texts in (
        ("CLIPScore", samples, [prompts[i % len(prompts)] for i in range(count)]),
        ("CLIPScore of training images", real, captions),
    ):
        with ProgressBar(f"scoring, {name}", 0, enabled=jax.process_index() == 0) as bar:
            scores = agreement.clip_score(clip, pictures, texts, mesh=run.mesh, progress=bar.update)
        found[name] = float(np.mean(scores))
    return found
