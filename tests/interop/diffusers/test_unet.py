import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from their_configs import DEFAULT, KARLO_SUPER_RESOLUTION, NARROW_SUPER_RESOLUTION, NETWORKS, network
from tiny import of_classes

from ddpm_jax import config as config_lib
from ddpm_jax.interop.diffusers import folder, unet
from ddpm_jax.runtime.errors import UserError


def read(fields):
    config = config_lib.default_config()
    num_classes = unet.read(config, json.loads(json.dumps(fields)), "config.json")
    return config, config_lib.make_model(config, of_classes(num_classes)).net


def written(fields):
    """The exported config, as in a JSON file."""
    return json.loads(json.dumps(unet.to_fields(*read(fields))))


@pytest.mark.parametrize("name", NETWORKS)
def test_fields_there_and_back(name):
    fields = json.loads(json.dumps(network(name)))
    found = written(fields)
    assert {field: found[field] for field in fields} == fields
    unsaid = {"norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1}
    unsaid |= {"attention_head_dim": 8, "resnet_time_scale_shift": "default", "attn_norm_num_groups": None}
    unsaid |= {"time_embedding_type": "positional", "add_attention": True, "num_class_embeds": None}
    assert {field: found[field] for field in unsaid} == unsaid | {k: v for k, v in fields.items() if k in unsaid}


@pytest.mark.slow
def test_super_resolution():
    """Karlo's: the last channels of the input are those of `cond["image"]`."""
    config = config_lib.default_config()
    unet.read(config, KARLO_SUPER_RESOLUTION, "config.json", image_channels=3)
    assert config.data.channels == 3
    shapes = unet.tensor_shapes(config, image_channels=3)
    assert shapes["conv_in.weight"] == (320, 6, 3, 3)
    assert sum(math.prod(shape) for shape in shapes.values()) == 691_579_523  # diffusers'
    unet.read(config, NARROW_SUPER_RESOLUTION, "config.json", image_channels=3)
    unet.check_out_channels(config, NARROW_SUPER_RESOLUTION, "config.json")
    net = config_lib.make_network(config)
    found = json.loads(json.dumps(unet.to_fields(config, net, image_channels=3)))
    expected = json.loads(json.dumps(NARROW_SUPER_RESOLUTION))
    # In the last level, which is not made smaller, both types of blocks are the same.
    blocks = {"down_block_types": ["ResnetDownsampleBlock2D", "DownBlock2D"]}
    blocks |= {"up_block_types": ["ResnetUpsampleBlock2D", "UpBlock2D"]}
    assert {field: found[field] for field in expected} == expected | blocks
    rng = np.random.default_rng(0)
    shapes = unet.tensor_shapes(config, image_channels=3)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    params = unet.to_params("x", tensors, config, image_channels=3)
    for name, value in unet.to_tensors(params, len(net.widths)).items():
        np.testing.assert_array_equal(value, tensors[name])
    with pytest.raises(UserError, match="in_channels is 6 in"):
        unet.read(config, NARROW_SUPER_RESOLUTION, "config.json", image_channels=6)
    with pytest.raises(UserError, match="center_input_sample is True"):
        unet.read(config, NARROW_SUPER_RESOLUTION | {"center_input_sample": True}, "config.json", image_channels=3)


def test_diffusers_defaults():
    config, net = read(DEFAULT)
    assert (net.time_cosines_first, net.time_frequency_shift, net.norm_epsilon) == (True, 0.0, 1e-5)
    assert (net.downsample_padding, net.head_channels, net.widths) == ("symmetric", 8, [16, 32])
    assert config.model.channel_multipliers == (1, 2)
    assert net.middle_attention_groups is None
    assert net.num_classes is None


def test_other_options():
    _, net = read(network("scale shift, no middle norm"))
    assert (net.middle_attention_groups, net.head_channels) == (0, None)
    assert (net.num_classes, net.null_class) == (5, False)
    _, net = read(network("residual resampling"))
    assert net.downsample_levels == ("residual", "conv", "residual")
    assert net.upsample_levels == ("residual", "residual", "nearest")
    config, net = read(network("any widths"))
    assert (config.data.height, config.data.width, config.data.channels) == (8, 16, 2)
    assert net.widths == [16, 24, 40]


def test_resampling_of_one_kind():
    """UNetRes is an old prefix; if all levels use the same resampling, one field gives it."""
    fields = {"down_block_types": ("UNetResDownBlock2D", "AttnDownBlock2D"), "downsample_type": None}
    assert read(DEFAULT | fields)[0].model.downsample == "conv"
    fields = {"down_block_types": ("AttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "AttnUpBlock2D")}
    config, _ = read(DEFAULT | fields | {"downsample_type": "resnet", "upsample_type": "resnet"})
    assert (config.model.downsample, config.model.upsample) == ("residual", "nearest")


@pytest.mark.parametrize("name", ["residual resampling", "scale shift, no middle norm", "learned time"])
def test_tensors_there_and_back(name):
    config, net = read(network(name))
    model, rng = config_lib.make_model(config, of_classes(net.num_classes or 0)), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), model.param_shapes())
    tensors = unet.to_tensors(params, len(net.widths))
    expected = {
        "residual resampling": ("up_blocks.2.upsamplers.0.norm2.weight", (8,)),
        "scale shift, no middle norm": ("class_embedding.weight", (5, 64)),
        "learned time": ("time_proj.weight", (1000, 16)),
    }
    tensor, shape = expected[name]
    assert tensors[tensor].shape == shape
    assert ("mid_block.attentions.0.group_norm.weight" in tensors) == (name == "residual resampling")
    found = unet.to_params("x.safetensors", tensors, config, net.num_classes or 0)
    jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision(dtype):
    """It becomes float32; other types are refused."""
    config, net = read(DEFAULT)
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in unet.tensor_shapes(config).items()
    }
    halves = {name: value.astype(dtype) for name, value in tensors.items()}
    found = unet.to_tensors(unet.to_params("x.safetensors", halves, config), len(net.widths))
    for name, value in halves.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], value.astype(np.float32))
    name = "conv_in.bias"
    with pytest.raises(UserError, match=f"tensor '{name}' in 'x.safetensors' is float64; accepted: float32"):
        unet.to_params("x.safetensors", tensors | {name: tensors[name].astype(np.float64)}, config)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"act_fn": "elu"}, "act_fn is 'elu'"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier' in 'config.json', which divides by"),
        ({"time_embedding_type": "learned"}, "num_train_timesteps is None in 'config.json'; accepted: 1000"),
        ({"time_embedding_dim": 64}, "time_embedding_dim is 64"),
        ({"downsample_padding": 2}, "downsample_padding is 2 in 'config.json'; accepted: 0, 1"),
        ({"downsample_type": "pool"}, "downsample_type is 'pool'"),
        ({"upsample_type": "deconv"}, "upsample_type is 'deconv'"),
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ({"num_class_embeds": 0}, "num_class_embeds is 0"),
        ({"mid_block_type": None}, "mid_block_type is None"),
        ({"mid_block_scale_factor": 2}, "mid_block_scale_factor is 2"),
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "down_block_types is 'SkipDownBlock2D'"),
        ({"up_block_types": ["KUpBlock2D", "UpBlock2D"]}, "up_block_types is 'KUpBlock2D'"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "accepted: attention at the levels of down_block_types"),
        ({"block_out_channels": [8, 16, 24]}, "down_block_types is ('DownBlock2D', 'AttnDownBlock2D')"),
        ({"norm_num_groups": 0}, "config.model.num_groups is 0"),
        ({"attention_head_dim": 0}, "attention_head_dim is 0"),
        ({"attention_head_dim": 33}, "head_channels 33 is more than the 32 channels of a level"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift is 'spatial'"),
        ({"freq_shift": 2}, "config.model.time_frequency_shift is 2.0; accepted: 0 to 1"),
        ({"in_channels": 1}, "out_channels is 3 in 'config.json'; accepted: 1"),
        ({"magic": 1}, "magic is 1 in 'config.json', but this project does not support this field"),
        ({"_class_name": "UNet2DConditionModel"}, "_class_name is 'UNet2DConditionModel'"),
        ({"sample_size": None}, "sample_size is None"),
        ({"sample_size": 9, "downsample_padding": 0}, "an image of 9x9 cannot be halved 1 times"),
        ({"layers_per_block": "two"}, "num_res_blocks"),
        ({"block_out_channels": "ab"}, "has an invalid value"),
    ],
)
def test_what_is_not_ours(fields, said):
    with pytest.raises(UserError) as caught:
        folder.describe({**DEFAULT, **fields}, {})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"downsample": "avg_pool"}, "config.model.downsample is 'avg_pool'; diffusers' UNet2DModel only supports"),
        ({"upsample": "transposed"}, "config.model.upsample is 'transposed'"),
        ({"attention_patch_size": 2}, "config.model.attention_patch_size is 2"),
        ({"class_conditional": True}, "config.model.class_conditional is True"),
        ({"channel_multipliers": (2, 4)}, "config.model.channels is 8; .* begins with the 16 channels of the first"),
        ({"middle_attention_groups": 0}, "only leaves out that norm with scale_shift"),
        ({"num_heads": 2, "attention_levels": (True, True)}, r"config.model.num_heads is 2; .*levels of \[8, 16\]"),
        (
            {
                "channel_multipliers": (1, 1, 1),
                "attention_levels": (True, True, True),
                "downsample_levels": ("conv", "residual"),
            },
            r"config.model.downsample_levels is \('conv', 'residual'\)",
        ),
    ],
)
def test_what_diffusers_does_not_have(options, said):
    config = config_lib.default_config()
    config.model.update({"channels": 8, "channel_multipliers": (1, 2), "num_groups": 4, **options})
    with pytest.raises(UserError, match=said):
        unet.to_fields(config, config_lib.make_network(config))


def test_heads_become_their_channels():
    config = config_lib.default_config()
    config.model.update(channels=8, channel_multipliers=(1, 2), num_groups=4, num_heads=2, scale_shift=True)
    config.model.attention_levels = (False, True)
    fields = unet.to_fields(config, config_lib.make_network(config))
    assert (fields["attention_head_dim"], fields["attn_norm_num_groups"]) == (8, 4)
    _, net = read(fields)
    assert (net.head_channels, net.middle_attention_groups) == (8, None)
