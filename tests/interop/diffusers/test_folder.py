"""Importing and exporting diffusers folders of various networks, by command."""

import json

import jax
import numpy as np
import pytest
from tiny import of_classes

from ddpm_jax import config as config_lib
from ddpm_jax.interop.diffusers import folder
from ddpm_jax.pipeline import load

pytestmark = pytest.mark.slow


def write(path, num_classes=0, channels=3, **sample):
    """A folder with a small network with diffusers' defaults and random weights."""
    config, rng = config_lib.default_config(), np.random.default_rng(0)
    config.data.update(height=8, width=16, channels=channels)
    config.model.update(
        channels=8,
        level_channels=(8, 12),
        num_res_blocks=1,
        num_groups=4,
        attention_levels=(False, True),
        head_channels=4,
        norm_epsilon=1e-5,
        time_frequency_shift=0.0,
        time_cosines_first=True,
        downsample_padding="symmetric",
        class_conditional=num_classes > 0,
        null_class=False,
    )
    config.sample.update(sample)
    model = config_lib.make_model(config, of_classes(num_classes))
    params = jax.tree.map(lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(np.float32), model.param_shapes())
    folder.write(path, config, model.net, params)
    return path


def test_a_network_with_classes(call, tmp_path):
    sample = {"sampler": "ddim", "spacing": "leading", "spacing_offset": 1, "stop_at_first": True}
    source, workdir = write(tmp_path / "theirs", num_classes=3, **sample), tmp_path / "run"
    assert json.loads((source / "scheduler/scheduler_config.json").read_text())["set_alpha_to_one"] is False
    status, output = call("--mode=import", f"--source={source}", f"--workdir={workdir}", config=None)
    assert status == 0, output
    assert "DDIMScheduler: eps is computed from the clipped x_0, like diffusers' use_clipped_model_output" in output
    run = load(workdir)
    assert run.dataset["class_names"] == ["0", "1", "2"]
    assert {name: run.config.sample[name] for name in sample} == sample
    flags = ("--mode=sample", f"--workdir={workdir}", "--num_images=2", "--num_steps=2")
    status, output = call(*flags, "--classes=2", f"--out={tmp_path / 'grid.png'}", config=None)
    assert status == 0, output
    assert (tmp_path / "grid.png").exists()
    status, output = call(*flags, "--classes=2", "--guidance_scale=2", config=None)
    assert status == 1
    assert "guidance_scale is 2.0; other than 1 it needs a network with a null class" in output
    status, output = call(*flags, "--classes=3", config=None)
    assert status == 1
    assert "class 3 does not exist; this run has classes 0 to 2" in output


def test_images_of_two_channels(call, tmp_path):
    source, workdir = write(tmp_path / "theirs", channels=2), tmp_path / "run"
    status, output = call("--mode=import", f"--source={source}", f"--workdir={workdir}", config=None)
    assert status == 0, output
    flags = ("--mode=sample", f"--workdir={workdir}", "--num_images=2", "--num_steps=2")
    for output_kind in ("grid", "png"):
        status, output = call(*flags, f"--output={output_kind}", config=None)
        assert status == 1
        assert "images have 2 channels, but pictures have 1 or 3; accepted: --mode=sample --output=npz" in output
    status, output = call(*flags, "--output=npz", f"--out={tmp_path / 'images.npz'}", config=None)
    assert status == 0, output
    assert np.load(tmp_path / "images.npz")["image"].shape == (2, 8, 16, 2)


def test_files_of_the_hub():
    """One format of each weights file, and no safety checker."""
    wanted = [
        "feature_extractor/preprocessor_config.json",  # of Karlo's image encoder
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/pytorch_model.bin",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    others = [
        "v1-5-pruned.ckpt",
        "safety_checker/model.safetensors",
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.fp16.bin",
    ]
    assert sorted(folder.needed([*others, *wanted])) == wanted
    flat = ["config.json", "diffusion_pytorch_model.bin", "scheduler_config.json"]
    assert sorted(folder.needed([*flat, "samples/1.png"])) == flat


def test_located_on_the_hub(tmp_path, monkeypatch):
    """The chosen files are downloaded, or taken from the cache if the hub cannot be reached."""
    hub, asked = pytest.importorskip("huggingface_hub"), []

    def download(name, **options):
        asked.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda self, name: ["unet/config.json", "README.md"])
    assert folder.locate("a/b") == tmp_path
    monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda self, name: 1 / 0)
    assert folder.locate("a/b") == tmp_path
    assert asked == [("a/b", {"allow_patterns": ["unet/config.json"]}), ("a/b", {"local_files_only": True})]
