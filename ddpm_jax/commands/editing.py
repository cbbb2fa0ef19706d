"""Edits of pictures: each mode writes one grid."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddpm_jax.commands.job import IMAGES_A_ROW, Job, Target, calls_bar, check_count, open_flag, parse_numbers
from ddpm_jax.data.pictures import Fit
from ddpm_jax.runtime import images
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.sampling.options import deterministic

_NOISES = 4  # of an interpolation between prompts or classes


def interpolate(job: Job, *, input: Sequence[str], t: Sequence[str], weights: Sequence[str]) -> Path:
    """Interpolates between two pictures: a row for each t, a column for each weight."""
    first, second = job.pictures(input, 2, 2)
    lambdas, target = _lambdas(weights), job.target("interpolate_", ".png")
    T = job.run.schedule.num_timesteps
    chosen = parse_numbers("t", t) or [T * eighths // 8 for eighths in range(1, 8)]
    rows = []
    for t_ in chosen:
        with calls_bar(f"interpolating at t = {t_}") as bar:
            rows.append(job.run.interpolate(first, second, lambdas, t_, job.seed, progress=bar.update, **job.options))
    return _between(target, first, second, rows)


def interpolate_words(job: Job, *, weights: Sequence[str], num_images: int | None) -> Path:
    """Interpolates between two prompts or two classes: a column for each weight; a row's images share their noise."""
    lambdas, target = _lambdas(weights), job.target("interpolate_", ".png")
    with calls_bar("interpolating") as bar:
        rows = job.run.between(num_images or _NOISES, job.seed, lambdas, progress=bar.update, **job.options)
    return _save(target, list(rows))


def interpolate_latents(job: Job, *, input: Sequence[str], weights: Sequence[str]) -> Path:
    """Interpolates between two pictures along the arc between the noises to which DDIM encodes them: one row."""
    first, second = job.pictures(input, 2, 2)
    by_ddim = dataclasses.replace(job, options={**deterministic(), **job.options})  # for the settings stored in the PNG
    lambdas, target = _lambdas(weights), by_ddim.target("interpolate_", ".png")
    with calls_bar("interpolating") as bar:
        row = job.run.interpolate_latents(first, second, lambdas, progress=bar.update, **job.options)
    return _between(target, first, second, [row])


def _lambdas(weights: Sequence[str]) -> list[float]:
    return parse_numbers("weights", weights, float) or np.linspace(0, 1, 11).tolist()


def _between(target: Target, first: np.ndarray, second: np.ndarray, rows: Sequence[np.ndarray]) -> Path:
    """Saves rows with the two pictures themselves at the ends of each."""
    return _save(target, [np.concatenate([first[None], row, second[None]]) for row in rows])


def _save(target: Target, rows: Sequence[np.ndarray]) -> Path:
    """Saves rows, each uint8 [columns, H, W, C], as a grid."""
    return target.save(images.grid(np.concatenate(rows), columns=len(rows[0])))


def _rows(first: np.ndarray, rest: np.ndarray) -> list[np.ndarray]:
    """A row for each of the first pictures: the picture, then its equal share of the rest."""
    return [np.concatenate([f[None], r]) for f, r in zip(first, np.split(rest, len(first)), strict=True)]


