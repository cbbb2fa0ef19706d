"""Evaluation: samples compared with real images, and the likelihood of real images."""

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from ddpm_jax import config as config_lib
from ddpm_jax import report
from ddpm_jax.commands.agreement import clip_scores, numbers_read, open_clip
from ddpm_jax.commands.job import FLAG_OF, Job
from ddpm_jax.commands.sampling import make_shards
from ddpm_jax.data.dataset import training_images
from ddpm_jax.data.spread import spread_captions
from ddpm_jax.evaluation import image_sets, likelihood, plots, results, retrieval
from ddpm_jax.evaluation.comparison import compare
from ddpm_jax.evaluation.features import Features, open_features
from ddpm_jax.evaluation.references import open_summary, write_reference
from ddpm_jax.evaluation.summaries import Summary, shard_summary, share_features, summarize
from ddpm_jax.run import Run
from ddpm_jax.runtime import memory, parallel
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.files import write_text
from ddpm_jax.runtime.progress import ProgressBar
from ddpm_jax.runtime.workdir import CONFIG, check_writable, read_config, read_dataset
from ddpm_jax.sampling.decoder import Pixels
from ddpm_jax.sampling.embeddings import Embeddings
from ddpm_jax.training.clips import load_clip

LIKELIHOODS: dict[str, tuple[Callable[..., Any], str]] = {  # by the flag's value: the function, and its result's name
    "estimate": (likelihood.estimate_bound, "bits/dim of training images, estimated bound"),
    "bound": (likelihood.evaluate_bound, "bits/dim of training images, bound"),
    "flow": (likelihood.evaluate_flow, "bits/dim of training images, bound by the probability flow"),
}
_NUM_IMAGES = 1000
_TERMS, _CURVE, _BOUND = "evaluation_terms.png", "evaluation_rate_distortion.png", "evaluation_bound.json"


def evaluate(
    job: Job,
    *,
    num_images: int | None,
    features: str | None,
    against: str,
    generated: str | None,
    batch_size: int | None,
    shard_size: int,
    likelihood: str,
    likelihood_images: int,
    clip_model: str | None,
    save_reference: str | None,
) -> dict[str, Any]:
    """Compares samples with real images and computes the likelihood of training images; adds the result to
    evaluation.json and evaluation.md in the workdir.

    Samples go to shards in the workdir's samples/, with their features beside them. So an interrupted evaluation
    resumes, and another evaluation of the same samples reuses them.

    Args:
      job: the run and how to sample.
      num_images: how many to sample; None: 1,000.
      features: "digits"; "inception", FID's, downloaded once; or the file of its weights. None: chosen by the images'
        size.
      against: "data", the training images; or a folder, a .npz or .npy file of images, or a reference file in the
        format of pytorch-fid or guided-diffusion.
      generated: such a folder or file, or a folder of shards, instead of samples.
      batch_size: images at a time; None: the config's.
      shard_size: samples in a shard.
      likelihood: "estimate" from a few terms of the variational bound, the whole "bound" with its curves, the bound of
        the probability "flow", or "none".
      likelihood_images: how many training images the likelihood is computed on.
      clip_model: a transformers folder of a `CLIPModel`, or a CLIP's workdir. It scores how well the samples of a
        text-conditional run match their prompts, and training images their captions.
      save_reference: a .npz file for the moments of the real images, which other evaluations can be run --against.

    Returns:
      The numbers by name.
    """
    run = job.run
    if isinstance(run.model.decoder, Embeddings):
        raise UserError("this run draws embeddings, not pictures; accepted: a pipeline of this run and a decoder")
    if generated is not None and (num_images is not None or job.options):
        given = ["num_images"] * (num_images is not None) + [FLAG_OF.get(name, name) for name in job.options]
        raise UserError(f"--generated replaces the samples, so these would do nothing: --{', --'.join(given)}")
    if likelihood not in (*LIKELIHOODS, "none"):
        raise UserError(f"--likelihood is {likelihood!r}; accepted: {', '.join(LIKELIHOODS)}, none")
    if clip_model and generated is not None:
        raise UserError("--clip_model scores samples with their prompts, but --generated has none")
    clip = open_clip(run, clip_model) if clip_model else None
    judge, folder = open_features(features, run.shape), check_writable(job.folder)
    size = batch_size or run.config.sample.batch_size
    told: dict[str, Any] = {}
    agreement: dict[str, float] = {}
    if generated is not None:
        fake = _open("generated", generated, judge, run, size)
    else:
        count, of_data = num_images or _NUM_IMAGES, _with_captions(job, num_images or _NUM_IMAGES)
        told |= run.settings(seed=job.seed, batch_size=size, **of_data.options)
        made = _samples(of_data, told, count, size, shard_size)
        with _bar("judging samples", "shards") as bar:
            share_features(made, judge, run.mesh, batch_size=size, progress=bar.update)
        fake = shard_summary(made, judge, count=count)
        agreement |= numbers_read(job, size)
        agreement |= clip_scores(run, clip, made, count) if clip else {}
    real = _training_summary(run, judge, size) if against == "data" else _open("against", against, judge, run, size)
    result = compare(judge, real, fake, run.mesh, batch_size=size, seed=job.seed) | agreement
    why = _no_likelihood(run)
    if likelihood != "none" and not why:
        result |= _likelihood(job, likelihood, likelihood_images, size, folder)
    elif likelihood != "none":
        absent = [result["not computed"]] if "not computed" in result else []
        result["not computed"] = ", ".join([*absent, why])
    _finish(folder, result, told, real, save_reference)
    return result | told


