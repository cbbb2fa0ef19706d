"""Sampling, and a closer look at how the samples come about."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddpm_jax.commands.job import IMAGES_A_ROW, Job, calls_bar, parse_range
from ddpm_jax.data import neighbours as neighbours_lib
from ddpm_jax.data.dataset import training_images
from ddpm_jax.runtime import images
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.files import atomic_path, new_folder
from ddpm_jax.runtime.progress import ProgressBar, part_of
from ddpm_jax.sampling import shards

_STAGES = 10
_MOST_ROWS = 64  # of a grid with a row for each class or prompt


def sample(job: Job, *, num_images: int | None, batch_size: int | None, output: str) -> Path:
    """Samples from a run and writes the images.

    Args:
      job: the run and how to sample. A grid has a row for each given class or prompt.
      num_images, batch_size: as in `Run.sample`; None: the config's, or 8 images for each given class or prompt. More
        than 64 classes or prompts get one image each, and the grid no rows of their own.
      output: "grid" (one PNG), "png" (a folder of PNGs) or "npz" (`image` uint8 [N, H, W, C] with `label` int32 [N], 0
        without classes, or `prompt`, strings [N]).

    Returns:
      The file or folder with the images.
    """
    run, condition = job.run, job.run.request(**job.options).condition
    target = job.target("", {"grid": ".png", "png": "", "npz": ".npz"}[output])
    if output == "png":
        job.check_pictures()
    if output == "png" and target.path.exists() and (not target.path.is_dir() or any(target.path.iterdir())):
        raise UserError(f"--out {str(target.path)!r} exists and is not empty; choose a new one")
    if num_images is None:
        a_row = IMAGES_A_ROW if condition.rows <= _MOST_ROWS else 1
        num_images = a_row * condition.rows or run.config.sample.num_images
    with calls_bar("sampling") as bar:
        pictures = run.sample(num_images, job.seed, batch_size=batch_size, progress=bar.update, **job.options)

    def write(path: Path) -> None:
        if output == "grid":
            by_row = 0 < condition.rows <= _MOST_ROWS
            images.save(path, _grid_by_row(pictures, condition.rows) if by_row else images.grid(pictures), job.text())
        elif output == "png":
            with new_folder(path, "--out") as temporary:
                for index, picture in enumerate(pictures):
                    images.save(temporary / f"{index:06d}.png", picture, job.text(index))
        else:
            with atomic_path(path) as temporary:
                arrays: dict[str, Any] = {"image": pictures, **condition.record(np.arange(num_images))}
                np.savez_compressed(temporary, **arrays)

    return target.done(write)


def _grid_by_row(pictures: np.ndarray, rows: int) -> np.ndarray:
    """A grid with a row for each class or prompt, whose images alternate; a row with fewer images ends in white."""
    columns = -(-len(pictures) // rows)
    padded = np.full((columns * rows, *pictures.shape[1:]), 255, np.uint8)
    padded[: len(pictures)] = pictures
    return images.grid(np.concatenate([padded[row::rows] for row in range(rows)]), columns=columns)


def sample_shards(job: Job, *, images: str, shard_size: int, part: str, batch_size: int | None) -> Path:
    """Images of a seed as .npz files of shard_size; existing files are kept.

    Args:
      job: the run and how to sample.
      images: "FIRST-LAST", the numbers of the first and the last image.
      shard_size: images in a file.
      part: "I/N": this process makes every N-th shard from the I-th on, so that N processes share the work.
      batch_size: images at a time; None: the config's.

    Returns:
      The folder. Each file has `image` uint8 [N, H, W, C], `label` int32 [N] or `prompt`, strings [N], `index` int64
      [N] and `settings`, JSON.
    """
    first, last = parse_range("images", images, "-")
    target = job.target("shards_", "")
    make_shards(job, target.path, first, last, shard_size, parse_range("part", part, "/"), batch_size)
    return target.done(lambda path: None)


def make_shards(
    job: Job, folder: Path, first: int, last: int, shard_size: int, part: tuple[int, int], batch_size: int | None
) -> None:
    """Makes those shards of the images first..last that the folder lacks; see `sample_shards`."""
    run, condition = job.run, job.run.request(**job.options).condition
    settings = run.settings(seed=job.seed, batch_size=batch_size, **job.options)
    shards.check_part(part)
    todo, there = shards.missing(folder, first, last, shard_size, settings)
    mine = [span for span in todo if span[0] // shard_size % part[1] == part[0]]
    if there and jax.process_index() == 0:
        print(f"shards that exist already: {there}")
    with calls_bar("sampling") as bar:
        for done, (low, high) in enumerate(mine):
            progress = part_of(bar.update, done, len(mine))
            indices = range(low, high + 1)
            pictures = run.sample(
                seed=job.seed, indices=indices, batch_size=batch_size, progress=progress, **job.options
            )
            if jax.process_index() == 0:
                shards.write(folder, low, high, pictures, condition.record(np.arange(low, high + 1)), settings)


# A closer look.


def progressive(job: Job, *, num_images: int | None, num_stages: int | None, of: str) -> tuple[Path, Path]:
    """The way from noise to image: a PNG with a row for each image, and the same as an animated GIF."""
    target = job.target("progressive_", ".png")
    calls = job.run.calls(**job.options)
    if num_stages is not None and num_stages > calls:
        raise UserError(f"--num_stages is {num_stages}; accepted: 2 to {calls}, the number of network calls")
    stages_wanted = min(_STAGES, calls) if num_stages is None else num_stages
    with calls_bar("sampling") as bar:
        count = num_images or IMAGES_A_ROW
        stages = job.run.progressive(
            count, job.seed, num_stages=stages_wanted, of=of, progress=bar.update, **job.options
        )
    animation = target.path.with_suffix(".gif")

    def write(path: Path) -> None:
        strip = images.grid(stages.swapaxes(0, 1).reshape(-1, *job.run.shape), columns=stages_wanted)
        images.save(path, strip, job.text())
        images.save_animation(animation, np.stack([images.grid(stage) for stage in stages]))

    return target.done(write), animation


def neighbours(job: Job, *, num_images: int | None, num_neighbours: int) -> Path:
    """Samples and their nearest training images, which show memorisation: a row for each sample, the sample first."""
    run = job.run
    source = training_images(run.config, run.dataset)
    target = job.target("neighbours_", ".png")
    with calls_bar("sampling") as bar:
        pictures = run.sample(num_images or IMAGES_A_ROW, job.seed, progress=bar.update, **job.options)
    with ProgressBar("comparing", len(source), enabled=jax.process_index() == 0) as bar:
        mirrored = run.config.data.flip
        found, distances = neighbours_lib.nearest(pictures, source, num_neighbours, bar.update, mirrored=mirrored)
    rows = [np.stack([p, *(source[int(i)]["image"] for i in row)]) for p, row in zip(pictures, found, strict=True)]
    if jax.process_index() == 0:
        closest = distances[:, 0]
        print(f"root mean square distance to the nearest image: {closest.min():.1f} to {closest.max():.1f} of 255")
    return target.save(images.grid(np.concatenate(rows), columns=found.shape[1] + 1))