def vary(
    job: Job,
    *,
    input: Sequence[str],
    t: Sequence[str],
    num_images: int | None,
    strength: float | None = None,
    batch_size: int | None = None,
) -> Path:
    """Varies each picture: a row for each picture and t, the picture first."""
    pictures, target = job.pictures(input), job.target("vary_", ".png")
    repeated = pictures.repeat(num_images or IMAGES_A_ROW, axis=0)
    if strength is not None and t:
        raise UserError("--t and --strength both set how far the pictures are diffused; accepted: one of the two")
    if strength is not None:
        steps: list[dict[str, Any]] = [{"strength": strength}]
    else:
        steps = [{"t": t_} for t_ in parse_numbers("t", t) or [job.run.schedule.num_timesteps // 2]]
    rows = []
    for how in steps:
        with calls_bar("varying at " + ", ".join(f"{name} = {value}" for name, value in how.items())) as bar:
            options = {"batch_size": batch_size, "progress": bar.update, **how, **job.options}
            rows += _rows(pictures, job.run.vary(repeated, seed=job.seed, **options))
    return _save(target, rows)


def upscale(job: Job, *, input: Sequence[str], num_images: int | None, batch_size: int | None = None) -> Path:
    """Enlarges each picture: a row for each picture."""
    names, count = check_count("input", input, 1), num_images or 1
    pictures, target = job.run.low_resolution_pictures(*names), job.target("upscale_", ".png")
    with calls_bar("enlarging") as bar:
        found = job.run.upscale(
            pictures.repeat(count, axis=0), job.seed, batch_size=batch_size, progress=bar.update, **job.options
        )
    return _save(target, list(found.reshape(len(pictures), count, *found.shape[1:])))


def variations(job: Job, *, input: Sequence[str], num_images: int | None, batch_size: int | None = None) -> Path:
    """Draws other pictures with each picture's image embedding: a row for each picture, the picture first."""
    pictures, target = job.pictures(input), job.target("variations_", ".png")
    repeated = pictures.repeat(num_images or IMAGES_A_ROW, axis=0)
    with calls_bar("sampling") as bar:
        found = job.run.variations(repeated, job.seed, batch_size=batch_size, progress=bar.update, **job.options)
    return _save(target, _rows(pictures, found))


def blend(job: Job, *, input: Sequence[str], weights: Sequence[str]) -> Path:
    """Interpolates between two pictures' image embeddings: one row."""
    first, second = job.pictures(input, 2, 2)
    lambdas, target = _lambdas(weights), job.target("blend_", ".png")
    with calls_bar("sampling") as bar:
        row = job.run.blend(first, second, lambdas, job.seed, progress=bar.update, **job.options)
    return _between(target, first, second, [row])


def text_difference(
    job: Job, *, input: Sequence[str], caption: str | None, target_caption: str | None, weights: Sequence[str]
) -> Path:
    """Moves pictures by the difference of two captions: a row for each picture, the picture first."""
    pictures = job.pictures(input)
    if not (caption and target_caption):
        raise UserError(
            "--mode=text_difference needs --caption, which describes the picture, and --target_caption, which "
            "describes what it becomes"
        )
    turns = parse_numbers("weights", weights, float) or [0.0, 0.125, 0.25, 0.375, 0.5]
    target, rows = job.target("text_difference_", ".png"), []
    with calls_bar("sampling") as bar:
        for picture in pictures:
            found = job.run.text_difference(
                picture, caption, target_caption, turns, job.seed, progress=bar.update, **job.options
            )
            rows.append(np.concatenate([picture[None], found]))
    return _save(target, rows)


def denoise(job: Job, *, input: Sequence[str], t: Sequence[str], batch_size: int | None = None) -> Path:
    """Denoises pictures: a row for each, before and after."""
    pictures, target = job.pictures(input), job.target("denoise_", ".png")
    given = parse_numbers("t", check_count("t", t, 0, 1))
    start = given[0] if given else job.run.estimate_t(pictures)
    if not given and jax.process_index() == 0:
        print(f"estimated noise level: t = {start}")
    with calls_bar("denoising") as bar:
        clean = job.run.denoise(pictures, start, job.seed, batch_size=batch_size, progress=bar.update, **job.options)
    return _save(target, _rows(pictures, clean))


def inpaint(
    job: Job,
    *,
    input: Sequence[str],
    mask: str | None,
    jump: int | None = None,
    times: int | None = None,
    num_images: int | None,
    batch_size: int | None = None,
) -> Path:
    """Repaints each picture where the mask is white: a row for each picture, the masked picture first."""
    pictures = job.pictures(input)
    if not mask:
        raise UserError("--mode=inpaint needs --mask: a picture that is white where --input is to be repainted")
    height, width, _ = job.run.shape
    where = open_flag("mask", mask, Fit(height, width, 1, background="black"))[..., 0] >= 128
    target = job.target("inpaint_", ".png")
    repeated = pictures.repeat(num_images or IMAGES_A_ROW, axis=0)
    with calls_bar("inpainting") as bar:
        painted = job.run.inpaint(
            repeated, where, job.seed, jump=jump, times=times, batch_size=batch_size, progress=bar.update, **job.options
        )
    masked = np.where(where[..., None], np.uint8(127), pictures)
    return _save(target, _rows(masked, painted))


def coarse_to_fine(job: Job, *, num_images: int | None, t: Sequence[str]) -> Path:
    """Samples images that share their x_t: a row for each t."""
    T, target = job.run.schedule.num_timesteps, job.target("coarse_to_fine_", ".png")
    chosen = parse_numbers("t", t) or [T - 1, T * 3 // 4, T // 2, T // 4]
    count = num_images or IMAGES_A_ROW
    rows = []
    for t_ in chosen:
        with calls_bar(f"sampling from x_{t_}") as bar:
            rows.append(job.run.coarse_to_fine(count, t_, job.seed, progress=bar.update, **job.options))
    return _save(target, rows)
