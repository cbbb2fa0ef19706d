"""Converts the config and tensors of diffusers' `UNet2DModel` to this project's UNet and back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax.interop import tensors as tensors_lib
from ddpm_jax.interop.diffusers import unet_tensors
from ddpm_jax.interop.diffusers.fields import check_accepted, choose, refusal, with_defaults
from ddpm_jax.models.unet import UNet
from ddpm_jax.runtime.errors import UserError

_NAME = "UNet2DModel"
# All fields, with diffusers' defaults for those missing from a file.
_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
# Fields for which this project supports these values only.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "time_embedding_dim": (None,),
    "class_embed_type": (None,),
}
# Block types: plain, with attention, with residual resampling.
_DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
_UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
ACTIVATIONS = {"silu": "swish", "swish": "swish", "gelu": "gelu", "mish": "mish", "relu": "relu"}
# Options of config.model that have only one value in a `UNet2DModel`, but more in diffusers' other networks.
_ONLY: dict[str, Any] = {
    "level_res_blocks": (),
    "cross_attention": "separate",
    "token_channels": 0,
    "pooling_heads": 0,
    "outer_activation": "swish",
    "residual_scale": 1,
    "middle_residual_scale": 1,
    "skip_scale": 1,
    "time_channels": 0,
    "time_activations": (),
}
_PADDINGS = {0: "same", 1: "symmetric"}
_SHIFTS = {"default": False, "scale_shift": True}
# For blocks with attention; for the others, the block type determines this.
_DOWNSAMPLERS = {"conv": "conv", "resnet": "residual", None: "conv"}
_UPSAMPLERS = {"conv": "nearest", "resnet": "residual", None: "nearest"}


# The config.


def read(config: ConfigDict, found: Mapping[str, Any], where: str, image_channels: int = 0) -> int:
    """Sets the fields of a run's config from a `UNet2DModel`'s config.

    Args:
      config: of a run, with its diffusion already set.
      found: the fields of the file.
      where: its name.
      image_channels: how many of the input's last channels belong to `cond["image"]`: for super-resolution as many as
        the images have.

    Returns:
      The network's number of classes; 0: none.

    Raises:
      UserError: a value that this project's network does not support, with the name of its field.
    """
    check_accepted(where, {"_class_name": _NAME, **found}, {"_class_name": (_NAME,)})
    unet = with_defaults(where, found, _DEFAULTS)
    check_accepted(where, unet, _ACCEPTED)
    size, num_classes = read_size(unet, where), unet["num_class_embeds"]
    downsampler = choose(where, unet, "downsample_type", _DOWNSAMPLERS)
    upsampler = choose(where, unet, "upsample_type", _UPSAMPLERS)
    attention, halvings, doublings = read_blocks(
        unet, where, _DOWN_BLOCKS, _UP_BLOCKS, ("conv", downsampler, "residual"), ("nearest", upsampler, "residual")
    )
    head_channels = unet["attention_head_dim"]
    if head_channels is not None and head_channels < 1:
        raise refusal(where, "attention_head_dim", head_channels, ("1 or more", None))
    if num_classes is not None and num_classes < 1:
        raise refusal(where, "num_class_embeds", num_classes, ("1 or more", None))
    groups, middle_groups = unet["norm_num_groups"], unet["attn_norm_num_groups"]
    if middle_groups is None:  # then a network with scale_shift has no norm there
        middle_groups = 0 if choose(where, unet, "resnet_time_scale_shift", _SHIFTS) else groups
    channels = unet["in_channels"] - image_channels
    if channels < 1:
        raise refusal(where, "in_channels", unet["in_channels"], (f"more than the {image_channels} of another image",))
    if unet["center_input_sample"] and image_channels:
        raise refusal(where, "center_input_sample", True, (f"with {unet['in_channels']} in_channels, False",))
    config.data.update(source="folder", height=size[0], width=size[1], channels=channels)
    config.model.update(
        **read_common(unet, where, attention, halvings, doublings),
        middle_attention=unet["add_attention"],
        middle_attention_groups=-1 if middle_groups == groups else middle_groups,
        num_heads=1,
        head_channels=head_channels or 0,
        activation=choose(where, {"act_fn": str(unet["act_fn"]).lower()}, "act_fn", ACTIVATIONS),
        time_embedding=_read_time_embedding(unet, len(config_lib.make_betas_from(config)), where),
        class_conditional=num_classes is not None,
        null_class=num_classes is None,
    )
    return num_classes or 0


def read_common(
    unet: Mapping[str, Any],
    where: str,
    attention: tuple[bool, ...],
    halvings: tuple[str, ...],
    doublings: tuple[str, ...],
) -> dict[str, Any]:
    """The fields of config.model that mean the same in a `UNet2DModel` and a `UNet2DConditionModel`.

    Args:
      unet: the fields of the file `where`.
      attention, halvings, doublings: from `read_blocks`.
    """
    widths = tuple(unet["block_out_channels"])
    fields = {
        "channels": widths[0],
        "num_res_blocks": unet["layers_per_block"],
        "attention_levels": attention,
        "attention_resolutions": (),
        "dropout": float(unet["dropout"]),
        "num_groups": unet["norm_num_groups"],
        "norm_epsilon": float(unet["norm_eps"]),
        "time_frequency_shift": float(unet["freq_shift"]),
        "time_cosines_first": unet["flip_sin_to_cos"],
        "scale_shift": choose(where, unet, "resnet_time_scale_shift", _SHIFTS),
        "downsample_padding": choose(where, unet, "downsample_padding", _PADDINGS),
        "center_input": unet["center_input_sample"],
    }
    if all(width % widths[0] == 0 for width in widths):
        fields["channel_multipliers"] = tuple(width // widths[0] for width in widths)
    else:
        fields["level_channels"] = widths
    for name, methods in (("downsample", halvings), ("upsample", doublings)):
        if len(set(methods)) == 1:
            fields[name] = methods[0]
        else:
            fields[f"{name}_levels"] = methods
    return fields


def read_size(unet: Mapping[str, Any], where: str) -> tuple[int, int]:
    """The image height and width that the network was made for."""
    size = unet["sample_size"]
    if isinstance(size, int):
        size = (size, size)
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise refusal(where, "sample_size", size, ("a side", "[height, width]"))
    return size[0], size[1]


def read_blocks(
    unet: Mapping[str, Any],
    where: str,
    down_blocks: Sequence[str],
    up_blocks: Sequence[str],
    halvings: Sequence[str],
    doublings: Sequence[str],
) -> tuple[tuple[bool, ...], tuple[str, ...], tuple[str, ...]]:
    """Whether each level has attention, and the method of each halving and doubling, from the full size down.

    Args:
      unet: the fields of the file `where`.
      down_blocks, up_blocks: the accepted block types: plain, with attention and residual.
      halvings, doublings: how each of these types changes the size.

    Raises:
      UserError: another type, different numbers of blocks and levels, or attention at different levels down and up.
    """
    sides = []
    for field, accepted in (("down_block_types", down_blocks), ("up_block_types", up_blocks)):
        blocks = [block.removeprefix("UNetRes") for block in unet[field]]
        unknown = [block for block in blocks if block not in accepted]
        if unknown or len(blocks) != len(unet["block_out_channels"]):
            raise refusal(where, field, unknown[0] if unknown else unet[field], dict.fromkeys(accepted))
        sides.append([accepted.index(block) for block in blocks])
    down, up = sides[0], sides[1][::-1]
    attention = tuple(kind == 1 for kind in down)
    if tuple(kind == 1 for kind in up) != attention:
        raise UserError(
            f"up_block_types is {unet['up_block_types']} in {where!r}; accepted: attention at the levels of "
            "down_block_types"
        )
    return attention, tuple(halvings[kind] for kind in down[:-1]), tuple(doublings[kind] for kind in up[1:])


def _read_time_embedding(unet: Mapping[str, Any], num_timesteps: int, where: str) -> str:
    kind = unet["time_embedding_type"]
    if kind == "fourier":
        raise UserError(
            f"time_embedding_type is 'fourier' in {where!r}, which divides by the logarithm of t and is undefined at "
            "t = 0; accepted: 'positional', 'learned'"
        )
    if kind == "learned" and unet["num_train_timesteps"] != num_timesteps:
        raise refusal(where, "num_train_timesteps", unet["num_train_timesteps"], (num_timesteps,))
    return choose(where, unet, "time_embedding_type", {"positional": "sinusoids", "learned": "learned"})


def complete(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """All fields of a `UNet2DModel`, with diffusers' defaults for missing ones; UserError for unknown ones."""
    return with_defaults(where, found, _DEFAULTS)


