"""Bad input of training by the command line is answered in one sentence."""

import json

import numpy as np
import pytest
from PIL import Image

from ddpm_jax import config

pytestmark = pytest.mark.slow
BAD = [
    (["--config.train.batch_sise=3"], "'train.batch_sise' does not exist. Did you mean 'train.batch_size'?"),
    (["--config.trian.batch_size=3"], "'trian.batch_size' does not exist. Did you mean 'train.batch_size'?"),
    (["--config.optimizer.options.b1=0.5"], "is set as a whole: --config.optimizer.options='{\"b1\": 0.5}'"),
    (["--config.train.batch_size=many"], "--config.train.batch_size is 'many'; accepted: a whole number"),
    (["--confg.train.batch_size=3"], "does not exist. Did you mean '--config.train.batch_size'?"),
    (["--workdri=x"], "flag --workdri does not exist. Did you mean '--workdir'?"),
    (["--zzzz"], "flag --zzzz does not exist. --help lists all."),
    (["--mode=sample"], "--config does nothing with --mode=sample"),
    (["--sampler=ddim"], "--sampler does nothing with --mode=train"),
    (["--mode=smaple"], "--mode is 'smaple'; accepted: train, prepare, "),
    (["--mode=smaple"], "plan. Did you mean 'sample'?"),
    (["--output=pgn"], "--output is 'pgn'; accepted: grid, png, npz. Did you mean 'png'?"),
    (["--num_images=x"], "--num_images is 'x'; accepted: a whole number"),
    (["--config.diffusion.num_timesteps=1"], "config.diffusion.num_timesteps is 1 and config.log.sample_steps is 5"),
    (["--config.model.channels=33"], "33 channels cannot be normalised in 4 groups"),
    (["--config.data.height=9", "--config.model.channel_multipliers=(1, 2)"], "9x8 cannot be halved"),
    (["--config.train.batch_size=15"], "must be divisible by the 2 devices"),
    (["--config.data.source=folder"], "data.path is empty"),
    (["--config.data.source=folder", "--config.data.path=none"], "'none' is not a folder"),
    (["--config.data.source=folder", "--config.data.path=tests/training"], "holds no images; accepted: .png"),
    (["--config.data.source=array", "--config.data.path=main.py"], "cannot be read as .npz or .npy"),
    (["--config.evaluate.every_steps=5", "--config.evaluate.num_steps=51"], "config.evaluate.num_steps is 51"),
    (["--config=configs/nope.py"], "'configs/nope.py', which is not a file; configs/ has"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_is_answered_in_one_sentence_before_compiling(call, tmp_path, flags, message):
    status, output = call(f"--workdir={tmp_path / 'run'}", *flags, devices=2)
    assert status != 0
    assert message in output, output
    assert "Traceback" not in output
    assert "compil" not in output
    assert not (tmp_path / "run").exists()


def test_unwritable_workdir(call, tmp_path):
    (tmp_path / "file").touch()
    status, output = call(f"--workdir={tmp_path / 'file' / 'run'}")
    assert (status, output.count("\n")) == (1, 1)
    assert "cannot be written to: Not a directory" in output


def test_workdir_without_a_run(call, tmp_path):
    status, output = call("--mode=sample", f"--workdir={tmp_path}", config=None)
    assert (status, output.count("\n")) == (1, 1)
    assert "holds no run: there is no config.json in it; training, --mode=import and --mode=compose make one" in output


def test_workdir_whose_training_has_only_begun(call, tmp_path):
    settings = config.default_config()
    settings.train.num_steps = 300  # fewer than to the first checkpoint
    (tmp_path / "config.json").write_text(config.to_json(settings))
    status, output = call("--mode=sample", f"--workdir={tmp_path}", config=None)
    assert (status, output.count("\n")) == (1, 1)
    assert "has no checkpoint yet; training saves the first by step 300" in output


def test_another_config_on_the_same_workdir(trained, call):
    status, output = call(f"--workdir={trained[0]}", "--config.model.channels=16")
    assert status == 1
    assert "model.channels: 8 -> 16" in output


def test_broken_image_in_a_folder(call, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(20):
        Image.fromarray(np.full((8, 8), 12 * i, np.uint8)).save(pictures / f"{i:02d}.png")
    (pictures / "13.png").write_bytes((pictures / "13.png").read_bytes()[:40])
    flags = ("--config.data.source=folder", f"--config.data.path={pictures}", "--config.train.num_steps=2")
    status, output = call(f"--workdir={tmp_path / 'run'}", *flags)
    assert status == 1
    assert "1 of 20 images" in output
    assert "'13.png'" in output
    status, output = call(f"--workdir={tmp_path / 'run'}", *flags, "--config.data.skip_broken")
    assert status == 0, output
    assert "Skipping 1 of 20 images" in output
    assert "19 images" in output
    assert json.loads((tmp_path / "run" / "dataset.json").read_text())["skipped"] == ["13.png"]