def _no_likelihood(run: Run) -> str:
    """Why a run has no likelihood of pictures, or ""."""
    if not isinstance(run.model.decoder, Pixels):
        return "bits/dim of pictures, because the run diffuses latents"
    if run.model.given:
        return "bits/dim, because the pictures depend on the output of another stage"
    return ""


def compare_paths(
    workdir: str | Path,
    *,
    features: str | None,
    against: str,
    generated: str,
    batch_size: int | None,
    seed: int = 0,
    save_reference: str | None,
) -> dict[str, Any]:
    """Compares two sets of images without a run, as `evaluate` does; the results go to the folder `workdir`."""
    memory.keep_freed_memory()
    judge, folder, mesh = open_features(features), check_writable(workdir), parallel.make_mesh()
    size = batch_size or 64
    real, fake = (
        _open(flag, path, judge, None, size) for flag, path in (("against", against), ("generated", generated))
    )
    result = compare(judge, real, fake, mesh, batch_size=size, seed=seed)
    _finish(folder, result, {}, real, save_reference)
    return result


def evaluate_clip(workdir: str | Path, *, num_images: int | None, batch_size: int | None) -> dict[str, Any]:
    """How often the CLIP of a run ranks a picture's own caption first; adds the result to evaluation.json and
    evaluation.md in the workdir.

    The pictures are training images and, if these show numbers, pictures of the held-out numbers, too.

    Args:
      workdir: of a run with train.objective "clip".
      num_images: pictures of each kind; None: 1,000.
      batch_size: pictures at a time; None: the config's.

    Returns:
      The numbers by name.
    """
    memory.keep_freed_memory()
    config, folder = read_config(workdir), check_writable(workdir)
    clip, source = load_clip(workdir), training_images(config, read_dataset(workdir) or {})
    asked = retrieval.questions(source, num_images or _NUM_IMAGES)
    size = batch_size or config.sample.batch_size
    with _bar("finding captions") as bar:
        found = retrieval.answers(clip, asked, parallel.make_mesh(), batch_size=size, progress=bar.update)
    result: dict[str, Any] = {f"caption first, {name}": share for name, share in found.items()}
    result["images"] = len(asked[0].pictures)
    _write(folder, result, {})
    return result


def _bar(description: str, of: str = "images") -> ProgressBar:
    return ProgressBar(f"{description}, {of}", 0, enabled=jax.process_index() == 0)


def _open(flag: str, path: str, judge: Features, run: Run | None, batch_size: int) -> Summary:
    shape = judge.shape or (run.shape if run else None)
    mesh = run.mesh if run else parallel.make_mesh()
    try:
        with _bar(f"judging --{flag}") as bar:
            return open_summary(path, judge, mesh, shape=shape, batch_size=batch_size, progress=bar.update)
    except UserError as error:
        raise UserError(f"--{flag}: {error}") from None


def _training_summary(run: Run, judge: Features, batch_size: int) -> Summary:
    images = image_sets.of_source(training_images(run.config, run.dataset))
    with _bar("judging real images") as bar:
        tell: Callable[[int], None] = lambda done: bar.update(done, images.count)  # noqa: E731
        return summarize(judge, images, run.mesh, batch_size=batch_size, source=images.source, progress=tell)


def _with_captions(job: Job, count: int) -> Job:
    """The job with captions of training images as prompts, if the run takes prompts and none was given."""
    run = job.run
    if "shown_captions" not in run.dataset or job.options.get("prompts"):
        return job
    captions = spread_captions(training_images(run.config, run.dataset), count)
    return dataclasses.replace(job, options={**job.options, "prompts": captions})


def _samples(job: Job, settings: Mapping[str, Any], count: int, batch_size: int, shard_size: int) -> Path:
    """The folder with shards of the first `count` samples, of which those that exist are kept."""
    shard_size = min(shard_size, count)
    digest = zlib.crc32(json.dumps([settings, shard_size]).encode())  # samples of other settings have their own folder
    folder = dataclasses.replace(job, told={}).target(f"evaluation_{digest:08x}_", "").path
    make_shards(job, folder, 0, count - 1, shard_size, (0, 1), batch_size)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("samples to judge")
    return folder


def _likelihood(job: Job, kind: str, count: int, batch_size: int, folder: Path) -> dict[str, Any]:
    """Bits/dim of training images under the run."""
    run = job.run
    examples = likelihood.Examples.spread(training_images(run.config, run.dataset), count, run.condition)
    measure, name = LIKELIHOODS[kind]
    with _bar("likelihood", "calls") as bar:
        found = measure(
            run.schedule,
            run.model.model_fn(run.params),
            examples,
            run.mesh,
            output=config_lib.parameterization(run.config).unclipped,
            seed=job.seed,
            batch_size=batch_size,
            progress=bar.update,
        )
    if kind == "bound" and jax.process_index() == 0:
        plots.save_terms(folder / _TERMS, found)
        plots.save_rate_distortion(folder / _CURVE, found)
        write_text(folder / _BOUND, json.dumps(found.to_json()) + "\n")
    return {
        name: float(found.total.mean),
        f"{name}, standard error": float(found.total.standard_error),
        f"{name}, images": examples.num_images,
    }


def _finish(
    folder: Path, result: Mapping[str, Any], told: Mapping[str, Any], real: Summary, save_reference: str | None
) -> None:
    """Writes and prints the results, and the reference if asked for, in process 0."""
    if save_reference and jax.process_index() == 0:
        write_reference(save_reference, real)
    _write(folder, result, told)


def _write(folder: Path, result: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    if jax.process_index() != 0:
        return
    results.record(folder, result, told)
    if (folder / CONFIG).exists():  # a run, not a folder for two sets of images
        report.update(folder)
    for line in results.lines(result):
        print(line)
