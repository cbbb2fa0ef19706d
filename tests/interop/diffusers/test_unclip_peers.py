"""Karlo's pipelines, narrow, against diffusers' with the same noise."""

import functools
import itertools
import types

import numpy as np
import pytest
import unclips
from theirs import to_numpy

from ddpm_jax.diffusion.schedules import make_betas
from ddpm_jax.interop import workdirs
from ddpm_jax.pipeline import load
from ddpm_jax.runtime import images
from ddpm_jax.sampling.given import Inputs

WHY = "diffusers and PyTorch are not installed (pip install -e '.[peers]')"
torch = pytest.importorskip("torch", reason=WHY)
pytest.importorskip("diffusers", reason=WHY)
pytestmark = pytest.mark.peers

PROMPTS = ["A red Bicycle!", "the sea"]
STEPS = (6, 5, 4)


@pytest.fixture(scope="module")
def karlo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("karlo")
    theirs = unclips.save_unclip(folder / "theirs")
    compute_in_float64(theirs)
    return theirs, load(workdirs.import_weights(str(folder / "theirs"), folder / "run"))


@pytest.fixture(scope="module")
def variations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variations")
    theirs = unclips.save_unclip(folder / "theirs", of_pictures=True)
    compute_in_float64(theirs)
    return theirs, load(workdirs.import_weights(str(folder / "theirs"), folder / "run"))


def patch(monkeypatch, stages, first, module):
    """Gives diffusers' pipeline in `module` the noise of these stages, which start at number `first` of our pipeline.

    The small picture is rounded to 8 bits, as between our stages; the returned list gets the unrounded one.
    """
    from diffusers.schedulers import scheduling_unclip

    purposes = ("image", "image of stage 2", "image of stage 3")[first:]
    steps = STEPS[len(STEPS) - len(stages) :]
    turns = [
        itertools.islice(unclips.noises(stage, 2, purpose), count)  # none after the last call
        for stage, purpose, count in zip(stages, purposes, steps, strict=False)
    ]
    unclips.feed(monkeypatch, itertools.chain(*turns), module, scheduling_unclip)
    small, interpolate = [], torch.nn.functional.interpolate

    @functools.wraps(interpolate)
    def rounded(image, *args, **kwargs):
        small.append(to_numpy(image))
        return interpolate(((image + 1) * 127.5).round() / 127.5 - 1, *args, **kwargs)

    functions = types.SimpleNamespace(interpolate=rounded, pad=torch.nn.functional.pad)
    monkeypatch.setattr(module, "F", functions)
    return small


def compute_in_float64(theirs):
    """The coefficients of the steps, as ours: in float32, 1 - abar_t / abar_s rounds away what is left at t = 999."""
    for name in ("prior", "decoder", "super_res"):
        if scheduler := getattr(theirs, f"{name}_scheduler", None):
            scheduler.betas = torch.tensor(make_betas("cosine", 1000))
            scheduler.alphas = 1 - scheduler.betas
            scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, 0)


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def test_config(karlo):
    _, run = karlo
    prior, decoder, larger = (stage.config for stage in run.stages)
    assert [config.sample.num_steps for config in (prior, decoder, larger)] == [25, 25, 7]
    assert [config.sample.guidance_scale for config in (prior, decoder, larger)] == [4.0, 8.0, 1.0]
    assert (prior.diffusion.prediction, prior.diffusion.clip_range) == ("x_0", 5.0)
    assert [stage.shape for stage in run.stages] == [(1, 1, 16), (8, 8, 3), (16, 16, 3)]


def test_text_to_image(measure, monkeypatch, karlo):
    import diffusers.pipelines.deprecated.unclip.pipeline_unclip as module

    theirs, run = karlo
    prior, decoder, larger = run.stages
    small, embeddings, process = patch(monkeypatch, run.stages, 0, module), [], theirs.prior.post_process_latents

    def keep(latents):
        embeddings.append(process(latents))
        return embeddings[-1]

    monkeypatch.setattr(theirs.prior, "post_process_latents", keep)
    names = (f"{part}_num_inference_steps" for part in ("prior", "decoder", "super_res"))
    expected = theirs(PROMPTS, **dict(zip(names, STEPS, strict=True)), output_type="np").images

    said, against = {"prompts": PROMPTS}, "diffusers' `UnCLIPPipeline`"
    found = unclips.drawn(prior, 2, num_steps=STEPS[0], **said)
    error = relative(found[:, 0, 0], embeddings[0].detach().numpy())
    measure("image embeddings of Karlo's prior, narrow", against, error, 1e-5, "relative")
    picture = unclips.drawn(decoder, 2, Inputs(found), "image of stage 2", num_steps=STEPS[1], **said)
    error = relative(np.clip(picture, -1, 1), small[0])
    measure("small pictures of Karlo, narrow", against, error, 2e-4, "relative")
    given = Inputs(images.to_uint8(picture))
    picture = unclips.drawn(larger, 2, given, "image of stage 3", num_steps=STEPS[2])
    error = relative(np.clip(picture / 2 + 0.5, 0, 1), expected)
    measure("pictures of Karlo, narrow", against, error, 5e-5, "relative")
    whole = run.sample(2, num_steps=list(STEPS), **said)
    assert np.abs(whole - np.round(expected * 255)).max() <= 1


def test_variations(measure, monkeypatch, variations):
    import diffusers.pipelines.deprecated.unclip.pipeline_unclip_image_variation as module
    from PIL import Image

    theirs, run = variations
    pictures = np.random.default_rng(0).integers(0, 256, (2, 20, 16, 3), np.uint8)
    patch(monkeypatch, run.stages, 0, module)
    options = {"decoder_num_inference_steps": STEPS[1], "super_res_num_inference_steps": STEPS[2]}
    pil = [Image.fromarray(picture) for picture in pictures]
    with torch.no_grad():
        expected = theirs._encode_image(pil, "cpu", 1).numpy()
    against = "diffusers' `UnCLIPImageVariationPipeline`"
    error = np.abs(run.embedder.of_pictures(pictures) - expected).max()
    measure("image embeddings of pictures, Karlo's variations", against, error, 1e-5)
    expected = theirs(pil, output_type="np", **options).images
    found = run.variations(pictures, num_steps=list(STEPS[1:]))
    error = np.abs(found - np.round(expected * 255)).max()
    measure("variations by Karlo, narrow", against, error, 1, "of 255")
