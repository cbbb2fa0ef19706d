import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from their_configs import (
    CONDITION_NETWORKS,
    IF_1_XL,
    IF_2_L,
    KARLO_DECODER,
    NARROW,
    STABLE_DIFFUSION_1,
    STABLE_DIFFUSION_2,
    condition_network,
)

from ddpm_jax import config as config_lib
from ddpm_jax.interop.diffusers import unet_condition
from ddpm_jax.interop.diffusers.unet_condition import Layout
from ddpm_jax.runtime.errors import UserError


def read(fields):
    config = config_lib.default_config()
    if fields.get("out_channels") == 6:
        config.diffusion.variance = "learned"
    layout = unet_condition.read(config, json.loads(json.dumps(fields)), "config.json")
    return config, config_lib.make_network(config), layout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        (STABLE_DIFFUSION_1, 859_520_964),
        (STABLE_DIFFUSION_1 | {"in_channels": 9}, 859_520_964 + 5 * 9 * 320),
        (STABLE_DIFFUSION_2, 865_910_724),
    ],
)
def test_parameters_of_stable_diffusion(measure, fields, parameters):
    _, net, layout = read(fields)
    found = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(unet_condition.param_shapes(net, layout)))
    what = f"parameters of Stable Diffusion's network with {fields['cross_attention_dim']}-wide tokens"
    measure(f"{what}, {fields['in_channels']} channels", f"diffusers' {parameters:,}", abs(found - parameters), 0)


# Fields of simple attention in diffusers' config and in ours.
THEIRS = {
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "down_block_types": ["SimpleCrossAttnDownBlock2D"] * 2,
    "up_block_types": ["SimpleCrossAttnUpBlock2D"] * 2,
}
OURS = {
    "transformer_depth": 0,
    "cross_attention": "joint",
    "norm_epsilon": 1e-5,
    "downsample": "residual",
    "downsample_padding": "symmetric",
    "upsample": "residual",
    "head_channels": 8,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fields", "parameters"),
    [
        ("Karlo's decoder", KARLO_DECODER, 885_439_686),
        ("DeepFloyd IF's first stage, XL", IF_1_XL, 4_304_695_110),
        ("a second stage like DeepFloyd IF's", IF_2_L, 1_183_628_550),
    ],
)
def test_parameters_of_simple_attention(measure, name, fields, parameters):
    _, net, layout = read(fields)
    found = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(unet_condition.param_shapes(net, layout)))
    measure(f"parameters of {name}", f"diffusers' {parameters:,}", abs(found - parameters), 0)


def test_what_karlo_and_deepfloyd_if_are():
    _, net, layout = read(KARLO_DECODER)
    assert layout == Layout(1536, 3, 3, (64, 64), vector_width=1280)
    assert (net.cross_attention, net.vector_embedding, net.head_channels) == ("joint", "none", 64)
    assert (net.learned_variance, net.scale_shift, net.downsample, net.upsample) == (True, True, "residual", "residual")
    _, net, layout = read(IF_1_XL)
    assert layout == Layout(4096, 3, 3, (64, 64))
    assert (net.token_channels, net.pooling_heads, net.context_groups) == (2816, 64, 32)
    assert (net.activation, net.outer_activation, net.time_activations) == ("gelu", "gelu", ())
    _, net, layout = read(IF_2_L)
    assert layout == Layout(4096, 6, 3, (256, 256), level=True)
    assert (net.cross_attention, net.res_blocks, net.time_channels) == ("alone", [2, 2, 3, 5, 5], 1280)
    assert net.residual_scale == net.middle_residual_scale == pytest.approx(2**0.5, rel=1e-4)
    assert net.time_activations == ("gelu",)
    x, _, cond = unet_condition.example(net, layout)
    assert (x.shape, cond["image"].shape, cond["level"].shape) == ((1, 16, 16, 3), (1, 16, 16, 3), (1,))


