"""Stable Diffusion's runs, without PyTorch: exported, imported from single files, and changed by LoRA files."""

import json
import pickle
import zipfile
import zlib

import jax
import numpy as np
import pytest
import single_files
from clips import VOCAB_SIZE, write_tokenizer
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from tiny import make_run

import ddpm_jax
from ddpm_jax import config as config_lib
from ddpm_jax.interop import lora, single_file, workdirs
from ddpm_jax.interop.diffusers import adapters, folder, stable_diffusion
from ddpm_jax.run import load
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.workdir import read_dataset

pytestmark = pytest.mark.slow

UNET = single_files.unet_shapes()
TEXT = single_files.text_shapes(tokens=VOCAB_SIZE, length=20)
PARTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def small(shapes, seed):
    return {name: 0.1 * value for name, value in single_files.random(shapes, seed).items()}


def tensors(version="1.x"):
    parts = small(UNET, 0), small(single_files.autoencoder_shapes(), 1), small(TEXT, 2)
    if version == "2.x":
        parts = small(single_files.unet_shapes(widths=(64, 128), linear=True), 0), *parts[1:]
    return single_files.checkpoint(*parts, version=version)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokens"), max_length=20)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A narrow Stable Diffusion 1.x."""
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    save_file(tensors(), path)
    return path


@pytest.fixture(scope="module")
def imported(file, tokens, tmp_path_factory):
    return workdirs.import_weights(str(file), tmp_path_factory.mktemp("imported") / "run", tokenizer=tokens)


@pytest.fixture(scope="module")
def exported(imported, tmp_path_factory):
    return workdirs.export_weights(load(imported), tmp_path_factory.mktemp("exported") / "folder")


def part(path, name):
    return load_file(path / name / PARTS[name])


def assert_same_files(first, second):
    for name, file in PARTS.items():
        assert (first / name / file).read_bytes() == (second / name / file).read_bytes(), name
    files = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")
    tokenizer = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
    for name in ("model_index.json", *files, *(f"tokenizer/{name}" for name in tokenizer)):
        assert json.loads((first / name).read_text()) if name.endswith("json") else True
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def assert_same_runs(first, second):
    """But for what their sources are called."""
    found, expected = load(first), load(second)
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_array_equal(a, b)
    named = {"text.encoder", "autoencoder.source"}
    assert {name.partition(":")[0] for name in config_lib.differences(found.config, expected.config)} <= named
    assert found.dataset["diffusers"] == expected.dataset["diffusers"]
    assert found.dataset["tokenizer"] == expected.dataset["tokenizer"]
    options = {"prompts": ["a red bicycle!"], "num_steps": 2, "height": 8, "width": 8}
    np.testing.assert_array_equal(found.sample(1, **options), expected.sample(1, **options))


def test_exported_holds_the_tensors(exported):
    assert json.loads((exported / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    for name, expected in (("unet", small(UNET, 0)), ("text_encoder", small(TEXT, 2))):
        found = part(exported, name)
        assert found.keys() == expected.keys()
        assert all(value.tobytes() == expected[tensor].tobytes() for tensor, value in found.items())


def test_there_and_back(imported, exported, tmp_path):
    """A folder and a single file are the same run, and its folder is the same to the byte."""
    again = workdirs.import_weights(str(exported), tmp_path / "run")
    assert_same_runs(again, imported)
    assert_same_files(workdirs.export_weights(load(again), tmp_path / "again"), exported)


def write_checkpoint(path, named):
    """As PyTorch's own files are, with training's other contents."""

    class Storage:
        def __init__(self, key, value):
            self.key, self.value = key, value

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, Storage):
                return ("storage", _FloatStorage, value.key, "cpu", value.value.size)
            return None

    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        storages = {name: Storage(str(i), value) for i, (name, value) in enumerate(named.items())}
        content = {"state_dict": {name: _Rebuilt(storages[name], value) for name, value in named.items()}, "epoch": 3}
        with archive.open("archive/data.pkl", "w") as stream:
            Pickler(stream, 2).dump(content)
        for storage in storages.values():
            archive.writestr(f"archive/data/{storage.key}", storage.value.tobytes())
