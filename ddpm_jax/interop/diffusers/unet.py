"""diffusers' `UNet2DModel` as this project's UNet, and back: the config and the tensors.

The two networks differ in names and in the order of a kernel's axes only, so every value survives both ways to the bit.
"""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax.interop import tensors as tensors_lib
from ddpm_jax.interop.diffusers.fields import check_accepted, choose, refusal, with_defaults
from ddpm_jax.models.unet import UNet
from ddpm_jax.runtime.errors import UserError

# Every field, with what diffusers takes where a file does not have it.
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
# Fields of which this project has one value.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "time_embedding_dim": (None,),
    "class_embed_type": (None,),
}
_DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
_UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
_ACTIVATIONS = {"silu": "swish", "swish": "swish", "gelu": "gelu", "mish": "mish", "relu": "relu"}
_PADDINGS = {0: "same", 1: "symmetric"}
_SHIFTS = {"default": False, "scale_shift": True}
# In blocks with attention; those without it say it by their type.
_DOWNSAMPLERS = {"conv": "conv", "resnet": "residual", None: "conv"}
_UPSAMPLERS = {"conv": "nearest", "resnet": "residual", None: "nearest"}

_RES = {
    "norm_0": "norm1",
    "conv_0": "conv1",
    "embedding": "time_emb_proj",
    "norm_1": "norm2",
    "conv_1": "conv2",
    "shortcut": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_OUTER = {
    "time_table": "time_proj",
    "time_0": "time_embedding.linear_1",
    "time_1": "time_embedding.linear_2",
    "label": "class_embedding",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
_TABLES = ("time_proj.weight", "class_embedding.weight")  # of embeddings, [rows, features] in both


# The config.


def read(config: ConfigDict, found: Mapping[str, Any], where: str) -> int:
    """Sets the fields of a run's config that a `UNet2DModel`'s config stands for.

    Args:
      config: of a run, whose diffusion is set already.
      found: the fields of the file.
      where: its name.

    Returns:
      How many classes the network knows; 0: none.

    Raises:
      UserError: a value that this project's network does not have, by the name of its field.
    """
    check_accepted(where, {"_class_name": "UNet2DModel", **found}, {"_class_name": ("UNet2DModel",)})
    unet = with_defaults(where, found, _DEFAULTS)
    check_accepted(where, unet, _ACCEPTED)
    widths, size, num_classes = tuple(unet["block_out_channels"]), unet["sample_size"], unet["num_class_embeds"]
    if isinstance(size, int):
        size = (size, size)
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise refusal(where, "sample_size", size, ("a side", "[height, width]"))
    attention, downsampling, upsampling = _read_blocks(unet, len(widths), where)
    head_channels = unet["attention_head_dim"]
    if head_channels is not None and head_channels < 1:
        raise refusal(where, "attention_head_dim", head_channels, ("1 or more", None))
    if num_classes is not None and num_classes < 1:
        raise refusal(where, "num_class_embeds", num_classes, ("1 or more", None))
    shift, groups = choose(where, unet, "resnet_time_scale_shift", _SHIFTS), unet["norm_num_groups"]
    middle_groups = unet["attn_norm_num_groups"]
    if middle_groups is None:  # then a network with scale_shift has no norm there
        middle_groups = 0 if shift else groups
    config.data.update(source="folder", height=size[0], width=size[1], channels=unet["in_channels"])
    config.model.update(
        channels=widths[0],
        num_res_blocks=unet["layers_per_block"],
        attention_levels=attention,
        attention_resolutions=(),
        middle_attention=unet["add_attention"],
        middle_attention_groups=-1 if middle_groups == groups else middle_groups,
        num_heads=1,
        head_channels=head_channels or 0,
        dropout=float(unet["dropout"]),
        num_groups=groups,
        norm_epsilon=float(unet["norm_eps"]),
        activation=choose(where, {"act_fn": str(unet["act_fn"]).lower()}, "act_fn", _ACTIVATIONS),
        time_embedding=_read_time_embedding(unet, len(config_lib.make_betas_from(config)), where),
        time_frequency_shift=float(unet["freq_shift"]),
        time_cosines_first=unet["flip_sin_to_cos"],
        scale_shift=shift,
        downsample_padding=choose(where, unet, "downsample_padding", _PADDINGS),
        center_input=unet["center_input_sample"],
        class_conditional=num_classes is not None,
        null_class=num_classes is None,
    )
    if all(width % widths[0] == 0 for width in widths):
        config.model.channel_multipliers = tuple(width // widths[0] for width in widths)
    else:
        config.model.level_channels = widths
    for name, methods in (("downsample", downsampling), ("upsample", upsampling)):
        if len(set(methods)) == 1:
            config.model[name] = methods[0]
        else:
            config.model[f"{name}_levels"] = methods
    return num_classes or 0


def _read_blocks(
    unet: Mapping[str, Any], levels: int, where: str
) -> tuple[tuple[bool, ...], tuple[str, ...], tuple[str, ...]]:
    """Attention of each level, and how each halving and each doubling is done, from the full size down."""
    sides = []
    for field, accepted in (("down_block_types", _DOWN_BLOCKS), ("up_block_types", _UP_BLOCKS)):
        blocks = [block.removeprefix("UNetRes") for block in unet[field]]
        unknown = [block for block in blocks if block not in accepted]
        if unknown or len(blocks) != levels:
            raise refusal(where, field, unknown[0] if unknown else unet[field], accepted)
        sides.append(blocks)
    down, up = sides[0], sides[1][::-1]
    attention = tuple(block.startswith("Attn") for block in down)
    if tuple(block.startswith("Attn") for block in up) != attention:
        raise UserError(
            f"up_block_types is {unet['up_block_types']} in {where!r}; accepted: attention at the levels of "
            "down_block_types"
        )
    downsampler = choose(where, unet, "downsample_type", _DOWNSAMPLERS)
    upsampler = choose(where, unet, "upsample_type", _UPSAMPLERS)
    halvings = {"DownBlock2D": "conv", "AttnDownBlock2D": downsampler, "ResnetDownsampleBlock2D": "residual"}
    doublings = {"UpBlock2D": "nearest", "AttnUpBlock2D": upsampler, "ResnetUpsampleBlock2D": "residual"}
    return attention, tuple(halvings[block] for block in down[:-1]), tuple(doublings[block] for block in up[1:])


def _read_time_embedding(unet: Mapping[str, Any], num_timesteps: int, where: str) -> str:
    kind = unet["time_embedding_type"]
    if kind == "fourier":
        raise UserError(
            f"time_embedding_type is 'fourier' in {where!r}, which takes the logarithm of t and divides by it, and is "
            "nothing at t = 0; accepted: 'positional', 'learned'"
        )
    if kind == "learned" and unet["num_train_timesteps"] != num_timesteps:
        raise refusal(where, "num_train_timesteps", unet["num_train_timesteps"], (num_timesteps,))
    return choose(where, unet, "time_embedding_type", {"positional": "sinusoids", "learned": "learned"})


def check_out_channels(config: ConfigDict, found: Mapping[str, Any], where: str) -> None:
    """UserError unless the network's output is an image, with a learned variance two."""
    expected = config.data.channels * (2 if config.diffusion.variance == "learned" else 1)
    check_accepted(where, {**_DEFAULTS, **found}, {"out_channels": (expected,)})


def to_fields(config: ConfigDict, net: UNet) -> dict[str, Any]:
    """The config of the `UNet2DModel` that computes what a run's network does.

    Raises:
      UserError: an option that diffusers' network does not have, by name.
    """
    model, data = config.model, config.data
    if model.attention_patch_size != 1:
        raise _lacking("attention_patch_size", model.attention_patch_size, "has 1 only")
    if net.num_classes is not None and net.null_class:
        raise _lacking("class_conditional", True, "has no null class, as model.null_class=True makes one")
    if net.widths[0] != net.channels:
        raise _lacking("channels", net.channels, f"begins with the {net.widths[0]} channels of the first level")
    groups = net.middle_attention_groups
    if groups == 0 and not model.scale_shift and model.middle_attention:
        raise _lacking("middle_attention_groups", 0, "leaves that norm out with scale_shift only")
    attends = net.levels_with_attention(data.height, data.width)
    inverse = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    shift = model.time_frequency_shift
    fields = {
        "_class_name": "UNet2DModel",
        "sample_size": data.height if data.height == data.width else [data.height, data.width],
        "in_channels": data.channels,
        "out_channels": data.channels * (2 if net.learned_variance else 1),
        "center_input_sample": model.center_input,
        "time_embedding_type": "learned" if model.time_embedding == "learned" else "positional",
        "freq_shift": int(shift) if shift == int(shift) else shift,
        "flip_sin_to_cos": model.time_cosines_first,
        "mid_block_type": "UNetMidBlock2D",
        "mid_block_scale_factor": 1,
        "block_out_channels": net.widths,
        "layers_per_block": model.num_res_blocks,
        "downsample_padding": {ours: theirs for theirs, ours in _PADDINGS.items()}[model.downsample_padding],
        "dropout": model.dropout,
        "act_fn": inverse[model.activation],
        "attention_head_dim": _head_channels(net, attends),
        "norm_num_groups": model.num_groups,
        "attn_norm_num_groups": (model.num_groups if model.scale_shift else None) if groups is None else groups or None,
        "norm_eps": model.norm_epsilon,
        "resnet_time_scale_shift": "scale_shift" if model.scale_shift else "default",
        "add_attention": model.middle_attention,
        "class_embed_type": None,
        "num_class_embeds": net.num_classes,
        **_blocks(net, attends),
    }
    return fields | ({"num_train_timesteps": net.num_timesteps} if net.num_timesteps else {})


def _lacking(field: str, value: Any, what: str) -> UserError:
    return UserError(f"config.model.{field} is {value!r}; diffusers' UNet2DModel {what}")


def _head_channels(net: UNet, attends: list[bool]) -> int | None:
    if net.head_channels or net.num_heads == 1:
        return net.head_channels
    with_attention = {width for width, attention in zip(net.widths, attends, strict=True) if attention}
    with_attention |= {net.widths[-1]} if net.middle_attention else set()
    if len(with_attention) > 1:
        channels = f"levels of {sorted(with_attention)} channels"
        raise _lacking("num_heads", net.num_heads, f"has one number of channels a head, which {channels} do not give")
    return with_attention.pop() // net.num_heads if with_attention else None


def _blocks(net: UNet, attends: list[bool]) -> dict[str, Any]:
    """The types of the blocks, and of the resampling in those with attention."""
    halvings = len(attends) - 1
    down = list(net.downsample_levels or [net.downsample] * halvings)
    up = list(net.upsample_levels or [net.upsample] * halvings)
    for field, methods, samplers, levels in (
        ("downsample", down, _DOWNSAMPLERS, attends[:-1]),
        ("upsample", up, _UPSAMPLERS, attends[1:]),
    ):
        unknown = [method for method in methods if method not in samplers.values()]
        if unknown:
            raise _lacking(field, unknown[0], f"only has {' and '.join(sorted(set(samplers.values())))}")
        if len({method for method, attention in zip(methods, levels, strict=True) if attention}) > 1:
            raise _lacking(f"{field}_levels", tuple(methods), "has one kind for all levels with attention")

    def sampler(methods: list[str], levels: list[bool]) -> str:
        chosen = [method for method, attention in zip(methods, levels, strict=True) if attention]
        return "resnet" if "residual" in chosen else "conv"

    def kinds(names: tuple[str, ...], methods: list[str]) -> list[str]:
        plain, attention, residual = names
        return [
            attention if attends_here else residual if method == "residual" else plain
            for attends_here, method in zip(attends, methods, strict=True)
        ]

    return {
        "down_block_types": kinds(_DOWN_BLOCKS, [*down, "conv"]),
        "up_block_types": kinds(_UP_BLOCKS, ["nearest", *up])[::-1],
        "downsample_type": sampler(down, attends[:-1]),
        "upsample_type": sampler(up, attends[1:]),
    }


# The tensors.


def _names(params: Mapping[str, Any], levels: int) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path in our tree, name in theirs) of every parameter."""
    for path in flatten_dict(params):
        block, leaf = path[0], _LEAVES[path[-1]]
        if block in _OUTER:
            yield path, f"{_OUTER[block]}.{leaf}"
            continue
        side, level, *rest = block.split("_")
        if side == "middle":
            (kind,) = rest
            prefix = f"mid_block.{'resnets' if kind == 'res' else 'attentions'}.{level}"
        else:
            blocks = f"{side}_blocks.{level if side == 'down' else levels - 1 - int(level)}"
            if rest[-1].endswith("sample"):
                part = _RES.get(path[1], "conv")  # of a residual block, or the convolution itself
                yield path, f"{blocks}.{rest[-1]}rs.0.{part}.{leaf}"
                continue
            index, kind = rest
            prefix = f"{blocks}.{'resnets' if kind == 'res' else 'attentions'}.{index}"
        yield path, f"{prefix}.{(_RES if kind == 'res' else _ATTENTION)[path[1]]}.{leaf}"


def _to_theirs(name: str, value: np.ndarray) -> np.ndarray:
    """Kernels [h, w, C, D] become [D, C, h, w], [C, D] become [D, C] ([D, C, 1, 1] in a shortcut)."""
    if value.ndim == 4:
        return value.transpose(3, 2, 0, 1)
    if value.ndim == 2 and name not in _TABLES:
        return value.T[..., None, None] if ".conv_shortcut." in name else value.T
    return value


def _to_ours(name: str, value: np.ndarray) -> np.ndarray:
    if value.ndim == 4:
        value = value.transpose(2, 3, 1, 0)
        return value[0, 0] if ".conv_shortcut." in name else value
    return value.T if value.ndim == 2 and name not in _TABLES else value


def _param_shapes(config: ConfigDict, num_classes: int) -> dict[str, Any]:
    names = [str(number) for number in range(num_classes)]
    return config_lib.make_model(config, {"class_names": names}).param_shapes()


def _levels(config: ConfigDict) -> int:
    return len(config.model.level_channels or config.model.channel_multipliers)


def tensor_shapes(config: ConfigDict, num_classes: int = 0) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that a `UNet2DModel` of this config has."""
    shapes = _param_shapes(config, num_classes)
    empty = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    return {name: value.shape for name, value in to_tensors(empty, _levels(config)).items()}


def to_params(
    path: str | Path, tensors: tensors_lib.Tensors, config: ConfigDict, num_classes: int = 0
) -> dict[str, Any]:
    """Our parameters from a `UNet2DModel`'s tensors, with today's or the old names of attention.

    Args:
      path: of the file, for what is said of it.
      tensors: [D, C, h, w] and so on, by diffusers' names.
      config: of the run.
      num_classes: that the network knows.

    Raises:
      UserError: a tensor that is missing, too many, or of another shape or dtype than the config's network has.
    """
    shapes = _param_shapes(config, num_classes)
    names = dict(_names(shapes, _levels(config)))
    wanted = tensor_shapes(config, num_classes)
    old = any(".attentions." in name and ".query." in name for name in tensors)
    if old:
        for new, former in _OLD_ATTENTION.items():
            pattern = re.compile(rf"(\.attentions\.\d+\.){re.escape(new)}(?=\.)")
            former_name = partial(pattern.sub, rf"\g<1>{former}")
            names = {ours: former_name(name) for ours, name in names.items()}
            wanted = {former_name(name): shape for name, shape in wanted.items()}
    tensors_lib.check(path, tensors, wanted)
    return unflatten_dict({ours: np.ascontiguousarray(_to_ours(name, tensors[name])) for ours, name in names.items()})


def to_tensors(params: Mapping[str, Any], levels: int) -> tensors_lib.Tensors:
    """A `UNet2DModel`'s tensors from our parameters; `levels` is how many the network has."""
    flat = flatten_dict(params)
    return {name: _to_theirs(name, np.asarray(flat[ours])) for ours, name in _names(params, levels)}
