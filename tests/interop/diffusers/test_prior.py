"""diffusers' `PriorTransformer` and `UnCLIPTextProjModel`: what is read, written and refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import refusal
from safetensors.numpy import load_file, save_file

from ddpm_jax.interop.diffusers import embedding_condition, prior
from ddpm_jax.interop.diffusers.fields import WEIGHTS
from ddpm_jax.interop.diffusers.prior import Statistics, Widths
from ddpm_jax.models.embedding_condition import EmbeddingCondition
from ddpm_jax.models.prior import Prior

NET = Prior(width=16, num_layers=2, num_heads=2, num_tokens=7)
OTHER = Prior(
    width=16,
    num_layers=1,
    num_heads=4,
    num_tokens=7,
    time_width=24,
    time_activation="gelu",
    project_tokens=False,
    norm_vector=True,
    norm_in=True,
)
NETS = {"default": (NET, Widths(12, 12)), "other options": (OTHER, Widths(12, 10))}
MODULE = EmbeddingCondition(width=8, time_width=10, num_tokens=3)


def drawn(shapes):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)


def statistics(width):
    return Statistics(*np.random.default_rng(1).standard_normal((2, width)).astype(np.float32))


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def edit(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def folder(tmp_path):
    prior.write(tmp_path / "prior", NET, drawn(prior.param_shapes(*NETS["default"])), statistics(12))
    return tmp_path / "prior"


@pytest.mark.parametrize("name", NETS)
def test_written_and_read(tmp_path, name):
    net, widths = NETS[name]
    params, folder = drawn(prior.param_shapes(net, widths)), tmp_path / "prior"
    prior.write(folder, net, params, statistics(widths.embedding))
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", WEIGHTS[0]]
    assert prior.read_module(folder) == (net, widths)
    found, again, scale = prior.read(folder)
    assert found == net
    assert_same(again, params)
    assert_same(vars(scale), vars(statistics(widths.embedding)))
    shapes = {tensor: value.shape for tensor, value in load_file(folder / WEIGHTS[0]).items()}
    assert shapes == prior.tensor_shapes(net, widths)
    assert shapes["positional_embedding"] == (1, 11, 16)
    assert shapes["prd_embedding"] == (1, 1, 16)
    assert shapes["clip_mean"] == (1, 12)
    assert shapes["transformer_blocks.0.ff.net.0.proj.weight"] == (64, 16)
    assert "not empty" in refusal(prior.write, folder, net, params, scale)


def test_karlo_s():
    """The fields in Karlo's file; the others have diffusers' defaults."""
    fields = {"_class_name": "PriorTransformer", "_diffusers_version": "0.15.0.dev0", "additional_embeddings": 4}
    fields |= {"attention_head_dim": 64, "dropout": 0.0, "embedding_dim": 768, "num_attention_heads": 32}
    net, widths = prior.to_module({**fields, "num_embeddings": 77, "num_layers": 20})
    assert (net, widths) == (Prior(), Widths())
    shapes = prior.tensor_shapes(net, widths)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 1_022_030_080


def test_half_precision(folder):
    tensors = {name: value.astype(np.float16) for name, value in load_file(folder / WEIGHTS[0]).items()}
    save_file(tensors, folder / WEIGHTS[0])
    _, params, scale = prior.read(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, vars(scale)))} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(scale.mean, tensors["clip_mean"][0])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"_class_name": "UNet2DModel"}, "_class_name is 'UNet2DModel'"),
        ({"additional_embeddings": 0}, "additional_embeddings is 0 in "),
        ({"added_emb_type": None}, "added_emb_type is None in "),
        ({"dropout": 0.1}, "dropout is 0.1"),
        ({"clip_embed_dim": 24}, "clip_embed_dim is 24"),
        ({"encoder_hid_proj_type": "conv"}, "encoder_hid_proj_type is 'conv'"),
        ({"embedding_proj_norm_type": "group"}, "embedding_proj_norm_type is 'group'"),
        ({"norm_in_type": "group"}, "norm_in_type is 'group'"),
        ({"time_embed_act_fn": "tanh"}, "time_embed_act_fn is 'tanh'"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"time_embed_dim": 0}, "time_embed_dim is 0"),
        ({"magic": 1}, "magic is 1 in "),
    ],
)
def test_what_is_not_ours(folder, fields, said):
    edit(folder, **fields)
    text = refusal(prior.read, folder)
    assert said in text
    assert "config.json" in text


def test_tensors_that_do_not_fit(folder):
    path, tensors = folder / WEIGHTS[0], load_file(folder / WEIGHTS[0])
    save_file({name: value for name, value in tensors.items() if name != "clip_std"}, path)
    assert "has no tensor 'clip_std'" in refusal(prior.read, folder)
    save_file({**tensors, "norm_in.weight": np.zeros(16, np.float32)}, path)
    assert "has a tensor 'norm_in.weight'" in refusal(prior.read, folder)
    save_file({**tensors, "prd_embedding": np.zeros((1, 16), np.float32)}, path)
    assert "has shape (1, 16); accepted: (1, 1, 16)" in refusal(prior.read, folder)
    path.unlink()
    assert "has no weights" in refusal(prior.read, folder)


def test_what_diffusers_cannot_have(tmp_path):
    x, t = jnp.zeros((1, 1, 1, 12)), jnp.zeros(1)
    cond = {"tokens": jnp.zeros((1, 7, 9)), "vector": jnp.zeros((1, 12))}
    params = drawn(jax.eval_shape(NET.init, jax.random.key(0), x, t, cond)["params"])
    said = refusal(prior.write, tmp_path / "prior", NET, params, statistics(12))
    assert said == (
        "the text's tokens have width 9; accepted by diffusers' PriorTransformer: the image embeddings', 12"
    )
    assert not (tmp_path / "prior").exists()
    cond = {"tokens": jnp.zeros((1, 2, 6)), "vector": jnp.zeros((1, 5))}
    params = drawn(jax.eval_shape(MODULE.init, jax.random.key(0), jnp.zeros((1, 6)), cond)["params"])
    said = refusal(embedding_condition.write, tmp_path / "projection", MODULE, params)
    assert said.startswith("the text's embedding has width 5; accepted by diffusers' UnCLIPTextProjModel: ")


# What stands before the decoder.


def test_condition_written_and_read(tmp_path):
    params, folder = drawn(embedding_condition.param_shapes(MODULE, 6)), tmp_path / "text_proj"
    embedding_condition.write(folder, MODULE, params)
    assert embedding_condition.read_module(folder) == (MODULE, 6)
    found, again = embedding_condition.read(folder)
    assert found == MODULE
    assert_same(again, params)
    shapes = {tensor: value.shape for tensor, value in load_file(folder / WEIGHTS[0]).items()}
    assert shapes["learned_classifier_free_guidance_embeddings"] == (6,)
    assert shapes["clip_extra_context_tokens_proj.weight"] == (24, 6)
    edit(folder, cross_attention_dim=None)
    assert "cross_attention_dim is None" in refusal(embedding_condition.read, folder)
    edit(folder, cross_attention_dim=9)
    assert "accepted: (27,)" in refusal(embedding_condition.read, folder)
    edit(folder, _class_name="PriorTransformer")
    assert "accepted: 'UnCLIPTextProjModel'" in refusal(embedding_condition.read, folder)
