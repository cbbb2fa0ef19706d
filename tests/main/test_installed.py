"""`python -m ddpm_jax` away from the source tree, with the configs that come with the package."""

import json
import os
import subprocess
import sys

import pytest


def call(folder, *flags):
    command = [sys.executable, "-m", "ddpm_jax", *flags]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits_classes", "configs/digits_classes.py"])
def test_finds_the_configs(tmp_path, name):
    network = ("model.channels=8", "model.num_groups=4", "model.channel_multipliers=(1,)")
    small = (*network, "train.num_steps=1", "train.batch_size=8", "sample.num_images=8", "sample.num_steps=2")
    flags = (f"--config={name}", "--workdir=run", *(f"--config.{field}" for field in small))
    status, output = call(tmp_path, *flags, "--config.model.middle_attention=False")
    assert status == 0, output
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["label_dropout"] == 0.15


def test_names_them(tmp_path):
    assert call(tmp_path, "--config=cifar11") == (
        1,
        "error: --config is 'cifar11', which is not a file; configs/ has captions.py, captions_small.py, "
        "celebahq256.py, cifar10.py, cifar10_article.py, digits.py, digits_classes.py, finetune.py, "
        "folder.py, folder_small.py, lsun_bedroom.py, lsun_cat.py, lsun_church.py, numbers.py, "
        "numbers_autoencoder.py, numbers_base.py, numbers_clip.py, numbers_decoder.py, numbers_latent.py, "
        "numbers_prior.py, numbers_sr.py\n",
    )


def test_a_file_that_is_not_a_config(tmp_path):
    (tmp_path / "mine.py").touch()
    status, output = call(tmp_path, "--config=mine.py", "--workdir=run")
    assert status == 1
    assert output.startswith("error: the file of --config has no function get_config")


def test_help_lists_the_flags(tmp_path):
    status, output = call(tmp_path, "--help")
    assert status == 0
    assert output.startswith("ddpm_jax trains diffusion models")