def test_what_stable_diffusion_is():
    _, net, layout = read(STABLE_DIFFUSION_1)
    assert layout == Layout(768, 4, 4, (64, 64), False, False)
    assert (net.num_heads, net.head_channels, net.transformer_depth) == (8, None, 1)
    assert (net.time_cosines_first, net.time_frequency_shift, net.norm_epsilon) == (True, 0.0, 1e-5)
    assert (net.widths, net.attention_levels) == ([320, 640, 1280, 1280], (True, True, True, False))
    _, net, layout = read(STABLE_DIFFUSION_2)
    assert layout == Layout(1024, 4, 4, (96, 96), True, True)
    assert (net.num_heads, net.head_channels) == (1, 64)
    _, net, layout = read(STABLE_DIFFUSION_1 | {"in_channels": 9})
    x, _, cond = unet_condition.example(net, layout)
    assert (x.shape, cond["image"].shape, cond["tokens"].shape) == ((1, 8, 8, 4), (1, 8, 8, 5), (1, 77, 768))


@pytest.mark.parametrize("name", CONDITION_NETWORKS)
def test_fields_there_and_back(name):
    fields = json.loads(json.dumps(condition_network(name)))
    found = json.loads(json.dumps(unet_condition.to_fields(*read(fields))))
    heads = found["attention_head_dim"]
    if fields["attention_head_dim"] == [heads] * len(fields["block_out_channels"]):
        found["attention_head_dim"] = fields["attention_head_dim"]  # the same number for all levels
    assert {field: found[field] for field in fields} == fields
    assert found["_class_name"] == "UNet2DConditionModel"
    again = unet_condition.to_fields(*read(found))
    assert json.loads(json.dumps(again)) == found | {"attention_head_dim": heads}


def test_learned_variance():
    config = config_lib.default_config()
    config.diffusion.variance = "learned"
    layout = unet_condition.read(config, NARROW | {"out_channels": 8}, "config.json")
    assert (layout.in_channels, layout.latent_channels) == (4, 4)
    net = config_lib.make_network(config)
    assert unet_condition.to_fields(config, net, layout)["out_channels"] == 8
    assert unet_condition.tensor_shapes(net, layout)["conv_out.weight"] == (8, 16, 3, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONDITION_NETWORKS)
def test_every_tensor_there_and_back(name):
    _, net, layout = read(condition_network(name))
    shapes, rng = unet_condition.param_shapes(net, layout), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    tensors = unet_condition.to_tensors(params, len(net.widths), layout.linear_projections)
    assert {name: value.shape for name, value in tensors.items()} == unet_condition.tensor_shapes(net, layout)
    jax.tree.map(np.testing.assert_array_equal, unet_condition.to_params("x", tensors, net, layout), params)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["like 1.x", "like 2.x", "inpainting"])
def test_tensors_there_and_back(name):
    _, net, layout = read(condition_network(name))
    shapes, rng = unet_condition.param_shapes(net, layout), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    tensors = unet_condition.to_tensors(params, len(net.widths), layout.linear_projections)
    assert {name: value.shape for name, value in tensors.items()} == unet_condition.tensor_shapes(net, layout)
    projection = (16, 16) if name == "like 2.x" else (16, 16, 1, 1)
    assert tensors["down_blocks.0.attentions.0.proj_in.weight"].shape == projection
    assert tensors["up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k.weight"].shape == (16, 12)
    assert tensors["mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight"].shape == (256, 32)
    assert tensors["conv_in.weight"].shape == (16, 9 if name == "inpainting" else 4, 3, 3)
    found = unet_condition.to_params("x.safetensors", tensors, net, layout)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    halves = {tensor: value.astype(jnp.bfloat16) for tensor, value in tensors.items()}
    found = unet_condition.to_params("x.safetensors", halves, net, layout)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(np.float32), params)
    jax.tree.map(np.testing.assert_array_equal, found, rounded)


