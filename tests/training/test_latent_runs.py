"""An autoencoder, a run on its latents, and adapters for that run, trained in sequence on all devices."""

import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from runs import assert_same_checkpoint, checkpoint, metrics
from tiny import near

import ddpm_jax
from ddpm_jax import config as config_lib
from ddpm_jax.interop import workdirs
from ddpm_jax.models import lora
from ddpm_jax.runtime import workdir
from ddpm_jax.runtime.checkpoints import Checkpoints
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.sampling.latents import Latents
from ddpm_jax.training.autoencoders import load_autoencoder
from ddpm_jax.validation import validate

STEPS = 4


def tiny_config(**sections):
    """A run of four steps; sections: further fields."""
    config = config_lib.default_config()
    config.data.update(source="array", height=8, width=8, channels=1)
    config.model.update(channels=8, num_groups=4, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=())
    config.autoencoder.update(level_channels=(4, 8), num_res_blocks=1, num_groups=2, latent_channels=3)
    config.autoencoder.middle_attention = False
    config.diffusion.num_timesteps = 50
    config.optimizer.update(learning_rate=1e-2, warmup_steps=0)
    config.train.update(batch_size=8, num_steps=STEPS, ema_decays=(0.99,))
    config.log.update(every_steps=2, sample_every_steps=0, sample_steps=2, tensorboard=False)
    config.checkpoint.every_steps = 2
    config.sample.update(num_images=2, num_steps=2)
    for section, fields in sections.items():
        config[section].update(fields)
    return config


# What is refused before anything is compiled.


def refused(config, said, num_devices=1):
    with pytest.raises(UserError) as caught:
        validate(config, num_devices=num_devices)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def described(tmp_path):
    """Workdirs of both kinds of runs that have started, without checkpoints."""
    for name in config_lib.OBJECTIVES:
        (tmp_path / name).mkdir()
        config = tiny_config(train={"objective": name})
        workdir.record(tmp_path / name, config, {"fingerprint": "x", "class_names": None})
    return tmp_path


def test_adapters_of_nothing():
    refused(tiny_config(lora={"rank": 2}), "config.lora.rank is 2, but adapters need a trained network")


@pytest.mark.parametrize(("field", "value"), [("clip", True), ("dynamic_threshold", 0.99)])
def test_clipped_latents(described, field, value):
    config = tiny_config(autoencoder={"source": str(described / "autoencoder")}, diffusion={"clip": False})
    validate(config, num_devices=1)
    config.diffusion[field] = value
    refused(config, f"config.diffusion.{field} is {value}, but latents can also lie outside [-1, 1]")


def test_latents_of_a_diffusion(described):
    config = tiny_config(autoencoder={"source": str(described / "diffusion")}, diffusion={"clip": False})
    refused(config, "is a run with train.objective 'diffusion'; accepted: 'autoencoder'")


def test_an_autoencoder_cannot_be_sampled_from(described):
    with pytest.raises(UserError, match="holds an autoencoder, which makes no pictures by itself") as caught:
        ddpm_jax.load(described / "autoencoder")
    assert "\n" not in str(caught.value)


def test_an_autoencoder_that_has_not_learned_yet(described):
    with pytest.raises(UserError, match="no checkpoint"):
        load_autoencoder(described / "autoencoder")