def check_out_channels(config: ConfigDict, found: Mapping[str, Any], where: str) -> None:
    """UserError unless the network's output has the channels of one image, or of two with a learned variance."""
    expected = config.data.channels * (2 if config.diffusion.variance == "learned" else 1)
    check_accepted(where, {**_DEFAULTS, **found}, {"out_channels": (expected,)})


def to_fields(config: ConfigDict, net: UNet, image_channels: int = 0) -> dict[str, Any]:
    """The config of the `UNet2DModel` equivalent to a run's network; image_channels as in `read`.

    Raises:
      UserError: an option that diffusers' network does not support; it is named.
    """
    model, data = config.model, config.data
    if net.num_classes is not None and net.null_class:
        raise lacking("class_conditional", True, "has no null class, which model.null_class=True adds", _NAME)
    for field, accepted in _ONLY.items():
        if model[field] != accepted:
            raise lacking(field, model[field], f"only supports {accepted!r}", _NAME)
    if model.center_input and image_channels:
        raise lacking("center_input", True, "would also centre the image that is concatenated to the input", _NAME)
    groups = net.middle_attention_groups
    if groups == 0 and not model.scale_shift and model.middle_attention:
        raise lacking("middle_attention_groups", 0, "only leaves out that norm with scale_shift", _NAME)
    attends = net.levels_with_attention(data.height, data.width)
    inverse = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    fields = {
        **common_fields(config, net, (data.height, data.width), _NAME),
        "in_channels": data.channels + image_channels,
        "out_channels": data.channels * (2 if net.learned_variance else 1),
        "time_embedding_type": "learned" if model.time_embedding == "learned" else "positional",
        "mid_block_type": "UNetMidBlock2D",
        "act_fn": inverse[model.activation],
        "attention_head_dim": _head_channels(net, attends),
        "attn_norm_num_groups": (model.num_groups if model.scale_shift else None) if groups is None else groups or None,
        "add_attention": model.middle_attention,
        "num_class_embeds": net.num_classes,
        **write_blocks(net, attends, _DOWN_BLOCKS, _UP_BLOCKS, _NAME),
        **_samplers(net, attends),
    }
    return fields | ({"num_train_timesteps": net.num_timesteps} if net.num_timesteps else {})