def test_tensors_of_another_network():
    _, net, layout = read(NARROW)
    empty = {name: np.zeros(shape, np.float32) for name, shape in unet_condition.tensor_shapes(net, layout).items()}
    name = "down_blocks.0.attentions.0.proj_in.weight"
    said = rf"tensor '{name}' in 'x' has shape \(16, 16\); accepted: \(16, 16, 1, 1\)"
    with pytest.raises(UserError, match=said):
        unet_condition.to_params("x", empty | {name: np.zeros((16, 16), np.float32)}, net, layout)
    with pytest.raises(UserError, match=r"'x' has no tensor 'conv_in\.weight'"):
        unet_condition.to_params("x", {name: v for name, v in empty.items() if name != "conv_in.weight"}, net, layout)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "transformer_layers_per_block": [0, 2],
            },
            "addition_embed_type is 'text_time' in 'config.json', which is for Stable Diffusion XL; ",
        ),
        ({"addition_embed_type": "image"}, "addition_embed_type is 'image' in 'config.json'; accepted: None, 'text'"),
        ({"addition_embed_type": "text"}, "addition_embed_type_num_heads is 64 in 'config.json'; accepted: "),
        ({"_class_name": "UNet2DModel"}, "_class_name is 'UNet2DModel'"),
        ({"magic": 1}, "magic is 1 in 'config.json', but this project does not support this field"),
        ({"class_embed_type": "simple_projection"}, "class_embed_type is 'simple_projection'"),
        ({"class_embed_type": "projection"}, "projection_class_embeddings_input_dim is None in 'config.json'; "),
        ({"projection_class_embeddings_input_dim": 8}, "projection_class_embeddings_input_dim is 8"),
        ({"num_class_embeds": 1000}, "num_class_embeds is 1000"),
        ({"encoder_hid_dim": 0}, "encoder_hid_dim is 0"),
        ({"encoder_hid_dim": 8, "encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type is 'image_proj'"),
        ({"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type is 'text_proj'"),
        ({"only_cross_attention": True}, "only_cross_attention is True in 'config.json'; accepted: False"),
        ({"only_cross_attention": [True, False]}, "only_cross_attention is [True, False]"),
        ({"dual_cross_attention": True}, "dual_cross_attention is True"),
        ({"upcast_attention": None}, "upcast_attention is None in 'config.json'; accepted: False, True"),
        ({"use_linear_projection": "no"}, "use_linear_projection is 'no'"),
        (
            {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
            "down_block_types is 'CrossAttnDownBlock2D' in 'config.json'; accepted: 'ResnetDownsampleBlock2D', 'Simple",
        ),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type is 'UNetMidBlock2D'"),
        ({"mid_block_type": None}, "mid_block_type is None"),
        ({"down_block_types": ["SimpleCrossAttnDownBlock2D", "DownBlock2D"]}, "is 'SimpleCrossAttnDownBlock2D'"),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "down_block_types is 'AttnDownBlock2D'"),
        ({"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}, "accepted: attention at the levels of down_block_ty"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim is 256"),
        ({"conv_in_kernel": 1}, "conv_in_kernel is 1 in 'config.json'; accepted: 3"),
        ({"conv_out_kernel": 5}, "conv_out_kernel is 5"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'"),
        ({"time_embedding_act_fn": "elu"}, "time_embedding_act_fn is 'elu'"),
        ({"timestep_post_act": "silu"}, "timestep_post_act is 'silu'"),
        ({"act_fn": "elu"}, "act_fn is 'elu' in 'config.json'; accepted: 'silu', 'swish', 'gelu', 'mish', 'relu'"),
        ({"attention_type": "gated"}, "attention_type is 'gated'"),
        ({"resnet_skip_time_act": True}, "resnet_skip_time_act is True"),
        ({"resnet_out_scale_factor": 1.4}, "resnet_out_scale_factor is 1.4"),
        ({"cross_attention_norm": "group_norm"}, "cross_attention_norm is 'group_norm'"),
        ({"num_attention_heads": 4}, "num_attention_heads is 4"),
        ({"attention_head_dim": None}, "attention_head_dim is None"),
        ({"attention_head_dim": 5}, "accepted: 'numbers of heads that divide the channels (16, 32)'"),
        ({"attention_head_dim": [2, 8]}, "accepted: 'the same number of heads at all levels', 'heads of"),
        ({"attention_head_dim": [2, 4, 8]}, "attention_head_dim is [2, 4, 8] in 'config.json'; accepted: 'one value"),
        ({"layers_per_block": [1, 0]}, "layers_per_block is [1, 0]"),
        ({"layers_per_block": [1, 2, 3]}, "layers_per_block is [1, 2, 3]"),
        ({"transformer_layers_per_block": [1, 10]}, "transformer_layers_per_block is [1, 10]"),
        ({"transformer_layers_per_block": 0}, "transformer_layers_per_block is 0"),
        ({"reverse_transformer_layers_per_block": [1, 1]}, "reverse_transformer_layers_per_block is [1, 1]"),
        ({"cross_attention_dim": [12, 16]}, "cross_attention_dim is [12, 16]"),
        ({"cross_attention_dim": None}, "cross_attention_dim is None"),
        ({"in_channels": 3}, "in_channels is 3"),
        ({"in_channels": 9, "center_input_sample": True}, "center_input_sample is True"),
        ({"sample_size": None}, "sample_size is None"),
    ],
)
def test_what_is_not_ours(fields, said):
    with pytest.raises(UserError) as caught:
        read({**NARROW, **fields})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({**THEIRS, "resnet_skip_time_act": True}, "resnet_skip_time_act is True in 'config.json'; accepted: False"),
        ({**THEIRS, "norm_eps": 1e-6}, "norm_eps is 1e-06 in 'config.json'; accepted: 1e-05"),
        ({**THEIRS, "cross_attention_norm": "layer_norm"}, "cross_attention_norm is 'layer_norm'"),
        ({**THEIRS, "only_cross_attention": [False, True]}, "only_cross_attention is [False, True]"),
        ({**THEIRS, "mid_block_only_cross_attention": True}, "only_cross_attention is False"),
        ({**THEIRS, "attention_head_dim": 64}, "attention_head_dim is 64"),
        ({**THEIRS, "attention_head_dim": [4, 8]}, "heads of the same width at all levels"),
    ],
)
def test_what_is_not_ours_of_simple_attention(options, said):
    with pytest.raises(UserError) as caught:
        read({**NARROW, **options})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"transformer_depth": 0},
            "config.model.transformer_depth is 0; diffusers' UNet2DConditionModel needs 1 or more",
        ),
        ({"middle_attention": False}, "config.model.middle_attention is False"),
        ({"activation": "gelu"}, "config.model.outer_activation is 'swish'; .* only supports 'gelu'"),
        ({"residual_scale": 2.0}, "config.model.residual_scale is 2.0"),
        ({"skip_scale": 0.5}, "config.model.skip_scale is 0.5"),
        ({"time_activations": ("relu",)}, r"config.model.time_activations is \('relu',\); .* 'swish'"),
        ({**OURS, "norm_epsilon": 1e-6}, "config.model.norm_epsilon is 1e-06; .* only supports 1e-05"),
        ({**OURS, "upsample": "nearest"}, "config.model.upsample is 'nearest'; .* only supports residual with simple"),
        ({**OURS, "head_channels": 0}, "config.model.head_channels is 0"),
        ({**OURS, "context_groups": 4}, "config.model.context_groups is 4; .* only supports 0 or 32"),
        ({"time_embedding": "learned"}, "config.model.time_embedding is 'learned'"),
        ({"channel_multipliers": (2, 4)}, "config.model.channels is 8; .* begins with the 16 channels of the first"),
        ({"downsample": "residual"}, "config.model.downsample is 'residual'; .* only supports conv at"),
        ({"upsample": "transposed"}, "config.model.upsample is 'transposed'"),
        ({"center_input": True}, "config.model.center_input is True"),
    ],
)
def test_what_diffusers_does_not_have(options, said):
    config = config_lib.default_config()
    model = {"channels": 8, "channel_multipliers": (1, 2), "num_groups": 4, "transformer_depth": 1}
    config.model.update({**model, "attention_levels": (True, True), **options})
    with pytest.raises(UserError, match=said):
        unet_condition.to_fields(config, config_lib.make_network(config), Layout(12, in_channels=9))
