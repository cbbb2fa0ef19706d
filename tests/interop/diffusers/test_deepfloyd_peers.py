"""Both stages of a narrow DeepFloyd IF against diffusers' pipelines with the same noise."""

import itertools

import jax
import numpy as np
import pytest
import unclips
from theirs import to_torch

from ddpm_jax import pipeline as pipeline_lib
from ddpm_jax.diffusion.gaussian import normal
from ddpm_jax.interop import workdirs
from ddpm_jax.pipeline import load
from ddpm_jax.runtime.rng import named_key
from ddpm_jax.sampling.given import Inputs

WHY = "diffusers and PyTorch are not installed (pip install -e '.[peers]')"
torch = pytest.importorskip("torch", reason=WHY)
pytest.importorskip("diffusers", reason=WHY)
pytestmark = pytest.mark.peers

PROMPTS, NEGATIVE = [" Two green pears ", "a red apple"], ["plum", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("if")


@pytest.fixture(scope="module")
def base(folder):
    theirs = unclips.save_if(folder / "their_base")
    notes = []
    run = workdirs.import_weights(str(folder / "their_base"), folder / "base", notes.append)
    assert len(notes) == 1  # of the prompts
    return theirs, load(run)


@pytest.fixture(scope="module")
def larger(folder):
    theirs = unclips.save_if(folder / "their_larger", enlarges=True)
    return theirs, load(workdirs.import_weights(str(folder / "their_larger"), folder / "larger"))


def asked(steps, scale):
    """The same request for both, with noise that is far from the predicted x_0."""
    ours = {"prompts": PROMPTS, "num_steps": steps, "guidance_scale": scale}
    theirs = {"prompt": [prompt.strip().lower() for prompt in PROMPTS], "clean_caption": False}
    theirs |= {"num_inference_steps": steps, "guidance_scale": scale, "output_type": "pt"}
    return ours | {"negative_prompts": NEGATIVE}, theirs | {"negative_prompt": NEGATIVE}


def error_of(found, expected):
    expected = np.moveaxis(expected.numpy(), 1, -1)
    return np.abs(found - expected).max() / np.abs(expected).max()


def test_base(measure, monkeypatch, base):
    theirs, run = base
    assert (run.config.sample.guidance_scale, run.config.sample.num_steps) == (7.0, 100)
    assert (run.config.diffusion.dynamic_threshold, run.config.diffusion.threshold_limit) == (0.95, 1.5)
    states = run.condition.say(prompts=PROMPTS).of_images(np.arange(2))["tokens"]
    with torch.no_grad():
        expected = theirs.encode_prompt(PROMPTS, False)[0]
    measure("states of prompts, DeepFloyd IF", "diffusers' `IFPipeline`", np.abs(states - expected.numpy()).max(), 1e-5)

    import diffusers.pipelines.deepfloyd_if.pipeline_if as module
    from diffusers.schedulers import scheduling_ddpm

    ours, options = asked(10, 7.0)
    unclips.feed(monkeypatch, unclips.noises(run, 2), module, scheduling_ddpm)
    expected = theirs(**options).images
    error = error_of(unclips.drawn(run, 2, **ours), expected)
    measure("pictures of DeepFloyd IF's first stage, narrow", "diffusers' `IFPipeline`", error, 5e-4, "relative")
    pictures = np.round(np.clip(np.moveaxis(expected.numpy(), 1, -1) / 2 + 0.5, 0, 1) * 255)
    assert np.abs(run.sample(2, **ours) - pictures).max() <= 1


def test_larger(measure, monkeypatch, larger):
    import diffusers.pipelines.deepfloyd_if.pipeline_if_superresolution as module
    from diffusers.schedulers import scheduling_ddpm

    theirs, run = larger
    assert (run.model.given.shape, run.shape) == ((8, 8, 3), (32, 32, 3))
    pictures = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    ours, options = asked(5, 4.0)
    start, *rest = itertools.islice(unclips.noises(run, 2), 6)
    keys = jax.vmap(lambda number: named_key(0, "augmentation", number))(np.arange(2))
    augmentation = to_torch(normal(keys, (2, *run.shape)))
    unclips.feed(monkeypatch, iter([start, augmentation, *rest]), module, scheduling_ddpm)
    expected = theirs(image=to_torch(pictures.astype(np.float32) / 127.5 - 1), **options).images
    error = error_of(unclips.drawn(run, 2, Inputs(pictures), **ours), expected)
    measure("pictures of DeepFloyd IF's second stage, narrow", "diffusers' pipeline", error, 1e-3, "relative")


def test_both_stages(folder, base, larger):
    pipeline_lib.compose([folder / "base", folder / "larger"], folder / "both")
    run = load(folder / "both")
    pictures = run.sample(2, prompts=PROMPTS, num_steps=2)
    small = base[1].sample(2, prompts=PROMPTS, num_steps=2)
    assert (pictures.shape, small.shape) == ((2, 32, 32, 3), (2, 8, 8, 3))