def common_fields(config: ConfigDict, net: UNet, size: tuple[int, int], kind: str) -> dict[str, Any]:
    """The fields that mean the same in a `UNet2DModel` and a `UNet2DConditionModel`.

    Args:
      config, net: of the run.
      size: the image height and width that the network is for.
      kind: the name of the class.

    Raises:
      UserError: an option that neither supports; it is named.
    """
    model = config.model
    if model.attention_patch_size != 1:
        raise lacking("attention_patch_size", model.attention_patch_size, "only supports 1", kind)
    if net.widths[0] != net.channels:
        raise lacking("channels", net.channels, f"begins with the {net.widths[0]} channels of the first level", kind)
    shift = model.time_frequency_shift
    return {
        "_class_name": kind,
        "sample_size": size[0] if size[0] == size[1] else list(size),
        "center_input_sample": model.center_input,
        "freq_shift": int(shift) if shift == int(shift) else shift,
        "flip_sin_to_cos": model.time_cosines_first,
        "mid_block_scale_factor": 1,
        "block_out_channels": net.widths,
        "layers_per_block": model.num_res_blocks,
        "downsample_padding": {ours: theirs for theirs, ours in _PADDINGS.items()}[model.downsample_padding],
        "dropout": model.dropout,
        "norm_num_groups": model.num_groups,
        "norm_eps": model.norm_epsilon,
        "resnet_time_scale_shift": "scale_shift" if model.scale_shift else "default",
        "class_embed_type": None,
    }


def lacking(field: str, value: Any, what: str, kind: str) -> UserError:
    """The error for an option of ours that diffusers' class `kind` does not support."""
    return UserError(f"config.model.{field} is {value!r}; diffusers' {kind} {what}")


def _head_channels(net: UNet, attends: list[bool]) -> int | None:
    if net.head_channels or net.num_heads == 1:
        return net.head_channels
    with_attention = {width for width, attention in zip(net.widths, attends, strict=True) if attention}
    with_attention |= {net.widths[-1]} if net.middle_attention else set()
    if len(with_attention) > 1:
        channels = f"levels of {sorted(with_attention)} channels"
        raise lacking(
            "num_heads", net.num_heads, f"needs equally wide heads at all levels, but there are {channels}", _NAME
        )
    return with_attention.pop() // net.num_heads if with_attention else None


