"""A narrow Stable Diffusion as it comes in a single file, and what becomes of it."""

import pytest
import single_files
from clips import write_tokenizer
from loras import make_lora
from safetensors.numpy import save_file

from ddpm_jax.interop import lora, workdirs
from ddpm_jax.pipeline import load


@pytest.fixture(scope="session")
def tokens(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokens"), max_length=20)


@pytest.fixture(scope="session")
def file(tmp_path_factory):
    """A narrow Stable Diffusion 1.x."""
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    save_file(single_files.tensors(), path)
    return path


@pytest.fixture(scope="session")
def imported(file, tokens, tmp_path_factory):
    return workdirs.import_weights(str(file), tmp_path_factory.mktemp("imported") / "run", tokenizer=tokens)


@pytest.fixture(scope="session")
def exported(imported, tmp_path_factory):
    return workdirs.export_weights(load(imported), tmp_path_factory.mktemp("exported") / "folder")


@pytest.fixture
def two(tmp_path):
    """Two LoRA files with their weights; the second changes the network alone."""
    for name, changes in (("a", make_lora(0)), ("b", make_lora(1, text=False))):
        lora.write(tmp_path / f"{name}.safetensors", changes)
    return [(tmp_path / "a.safetensors", 0.7), (str(tmp_path / "b.safetensors"), 0.3)]
