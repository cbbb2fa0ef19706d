"""Stable Diffusion's runs with LoRA files and with adapters that they trained, without PyTorch."""

import shutil
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from folders import part
from loras import make_lora, merged
from safetensors.numpy import load_file

import ddpm_jax
from ddpm_jax import config as config_lib
from ddpm_jax.interop import workdirs
from ddpm_jax.models import lora
from ddpm_jax.pipeline import load
from ddpm_jax.runtime.checkpoints import Checkpoints
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.workdir import BASE, CONFIG

pytestmark = pytest.mark.slow


def test_loras_are_added_to_both_parts(imported, exported, two, tmp_path):
    """An export of the run has the weights with the changes; nothing else differs."""
    changed = workdirs.export_weights(ddpm_jax.load(imported, loras=two), tmp_path / "changed")
    for name, count in (("unet", 4), ("text_encoder", 2)):
        before, after = part(exported, name), part(changed, name)
        expected = dict(before)
        for seed, weight in ((0, 0.7), (1, 0.3)):
            expected |= merged(expected, getattr(make_lora(seed, text=seed == 0), name), weight)
        assert sum(not np.array_equal(after[tensor], before[tensor]) for tensor in after) == count
        for tensor, value in expected.items():
            np.testing.assert_allclose(after[tensor], value, atol=1e-6, err_msg=tensor)


def test_loras_are_in_the_settings(imported, two):
    run, plain = ddpm_jax.load(imported, loras=two), load(imported)
    settings = run.settings(seed=0)
    assert settings["loras"] == [
        {"name": "a.safetensors", "weight": 0.7, "crc32": zlib.crc32(two[0][0].read_bytes())},
        {"name": "b.safetensors", "weight": 0.3, "crc32": zlib.crc32(Path(two[1][0]).read_bytes())},
    ]
    assert settings["weights_crc32"] != plain.settings(seed=0)["weights_crc32"]
    assert "loras" not in plain.settings(seed=0)
    assert run.weights.endswith(", LoRA a.safetensors at 0.7, LoRA b.safetensors at 0.3")
    texts, others = (found.condition.texts.arrays(["a"])["tokens"] for found in (run, plain))
    assert np.any(texts != others)


def test_precision_stays(imported, two):
    run = load(imported, dtype="bfloat16", loras=two)
    texts = run.condition.texts
    assert {leaf.dtype.name for leaf in jax.tree.leaves((run.params, texts.open_params()))} == {"bfloat16"}


def test_a_file_of_the_network_holds_no_text_encoder(imported, two, tmp_path):
    with pytest.raises(UserError, match=r"'a\.safetensors' changes the text encoder"):
        workdirs.export_weights(load(imported, loras=two), tmp_path / "x.safetensors")
    assert workdirs.export_weights(load(imported, loras=two[1:]), tmp_path / "x.safetensors").exists()


def test_lora_that_is_missing(imported, tmp_path):
    with pytest.raises(UserError, match=r"nothing\.safetensors' is not a file"):
        load(imported, loras=[(tmp_path / "nothing.safetensors", 1.0)])


# A run that trained adapters.


@pytest.fixture(scope="module")
def adapted(imported, tmp_path_factory):
    """As left by training: a checkpoint of the network in its own folder, and one of the adapters."""
    run, path = load(imported), tmp_path_factory.mktemp("adapted") / "run"
    shutil.copytree(imported, path)
    (path / BASE).mkdir()
    (path / "checkpoints").rename(path / BASE / "checkpoints")
    config = run.config.copy_and_resolve_references()
    config.lora.update(rank=2, alpha=3.0)
    (path / CONFIG).write_text(config_lib.to_json(config))
    shapes = jax.eval_shape(lambda: lora.init(run.params, 2, jax.random.key(0)))
    rng = np.random.default_rng(0)
    checkpoints = Checkpoints(path)
    checkpoints.save_weights(
        5, jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype), shapes)
    )
    checkpoints.close()
    return path


def test_adapters_are_a_lora_file(adapted, imported, tmp_path):
    run = load(adapted)
    file = workdirs.export_adapters(run, adapted, tmp_path / "mine.safetensors")
    with_adapters, with_file, before = (
        flatten_dict(found.params) for found in (run, load(imported, loras=[(file, 1.0)]), load(imported))
    )
    for path, value in with_adapters.items():
        np.testing.assert_allclose(with_file[path], value, atol=1e-6)
    moved = sum(not np.array_equal(value, before[path]) for path, value in with_adapters.items())
    assert moved == len(load_file(file)) // 2
    with pytest.raises(UserError, match="already exists"):
        workdirs.export_adapters(run, adapted, file)


def test_no_adapters(adapted, imported, two, tmp_path):
    for path, loras, out, said in (
        (imported, (), "x.safetensors", "trained no adapters"),
        (adapted, two[:1], "x.safetensors", "accepted: --adapters without --lora"),
        (adapted, (), "x.bin", "accepted: a name ending in .safetensors"),
    ):
        with pytest.raises(UserError, match=said):
            workdirs.export_adapters(load(path, loras=loras), path, tmp_path / out)
