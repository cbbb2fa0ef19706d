"""A run that adapts both a Stable Diffusion's text encoder and its network, on all devices."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stable_diffusions
from flax.traverse_util import flatten_dict
from runs import assert_same_checkpoint, checkpoint, metrics
from safetensors.numpy import load_file

import ddpm_jax
from configs import finetune
from ddpm_jax import config as config_lib
from ddpm_jax.interop import transformers, workdirs
from ddpm_jax.models import lora
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.workdir import TEXT_ENCODER, read_config
from ddpm_jax.training.start import start_weights
from ddpm_jax.validation import validate

pytestmark = pytest.mark.slow
STEPS = 4
PROJECTIONS = {"query", "key", "value", "out"}


def make(folder):
    """The workdirs "start" and "adapted" in "runs", to which they were moved: each is elsewhere than when it ran."""
    stable_diffusions.write_narrow(folder / "theirs", folder / "theirs.safetensors")
    begun = folder / "begun"
    workdirs.import_weights(str(folder / "theirs"), begun / "start")
    options = {"rank": 2, "alpha": 3.0, "text_encoder": True}
    stable_diffusions.fine_tune(begun / "adapted", begun / "start", folder / "images.npz", **options)
    begun.rename(folder / "runs")


@pytest.fixture(scope="module")
def runs(made_once):
    return made_once(make) / "runs"


def encoder_of(run):
    return run.condition.texts.open_params()


def test_both_parts_change(runs):
    start, run = (ddpm_jax.load(runs / name) for name in ("start", "adapted"))
    trained = checkpoint(runs / "adapted", STEPS)["ema_0.99"]
    before = {"net": jax.device_get(start.params), "encoder": encoder_of(start)}
    merged = lora.merge(before, trained, 3.0 / 2)
    found = {"net": jax.device_get(run.params), "encoder": encoder_of(run)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), found, merged)
    flat = flatten_dict(before)
    moved = {path for path, value in flatten_dict(found).items() if np.any(value != flat[path])}
    assert {(path[0], path[-2].removeprefix("cross_")) for path in moved} == {
        (part, name) for part in ("net", "encoder") for name in PROJECTIONS
    }
    # What the workdir keeps as its text encoder is what the adapters change.
    kept = transformers.read(runs / "adapted" / TEXT_ENCODER)[1]
    jax.tree.map(np.testing.assert_array_equal, kept, before["encoder"])


def test_states_are_those_of_a_frozen_encoder(runs):
    """Inside and outside the training step; padding is treated like other tokens."""
    config = read_config(runs / "adapted")
    run = ddpm_jax.load(runs / "adapted")
    model, params = config_lib.make_model(config, run.dataset), {"net": run.params, "encoder": encoder_of(run)}
    texts = ["a", "", "some longer picture"]
    states = model.net.apply({"params": params}, model.condition.texts.arrays(texts), method="encode")
    expected = run.condition.texts.arrays(texts)
    assert states.keys() == expected.keys() == {"tokens"}
    np.testing.assert_allclose(states["tokens"], expected["tokens"], atol=2e-6)


def test_resumes_bit_for_bit(runs, tmp_path):
    """From its own workdir alone: the run that it started from may be gone."""
    again = shutil.copytree(runs / "adapted", tmp_path / "adapted")
    shutil.rmtree(again / "checkpoints" / str(STEPS))
    config = read_config(again)
    assert not Path(config.train.init_from).exists()
    ddpm_jax.train(config, again)
    assert_same_checkpoint(again, runs / "adapted", STEPS)
    assert metrics(again)[-1]["loss"] == metrics(runs / "adapted")[-1]["loss"]


def test_exports_are_the_run(runs, tmp_path):
    """A folder with merged weights, and a LoRA file that makes the same of the start."""
    run = ddpm_jax.load(runs / "adapted")
    folder = workdirs.export_weights(run, tmp_path / "folder")
    file = workdirs.export_adapters(run, runs / "adapted", tmp_path / "mine.safetensors")
    parts = {name.split(".")[0] for name in load_file(file)}
    assert parts == {"unet", "text_encoder"}
    again = ddpm_jax.load(workdirs.import_weights(str(folder), tmp_path / "again"))
    with_file = ddpm_jax.load(runs / "start", loras=[(file, 1.0)])
    expected = run.sample(2, prompts=["a", "b"], num_steps=2)
    assert expected.shape == (2, *run.shape)
    for found, bound in ((again, 0), (with_file, 1e-6)):
        for part in (lambda run: run.params, encoder_of):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=bound), part(found), part(run))  # noqa: B023
        pictures = found.sample(2, prompts=["a", "b"], num_steps=2)
        assert np.abs(pictures.astype(int) - expected).max() <= bool(bound)
    with pytest.raises(UserError, match=r"adapted its text encoder .* accepted: a folder as --out, or --adapters"):
        workdirs.export_weights(run, tmp_path / "x.safetensors")


def test_precision(runs):
    run = ddpm_jax.load(runs / "adapted", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves((run.params, encoder_of(run)))} == {jnp.dtype("bfloat16")}


def test_no_start_of_another_run(runs):
    config = finetune.get_config(str(runs / "adapted"))
    assert (config.lora.rank, config.lora.text_encoder) == (0, False)
    with pytest.raises(UserError, match=r"adapted its text encoder .* cannot be taken over"):
        start_weights(config, None)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank": 0}, "config.lora.rank is 0"),
        ({"rank": 2}, "config.text.encoder ''; accepted: a rank above 0 and the folder of a text encoder"),
    ],
)
def test_adapters_of_no_encoder(fields, said):
    config = config_lib.default_config()
    config.train.init_from = "x"
    config.lora.update(text_encoder=True, **fields)
    with pytest.raises(UserError) as caught:
        validate(config, num_devices=1)
    assert "config.lora.text_encoder is True" in str(caught.value)
    assert said in str(caught.value)
