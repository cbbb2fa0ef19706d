"""Reads folders of weights, and edits them so that reading them must fail."""

import json

import pytest
from safetensors.numpy import load_file, save_file

from ddpm_jax.runtime.errors import UserError

PARTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def part(path, name):
    """The tensors of a part of diffusers' pipeline."""
    return load_file(path / name / PARTS[name])


def refusal(call, *args):
    """The message with which a call is refused."""
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_config(folder, **fields):
    """Changes fields of the config of a transformers folder."""
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, edit):
    """Applies `edit` to the tensors of a transformers folder."""
    tensors = load_file(folder / "model.safetensors")
    save_file(edit(tensors), folder / "model.safetensors")
