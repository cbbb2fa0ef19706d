"""CLIP's image encoder from a folder of its own, a `CLIPVisionModelWithProjection`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from theirs import relative, to_torch

from ddpm_jax.interop.transformers import clip as interop
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.parallel import run_once_options

CONFIG = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIG |= {"image_size": 6, "patch_size": 2, "projection_dim": 5}
KIND = "CLIPVisionModelWithProjection"


def write(folder, change=None, **fields):
    """A folder with random weights, whose tensors are those of CLIP's image half."""
    folder.mkdir()
    config = {"architectures": [KIND], "model_type": "clip_vision_model", **CONFIG}
    (folder / "config.json").write_text(json.dumps(config | fields))
    layers, model = CONFIG["num_hidden_layers"], "vision_model"
    shapes = {f"{model}.embeddings.class_embedding": (16,), f"{model}.embeddings.patch_embedding.weight": (16, 3, 2, 2)}
    shapes |= {f"{model}.embeddings.position_embedding.weight": (10, 16), "visual_projection.weight": (5, 16)}
    norms = [f"{model}.pre_layrnorm", f"{model}.post_layernorm"]
    for layer in (f"{model}.encoder.layers.{i}" for i in range(layers)):
        norms += [f"{layer}.layer_norm{i}" for i in (1, 2)]
        dense = {f"self_attn.{name}_proj": (16, 16) for name in ("q", "k", "v", "out")}
        for name, (outputs, inputs) in (dense | {"mlp.fc1": (24, 16), "mlp.fc2": (16, 24)}).items():
            shapes |= {f"{layer}.{name}.weight": (outputs, inputs), f"{layer}.{name}.bias": (outputs,)}
    shapes |= {f"{norm}.{leaf}": (16,) for norm in norms for leaf in ("weight", "bias")}
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(change(tensors) if change else tensors, folder / "model.safetensors")
    return folder


def test_read(tmp_path):
    net, params = interop.read_image(write(tmp_path / "a"))
    assert (net.width, net.num_heads, net.patch_size, net.projection) == (16, 4, 2, 5)
    states = jax.jit(net.apply)({"params": params}, jnp.ones((2, 6, 6, 3)))
    assert states.projected.shape == (2, 5)
    older = write(tmp_path / "b", lambda tensors: tensors | {"vision_model.embeddings.position_ids": np.arange(10)})
    jax.tree.map(np.testing.assert_array_equal, interop.read_image(older)[1], params)


@pytest.mark.parametrize(
    ("fields", "change", "said"),
    [
        ({"architectures": ["CLIPVisionModel"]}, None, f"architectures is 'CLIPVisionModel' in .*accepted: {KIND}"),
        ({"hidden_act": "silu"}, None, "hidden_act is 'silu'"),
        ({"patch_size": 4}, None, "patch_size is 4 in .*; accepted: a divisor of image_size, 6"),
        ({"projection_dim": 7}, None, r"'visual_projection.weight' in .* has shape \(5, 16\); accepted: \(7, 16\)"),
        ({}, lambda tensors: tensors | {"more": np.zeros(1, np.float32)}, "has a tensor 'more'"),
    ],
)
def test_refused(tmp_path, fields, change, said):
    with pytest.raises(UserError, match=said):
        interop.read_image(write(tmp_path / "encoder", change, **fields))


@pytest.mark.peers
def test_against_transformers(measure, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (pip install -e '.[peers]')")
    theirs_lib = pytest.importorskip("transformers", reason="transformers is not installed (pip install -e '.[peers]')")
    torch.manual_seed(0)
    theirs = theirs_lib.CLIPVisionModelWithProjection(theirs_lib.CLIPVisionConfig(**CONFIG)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    net, params = interop.read_image(tmp_path / "theirs")
    assert {interop._name(("image", *path)) for path in interop._shapes(net)} == load_file(
        tmp_path / "theirs/model.safetensors"
    ).keys()
    x = np.random.default_rng(0).standard_normal((2, 6, 6, 3)).astype(np.float32)
    states = jax.jit(net.apply, compiler_options=run_once_options())({"params": params}, x)
    with torch.no_grad():
        expected = theirs(to_torch(x)).image_embeds.numpy()
    error = relative(states.projected, expected)
    measure("image embedding", "transformers' `CLIPVisionModelWithProjection`, PyTorch", error, 1e-6, "relative")