def resampling(net: UNet) -> tuple[list[str], list[str]]:
    """The method of each halving and each doubling, from the full size down."""
    levels = len(net.widths) - 1
    return (
        list(net.downsample_levels or [net.downsample] * levels),
        list(net.upsample_levels or [net.upsample] * levels),
    )


def write_blocks(
    net: UNet, attends: Sequence[bool], down_blocks: Sequence[str], up_blocks: Sequence[str], kind: str
) -> dict[str, list[str]]:
    """The fields with the block types.

    Args:
      net: of the run.
      attends: whether each level has attention.
      down_blocks, up_blocks: the types: plain, with attention and residual.
      kind: the name of the class.

    Raises:
      UserError: a resampling method that no block supports; it is named.
    """
    down, up = resampling(net)
    for field, methods, accepted in (("downsample", down, _DOWNSAMPLERS), ("upsample", up, _UPSAMPLERS)):
        unknown = [method for method in methods if method not in accepted.values()]
        if unknown:
            raise lacking(field, unknown[0], f"only supports {' and '.join(sorted(set(accepted.values())))}", kind)

    def types(names: Sequence[str], methods: list[str]) -> list[str]:
        plain, attention, residual = names
        return [
            attention if attends_here else residual if method == "residual" else plain
            for attends_here, method in zip(attends, methods, strict=True)
        ]

    return {
        "down_block_types": types(down_blocks, [*down, "conv"]),
        "up_block_types": types(up_blocks, ["nearest", *up])[::-1],
    }


def _samplers(net: UNet, attends: list[bool]) -> dict[str, str]:
    """The fields with the resampling types of blocks with attention."""
    down, up = resampling(net)
    types = {}
    for name, methods, levels in (("downsample", down, attends[:-1]), ("upsample", up, attends[1:])):
        chosen = {method for method, attention in zip(methods, levels, strict=True) if attention}
        if len(chosen) > 1:
            what = "needs the same method at all levels with attention"
            raise lacking(f"{name}_levels", tuple(methods), what, _NAME)
        types[f"{name}_type"] = "resnet" if "residual" in chosen else "conv"
    return types


# The tensors.


def _param_shapes(config: ConfigDict, num_classes: int, image_channels: int) -> dict[str, Any]:
    names = [str(number) for number in range(num_classes)]
    model = config_lib.make_model(config, {"class_names": names})
    if not image_channels:
        return model.param_shapes()
    side = 2 ** (_levels(config) - 1)
    shapes = ((1, side, side, config.data.channels), (1, side, side, image_channels))

    def init() -> Any:
        x, image = map(jnp.zeros, shapes)
        return model.net.init(jax.random.key(0), x, jnp.zeros(1, jnp.int32), {"image": image})["params"]

    return jax.eval_shape(init)


def _levels(config: ConfigDict) -> int:
    return len(config.model.level_channels or config.model.channel_multipliers)


def tensor_shapes(config: ConfigDict, num_classes: int = 0, image_channels: int = 0) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that a `UNet2DModel` of this config has."""
    return unet_tensors.tensor_shapes(_param_shapes(config, num_classes, image_channels), _levels(config))


def to_params(
    path: str | Path, tensors: tensors_lib.Tensors, config: ConfigDict, num_classes: int = 0, image_channels: int = 0
) -> dict[str, Any]:
    """Our parameters from a `UNet2DModel`'s tensors, with the current or the old names of attention.

    Args:
      path: of the file, for error messages.
      tensors: [D, C, h, w] and so on, by diffusers' names.
      config: of the run.
      num_classes: the network's number of classes.
      image_channels: as in `read`.

    Raises:
      UserError: a tensor that is missing, unexpected, or of a different shape or dtype than in the config's network.
    """
    return unet_tensors.to_params(path, tensors, _param_shapes(config, num_classes, image_channels), _levels(config))


def to_tensors(params: Mapping[str, Any], levels: int) -> tensors_lib.Tensors:
    """A `UNet2DModel`'s tensors from our parameters; `levels` is the network's number of levels."""
    return unet_tensors.to_tensors(params, levels)
