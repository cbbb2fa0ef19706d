"""The tokenizer and the frozen text encoder that a run keeps in its workdir."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import t5s
from runs import CAPTIONED, assert_same_checkpoint, checkpoint

from ddpm_jax import config as config_lib
from ddpm_jax.data.sources import open_source
from ddpm_jax.interop import transformers
from ddpm_jax.models.clip import CLIPTextEncoder
from ddpm_jax.runtime import workdir
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.text.tokenizers import Tokenizer
from ddpm_jax.training.texts import text_description

CAPTIONS = ("a red apple", "two green pears", "a plum")


@pytest.fixture
def folder(tmp_path):
    """A transformers folder of a tiny CLIP, with its tokenizer."""
    net, rng = (
        CLIPTextEncoder(280, max_length=12, width=8, num_layers=1, num_heads=2, mlp_width=8),
        np.random.default_rng(0),
    )
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    transformers.write(tmp_path / "clip", net, params)
    (tmp_path / "clip" / "tokenizer.json").write_text(Tokenizer.train(CAPTIONS, 280, 12).to_json())
    return tmp_path / "clip"


@pytest.fixture
def config(tmp_path, folder):
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8), np.uint8)
    np.savez(tmp_path / "images.npz", image=images, caption=CAPTIONS * 4)
    config = config_lib.default_config()
    config.text.encoder = str(folder)
    config.data.update(source="array", path=str(tmp_path / "images.npz"), height=8, width=8, channels=1)
    return config


def source_of(config):
    data = config.data
    return open_source("array", path=data.path, height=8, width=8, channels=1, captions=True)


@pytest.mark.slow
def test_a_run_with_a_frozen_encoder_needs_its_workdir_alone(call, folder, tmp_path):
    """It trains, resumes, and samples after the encoder's folder is gone; in bfloat16."""
    run = tmp_path / "run"
    flags = [flag for flag in CAPTIONED if ".text." not in flag]
    flags += [f"--config.text.encoder={folder}", "--config.model.dtype=bfloat16", "--config.train.num_steps=7"]
    flags += ["--config.log.sample_every_steps=0", "--config.sample.num_images=2"]
    status, output = call(f"--workdir={run}", config=flags)
    assert status == 0, output
    kept = {path.relative_to(run).as_posix() for path in run.rglob("*")}
    assert kept >= {"tokenizer.json", "text_encoder/config.json", "text_encoder/model.safetensors"}
    assert (run / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()
    whole = shutil.copytree(run, tmp_path / "whole")
    shutil.rmtree(folder)
    shutil.rmtree(run / "checkpoints" / "7")
    status, output = call(f"--workdir={run}", config=flags)
    assert status == 0, output
    assert "resuming from the checkpoint of step 6" in output
    assert_same_checkpoint(run, whole, 7)
    assert "encoder" not in checkpoint(run, 7)["params"]  # it is not trained
    flags = (f"--workdir={run}", "--prompt=a plum", "--num_images=2", "--output=npz", f"--out={run / 'a.npz'}")
    status, output = call("--mode=sample", *flags, config=None)
    assert status == 0, output
    assert np.load(run / "a.npz")["prompt"].tolist() == ["a plum"] * 2


@pytest.mark.slow
def test_a_run_with_a_frozen_t5(call, tmp_path):
    """Its text encoder's folder has no tokenizer.json. It trains two steps, and samples after the folder is gone."""
    run, folder = tmp_path / "run", t5s.write_t5(tmp_path / "t5")
    flags = [flag for flag in CAPTIONED if ".text." not in flag and ".num_steps=" not in flag]
    flags += [f"--config.text.encoder={folder}", "--config.text.max_length=16", "--config.train.num_steps=2"]
    flags += ["--config.log.sample_every_steps=0", "--config.sample.num_images=2", "--config.sample.num_steps=2"]
    status, output = call(f"--workdir={run}", config=flags)
    assert status == 0, output
    assert Tokenizer.from_json((run / "tokenizer.json").read_text()).max_length == 16
    assert transformers.read_module(run / "text_encoder") == t5s.NET
    assert "encoder" not in checkpoint(run, 2)["params"]
    shutil.rmtree(folder)
    flags = (f"--workdir={run}", "--prompt=a plum", "--num_images=2", "--output=npz", f"--out={run / 'a.npz'}")
    status, output = call("--mode=sample", *flags, config=None)
    assert status == 0, output
    assert np.load(run / "a.npz")["image"].shape[0] == 2
    status, output = call("--mode=export", f"--workdir={run}", f"--out={tmp_path / 'sd'}", config=None)
    assert status != 0
    assert "this run has a text encoder other than CLIP's (text.encoder), unlike Stable Diffusion" in output


def test_leftovers_of_an_interrupted_start_are_replaced(config, tmp_path):
    """The workdir has some encoder, but no description of a run yet."""
    run = workdir.check_writable(tmp_path / "run")
    (run / workdir.TEXT_ENCODER).mkdir()
    (run / workdir.TEXT_ENCODER / "config.json").write_text("of another")
    found = text_description(config, source_of(config), run, None)
    net, _ = transformers.read(found["text_encoder"])
    assert net == transformers.read_module(config.text.encoder)


def test_what_is_kept_stays_as_it_is(config, folder, tmp_path):
    run = workdir.check_writable(tmp_path / "run")
    first = text_description(config, source_of(config), run, None)
    workdir.record(run, config, source_of(config).describe() | first)
    shutil.rmtree(folder)
    known = workdir.read_dataset(run)
    assert text_description(config, source_of(config), run, known) == first
    assert {name: known[name] for name in first} == first


def test_of_a_trained_encoder_the_tokenizer_is_that_of_its_captions(config, tmp_path):
    config.text.update(encoder="trained", vocab_size=280, max_length=8)
    found = text_description(config, source_of(config), tmp_path, None)
    assert found == {
        "tokenizer": Tokenizer.train(CAPTIONS * 4, 280, 8).to_json(),
        "shown_captions": list(CAPTIONS * 4),
    }
    config.text.encoder = ""
    assert text_description(config, source_of(config), tmp_path, None) == {}


def test_a_run_that_starts_from_another_takes_over_its_tokenizer(config, folder, tmp_path):
    """So the tokens keep their meaning for the encoder; naming a different tokenizer is refused."""
    config.text.encoder, config.text.vocab_size = "trained", 300
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    description = source_of(config).describe() | text_description(config, source_of(config), first, None)
    workdir.record(first, config, description)
    config.data.path = str(tmp_path / "others.npz")
    np.savez(config.data.path, image=np.zeros((2, 8, 8), np.uint8), caption=["quince", "quince jelly"])
    own = text_description(config, source_of(config), second, None)
    config.train.init_from = str(first)
    taken_over = text_description(config, source_of(config), second, None)
    assert taken_over["tokenizer"] == description["tokenizer"] != own["tokenizer"]
    config.text.tokenizer = str(folder)
    with pytest.raises(UserError, match=r"has a different tokenizer from config\.text\.tokenizer"):
        text_description(config, source_of(config), second, None)