# Runs.


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The workdirs "autoencoder", "latents" and "adapters" of finished runs."""
    folder = tmp_path_factory.mktemp("runs")
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8), np.uint8)
    np.savez(folder / "images.npz", image=images)
    data = {"path": str(folder / "images.npz")}
    trained = tiny_config(data=data, train={"objective": "autoencoder"})
    ddpm_jax.train(trained, folder / "autoencoder")
    config = tiny_config(data=data, autoencoder={"source": str(folder / "autoencoder")}, diffusion={"clip": False})
    ddpm_jax.train(config, folder / "latents")
    (folder / "autoencoder").rename(folder / "moved")  # a run of latents needs its own workdir alone
    ddpm_jax.train(adapting(config, folder / "latents"), folder / "adapters")
    (folder / "moved").rename(folder / "autoencoder")
    return folder


def adapting(config, start):
    config = config.copy_and_resolve_references()
    config.autoencoder.source = str(start / workdir.AUTOENCODER)
    config.lora.update(rank=2, alpha=3.0)
    config.train.init_from = str(start)
    return config


@pytest.mark.slow
def test_the_autoencoder_learns(runs):
    assert [line["step"] for line in metrics(runs / "autoencoder")] == [2, 4]
    assert (runs / "autoencoder" / "samples" / "final.png").exists()
    net, params, factor = load_autoencoder(runs / "autoencoder")
    assert (net.widths, net.latent_channels, factor) == ((4, 8), 3, 0.0)
    jax.tree.map(np.testing.assert_array_equal, params, checkpoint(runs / "autoencoder", STEPS)["ema_0.99"])


@pytest.mark.slow
def test_samples_of_latents(runs):
    run = ddpm_jax.load(runs / "latents")
    net, params, _ = load_autoencoder(runs / "autoencoder")
    decoder = run.model.decoder
    assert (run.shape, decoder.shape) == ((8, 8, 1), (4, 4, 3))
    jax.tree.map(np.testing.assert_array_equal, decoder.open_params(), params)
    images = run.sample(3, num_steps=2)
    assert (images.shape, images.dtype) == ((3, 8, 8, 1), np.uint8)
    assert near(images[1:2], run.sample(indices=[1], num_steps=2))
    assert run.sample(1, num_steps=2, height=4, width=12).shape == (1, 4, 12, 1)
    # As measured on the data: the latents that are trained on have about unit variance.
    pictures = np.load(runs / "images.npz")["image"][..., None]
    own = Latents((8, 8, 1), net, lambda: params, decoder.scaling_factor)
    posterior = own.read({"index": np.arange(16), "image": pictures})["posterior"][:, 0]
    variance = np.var(posterior[:, 0]) + np.mean(posterior[:, 1] ** 2)
    np.testing.assert_allclose(decoder.scaling_factor**2 * variance, 1.0, rtol=1e-3)


@pytest.mark.slow
def test_edits_of_latents(runs):
    run, pictures = ddpm_jax.load(runs / "latents"), np.load(runs / "images.npz")["image"][:2, ..., None]
    assert run.vary(pictures, 20, num_steps=2).shape == pictures.shape
    mask = np.zeros((8, 8), bool)
    mask[:3, 2:5] = True
    found = run.inpaint(pictures, mask, num_steps=2)
    np.testing.assert_array_equal(found[:, ~mask], pictures[:, ~mask])
    fixed = run.inpaint(pictures, mask, num_steps=2, fixed_noise=True)
    np.testing.assert_array_equal(fixed[:, ~mask], pictures[:, ~mask])
    assert np.any(fixed != found)


@pytest.mark.slow
def test_a_run_of_adapters_opens_with_merged_weights(runs):
    base, run = ddpm_jax.load(runs / "latents"), ddpm_jax.load(runs / "adapters")
    parts = checkpoint(runs / "adapters", STEPS)
    adapters = parts["ema_0.99"]
    assert {path[-1] for path in flatten_dict(adapters)} == {"down", "up"}
    assert any(np.any(value) for path, value in flatten_dict(adapters).items() if path[-1] == "up")
    merged = lora.merge(jax.device_get(base.params), adapters, 3.0 / 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), run.params, merged)
    raw = lora.merge(jax.device_get(base.params), parts["params"], 3.0 / 2)
    params = ddpm_jax.load(runs / "adapters", raw=True).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), params, raw)
    different = [path for path, value in flatten_dict(run.params).items() if np.any(value != get(base.params, path))]
    assert {path[-2] for path in different} == {"query", "key", "value", "out"}


@pytest.mark.slow
def test_a_run_of_adapters_as_one_file(runs, tmp_path):
    run = ddpm_jax.load(runs / "adapters")
    file = workdirs.export_weights(run, tmp_path / "x.safetensors")
    again = ddpm_jax.load(workdirs.import_weights(str(file), tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, again.params, run.params)


def get(tree, path):
    return tree if not path else get(tree[path[0]], path[1:])


@pytest.mark.slow
def test_a_run_of_adapters_resumes_bit_for_bit(runs, tmp_path):
    """From its own workdir alone: the run that it started from may be gone."""
    again = shutil.copytree(runs / "adapters", tmp_path / "adapters")
    shutil.rmtree(again / "checkpoints" / str(STEPS))
    config = workdir.read_config(again)
    (runs / "latents").rename(runs / "moved")
    try:
        ddpm_jax.train(config, again)
    finally:
        (runs / "moved").rename(runs / "latents")
    assert_same_checkpoint(again, runs / "adapters", STEPS)
    base = Checkpoints(again / workdir.BASE, read_only=True)
    assert base.steps() == [STEPS]
    base.close()
    assert metrics(again)[-1]["loss"] == metrics(runs / "adapters")[-1]["loss"]
