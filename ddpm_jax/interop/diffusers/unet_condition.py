"""Converts diffusers' `UNet2DConditionModel` to this project's UNet and back.

It is the network of Stable Diffusion, whose attention is in spatial transformers, and of Karlo (DALL-E 2's decoder) and
DeepFloyd IF (Imagen's cascade), whose "simple" attention has additional keys and values from the text.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ddpm_jax.interop import tensors as tensors_lib
from ddpm_jax.interop.diffusers import unet as unet_lib
from ddpm_jax.interop.diffusers import unet_tensors
from ddpm_jax.interop.diffusers.fields import check_accepted, check_counts, choose, refusal, with_defaults
from ddpm_jax.models.unet import UNet
from ddpm_jax.runtime.errors import UserError

_NAME = "UNet2DConditionModel"
# All fields, with diffusers' defaults for those missing from a file.
_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "only_cross_attention": False,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "use_linear_projection": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "num_class_embeds": None,
    "upcast_attention": False,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
    "addition_embed_type_num_heads": 64,  # only used with an addition_embed_type
}
_TRANSFORMERS, _SIMPLE = "UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn"
# Fields for which this project supports these values only.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "reverse_transformer_layers_per_block": (None,),
    "num_attention_heads": (None,),
    "dual_cross_attention": (False,),
    "addition_time_embed_dim": (None,),
    "num_class_embeds": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
}
# The same for each kind of attention, by the type of the middle block.
_ACCEPTED_BY_KIND: dict[str, dict[str, tuple[Any, ...]]] = {
    _TRANSFORMERS: {
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1,),
        "mid_block_only_cross_attention": (None, False),
        "cross_attention_norm": (None,),
    },
    _SIMPLE: {
        "norm_eps": (1e-5,),  # the only value for norms in simple attention
        "transformer_layers_per_block": (1,),
    },
}
# Block types: plain, with attention and residual.
_DOWN_BLOCKS = {
    _TRANSFORMERS: ("DownBlock2D", "CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    _SIMPLE: ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
}
_UP_BLOCKS = {
    _TRANSFORMERS: ("UpBlock2D", "CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    _SIMPLE: ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
}
# How these blocks change the size.
_HALVINGS = {_TRANSFORMERS: ("conv", "conv", "residual"), _SIMPLE: ("residual",) * 3}
_DOUBLINGS = {_TRANSFORMERS: ("nearest", "nearest", "residual"), _SIMPLE: ("residual",) * 3}
_CONTEXT_NORMS = {None: 0, "group_norm": 32}
_VECTORS = {"identity": "none", "projection": "mlp"}  # the values of class_embed_type that take a vector
_BOOLS = {False: False, True: True}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Information in a `UNet2DConditionModel`'s config beyond the fields of a run's config.

    Attributes:
      context_width: width of the tokens that the network takes.
      in_channels: channels of the latents and of the image concatenated to them.
      latent_channels: channels of the latents; with a learned variance the output has twice as many.
      sample_size: height and width of the latents that the network is for.
      vector_width: width of `cond["vector"]`; 0: it takes none.
      level: whether the network takes `cond["level"]`.
      linear_projections: whether the file has the transformers' projections as linear layers, not 1 x 1 convolutions.
      upcast_attention: whether diffusers computes attention's logits in float32 in half precision; ours always are.
    """

    context_width: int
    in_channels: int = 4
    latent_channels: int = 4
    sample_size: tuple[int, int] = (64, 64)
    linear_projections: bool = False
    upcast_attention: bool = False
    vector_width: int = 0
    level: bool = False


# The config.


def read(config: ConfigDict, found: Mapping[str, Any], where: str) -> Layout:
    """Sets the fields of config.model from a `UNet2DConditionModel`'s config.

    Args:
      config: of a run, with its diffusion already set.
      found: the fields of the file.
      where: its name.

    Raises:
      UserError: a value that this project's network does not support, with the name of its field.
    """
    check_accepted(where, {"_class_name": _NAME, **found}, {"_class_name": (_NAME,)})
    unet = with_defaults(where, found, _DEFAULTS)
    if unet["addition_embed_type"] == "text_time":
        raise UserError(
            f"addition_embed_type is 'text_time' in {where!r}, which is for Stable Diffusion XL; "
            "accepted: Stable Diffusion 1.x and 2.x"
        )
    kind = choose(where, unet, "mid_block_type", {_TRANSFORMERS: _TRANSFORMERS, _SIMPLE: _SIMPLE})
    check_accepted(where, unet, _ACCEPTED | _ACCEPTED_BY_KIND[kind])
    attention, halvings, doublings = unet_lib.read_blocks(
        unet, where, _DOWN_BLOCKS[kind], _UP_BLOCKS[kind], _HALVINGS[kind], _DOUBLINGS[kind]
    )
    used = (*attention[:-1], True)  # the middle's attention is like the last level's
    res_blocks = _by_level(where, unet, "layers_per_block")
    if not all(isinstance(count, int) and count > 0 for count in res_blocks):
        raise refusal(where, "layers_per_block", unet["layers_per_block"], ("whole numbers above 0",))
    unet["layers_per_block"] = res_blocks[0]
    in_channels, out_channels = unet["in_channels"], unet["out_channels"]
    latent_channels = out_channels // 2 if config.diffusion.variance == "learned" else out_channels
    if in_channels < latent_channels:
        raise refusal(where, "in_channels", in_channels, (f"the {latent_channels} of the latents or more",))
    if unet["center_input_sample"] and in_channels > latent_channels:
        raise refusal(where, "center_input_sample", True, (f"with {in_channels} in_channels, False",))
    activation = _read_activation(where, unet, "act_fn")
    token_channels = _one_for_all(where, unet, "cross_attention_dim", used)
    context_width = _read_context_width(where, unet, token_channels)
    kind_of_vector = choose(where, unet, "class_embed_type", {None: "linear", "timestep": "linear", **_VECTORS})
    time_channels = unet["time_embedding_dim"] or 0
    config.model.update(
        **unet_lib.read_common(unet, where, attention, halvings, doublings),
        **(_read_heads if kind == _TRANSFORMERS else _read_head_widths)(where, unet, used),
        level_res_blocks=() if len(set(res_blocks)) == 1 else res_blocks,
        middle_attention=True,
        middle_attention_groups=-1,
        transformer_depth=_one_for_all(where, unet, "transformer_layers_per_block", used)
        if kind == _TRANSFORMERS
        else 0,
        cross_attention=_read_cross_attention(where, unet, kind, attention),
        context_groups=choose(where, unet, "cross_attention_norm", _CONTEXT_NORMS),
        token_channels=0 if unet["encoder_hid_dim"] is None else token_channels,
        pooling_heads=_read_pooling_heads(where, unet, context_width),
        activation=activation,
        outer_activation=activation,
        residual_scale=float(unet["resnet_out_scale_factor"]),
        middle_residual_scale=float(unet["mid_block_scale_factor"]),
        time_embedding="sinusoids",
        time_channels=time_channels,
        time_activations=_read_time_activations(where, unet, activation),
        vector_embedding=kind_of_vector,
        class_conditional=False,
        null_class=True,
    )
    return Layout(
        context_width,
        in_channels,
        latent_channels,
        unet_lib.read_size(unet, where),
        choose(where, unet, "use_linear_projection", _BOOLS),
        choose(where, unet, "upcast_attention", _BOOLS),
        _read_vector_width(where, unet, time_channels or 4 * config.model.channels),
        unet["class_embed_type"] == "timestep",
    )


def _read_activation(where: str, unet: Mapping[str, Any], field: str) -> str:
    return choose(where, {field: str(unet[field]).lower()}, field, unet_lib.ACTIVATIONS)


def _read_time_activations(where: str, unet: Mapping[str, Any], activation: str) -> tuple[str, ...]:
    """The activations applied to the time embedding: its own, each block's, or both."""
    if unet["time_embedding_act_fn"] is None:
        check_accepted(where, unet, {"resnet_skip_time_act": (False,)})
        return ()
    own = _read_activation(where, unet, "time_embedding_act_fn")
    return (own,) if choose(where, unet, "resnet_skip_time_act", _BOOLS) else (own, activation)


def _read_context_width(where: str, unet: Mapping[str, Any], token_channels: int) -> int:
    """The width of the tokens, before the projection if there is one."""
    width = unet["encoder_hid_dim"]
    if width is None:
        check_accepted(where, unet, {"encoder_hid_dim_type": (None,)})
        return token_channels
    check_accepted(where, unet, {"encoder_hid_dim_type": (None, "text_proj")})
    check_counts(where, unet, "encoder_hid_dim")
    return int(width)


def _read_pooling_heads(where: str, unet: Mapping[str, Any], context_width: int) -> int:
    check_accepted(where, unet, {"addition_embed_type": (None, "text")})
    if unet["addition_embed_type"] is None:
        return 0
    check_counts(where, unet, "addition_embed_type_num_heads")
    heads = int(unet["addition_embed_type_num_heads"])
    if context_width % heads:
        accepted = (f"a number that divides the tokens' {context_width} channels",)
        raise refusal(where, "addition_embed_type_num_heads", heads, accepted)
    return heads


def _read_vector_width(where: str, unet: Mapping[str, Any], time_channels: int) -> int:
    field = "projection_class_embeddings_input_dim"
    if unet["class_embed_type"] == "projection":
        check_counts(where, unet, field)
        return int(unet[field])
    check_accepted(where, unet, {field: (None,)})
    return time_channels if unet["class_embed_type"] == "identity" else 0


def _read_cross_attention(where: str, unet: Mapping[str, Any], kind: str, attention: tuple[bool, ...]) -> str:
    """How the pixels attend to the tokens: the same way in all levels and in the middle."""
    field, middle = "only_cross_attention", unet["mid_block_only_cross_attention"]
    if kind == _TRANSFORMERS:
        if any(_by_level(where, unet, field)):
            raise refusal(where, field, unet[field], (False,))
        return "separate"
    if middle is None:
        middle = unet[field] if isinstance(unet[field], bool) else False
    values = [value for value, uses in zip(_by_level(where, unet, field), attention, strict=True) if uses]
    if any(value not in (False, True) or value != middle for value in values):
        raise refusal(where, field, unet[field], ("the same in all levels and in the middle",))
    return "alone" if middle else "joint"


def _by_level(where: str, unet: Mapping[str, Any], field: str) -> tuple[Any, ...]:
    """A field with one value for all levels, or with one per level."""
    value, levels = unet[field], len(unet["block_out_channels"])
    if isinstance(value, list | tuple):
        if len(value) != levels:
            raise refusal(where, field, value, (f"one value, or {levels} values",))
        return tuple(value)
    return (value,) * levels


def _one_for_all(where: str, unet: Mapping[str, Any], field: str, used: tuple[bool, ...]) -> int:
    """A field's value at the levels that use it, which must be the same for all."""
    values = [value for value, uses in zip(_by_level(where, unet, field), used, strict=True) if uses]
    if not all(isinstance(value, int) and value > 0 for value in values) or len(set(values)) > 1:
        raise refusal(where, field, unet[field], ("a whole number above 0, the same in all levels",))
    return values[0]


def _read_heads(where: str, unet: Mapping[str, Any], used: tuple[bool, ...]) -> dict[str, int]:
    """Converts attention_head_dim, here the number of heads, to a number of heads or a width of each head."""
    field, widths = "attention_head_dim", unet["block_out_channels"]
    levels = [
        (width, heads) for width, heads, uses in zip(widths, _by_level(where, unet, field), used, strict=True) if uses
    ]
    if not all(isinstance(heads, int) and heads > 0 and width % heads == 0 for width, heads in levels):
        raise refusal(where, field, unet[field], (f"numbers of heads that divide the channels {tuple(widths)}",))
    numbers, head_widths = {heads for _, heads in levels}, {width // heads for width, heads in levels}
    if len(numbers) == 1:
        return {"num_heads": numbers.pop(), "head_channels": 0}
    if len(head_widths) > 1:
        accepted = ("the same number of heads at all levels", "heads of the same width at all levels")
        raise refusal(where, field, unet[field], accepted)
    return {"num_heads": 1, "head_channels": head_widths.pop()}


def _read_head_widths(where: str, unet: Mapping[str, Any], used: tuple[bool, ...]) -> dict[str, int]:
    """Converts attention_head_dim, in simple attention the width of a head."""
    field, widths = "attention_head_dim", unet["block_out_channels"]
    levels = [
        (width, head) for width, head, uses in zip(widths, _by_level(where, unet, field), used, strict=True) if uses
    ]
    if not all(isinstance(head, int) and 0 < head <= width for width, head in levels):
        raise refusal(where, field, unet[field], (f"head widths of at most the channels {tuple(widths)}",))
    if len({head for _, head in levels}) > 1:
        raise refusal(where, field, unet[field], ("heads of the same width at all levels",))
    return {"num_heads": 1, "head_channels": levels[0][1]}


def to_fields(config: ConfigDict, net: UNet, layout: Layout) -> dict[str, Any]:
    """The config of the `UNet2DConditionModel` equivalent to a run's network.

    Raises:
      UserError: an option that diffusers' network does not support; it is named.
    """
    model = config.model
    common = unet_lib.common_fields(config, net, layout.sample_size, _NAME)
    kind = _TRANSFORMERS if net.cross_attention == "separate" else _SIMPLE
    if kind == _TRANSFORMERS and not net.transformer_depth:
        raise _lacking("transformer_depth", 0, "needs 1 or more, or a cross_attention other than 'separate'")
    for field, accepted in (
        ("class_conditional", False),
        ("middle_attention", True),
        ("middle_attention_groups", -1),
        ("time_embedding", "sinusoids"),
        ("outer_activation", net.activation),
        ("skip_scale", 1),
        *((("residual_scale", 1),) if kind == _TRANSFORMERS else (("norm_epsilon", 1e-5),)),
    ):
        if model[field] != accepted:
            raise _lacking(field, model[field], f"only supports {accepted!r}")
    if model.center_input and layout.in_channels > layout.latent_channels:
        raise _lacking("center_input", True, "would also centre the image that is concatenated to the latents")
    attends = net.levels_with_attention(*layout.sample_size)
    everywhere = [True] * (len(attends) - 1)
    for field, methods, accepted, levels in zip(
        ("downsample", "upsample"),
        unet_lib.resampling(net),
        ("conv", "nearest") if kind == _TRANSFORMERS else ("residual", "residual"),
        (attends[:-1], attends[1:]) if kind == _TRANSFORMERS else (everywhere, everywhere),
        strict=True,
    ):
        other = [method for method, here in zip(methods, levels, strict=True) if here and method != accepted]
        if other:
            where = " at levels with attention" if kind == _TRANSFORMERS else " with simple attention"
            raise _lacking(field, other[0], f"only supports {accepted}{where}")
    return {
        **_DEFAULTS,
        **common,
        **unet_lib.write_blocks(net, attends, _DOWN_BLOCKS[kind], _UP_BLOCKS[kind], _NAME),
        **_heads_fields(net, kind),
        **_text_fields(net, layout),
        **_time_fields(net, layout, kind),
        "in_channels": layout.in_channels,
        "out_channels": layout.latent_channels * (2 if net.learned_variance else 1),
        "mid_block_type": kind,
        "mid_block_scale_factor": _plain(net.middle_residual_scale),
        "resnet_out_scale_factor": _plain(net.residual_scale),
        "layers_per_block": list(net.level_res_blocks or ()) or net.num_res_blocks,
        "act_fn": _ACT_FNS[net.activation],
        "transformer_layers_per_block": net.transformer_depth or 1,
        "use_linear_projection": layout.linear_projections,
        "upcast_attention": layout.upcast_attention,
    }


_ACT_FNS = {ours: theirs for theirs, ours in reversed(unet_lib.ACTIVATIONS.items())}


def _plain(scale: float) -> float:
    return int(scale) if scale == int(scale) else scale


def _heads_fields(net: UNet, kind: str) -> dict[str, Any]:
    """The fields with the number of heads or, in simple attention, their width."""
    if kind == _SIMPLE:
        if not net.head_channels:
            raise _lacking("head_channels", 0, "needs a fixed head width in simple attention")
        return {"attention_head_dim": net.head_channels, "only_cross_attention": net.cross_attention == "alone"}
    if net.head_channels:
        return {"attention_head_dim": [max(width // net.head_channels, 1) for width in net.widths]}
    return {"attention_head_dim": net.num_heads}


def _text_fields(net: UNet, layout: Layout) -> dict[str, Any]:
    """The fields for the processing of the tokens."""
    norms = {groups: norm for norm, groups in _CONTEXT_NORMS.items()}
    if net.context_groups not in norms:
        raise _lacking("context_groups", net.context_groups, f"only supports {' or '.join(map(str, norms))}")
    fields: dict[str, Any] = {
        "cross_attention_dim": net.token_channels or layout.context_width,
        "cross_attention_norm": norms[net.context_groups],
    }
    if net.token_channels:
        fields |= {"encoder_hid_dim": layout.context_width, "encoder_hid_dim_type": "text_proj"}
    if net.pooling_heads:
        fields |= {"addition_embed_type": "text", "addition_embed_type_num_heads": net.pooling_heads}
    return fields


def _time_fields(net: UNet, layout: Layout, kind: str) -> dict[str, Any]:
    """The fields for the time embedding, the embeddings added to it, and its activations."""
    fields: dict[str, Any] = {"time_embedding_dim": net.time_channels}
    match tuple(net.time_activations):
        case ():
            pass
        case (own,) if kind == _SIMPLE:
            fields |= {"time_embedding_act_fn": _ACT_FNS[own], "resnet_skip_time_act": True}
        case (own, last) if last == net.activation:
            fields |= {"time_embedding_act_fn": _ACT_FNS[own]}
        case other:
            raise _lacking("time_activations", other, f"ends with the blocks' activation, {net.activation!r}")
    if layout.level and layout.vector_width:
        raise UserError(f"the network takes both a level and a vector; diffusers' {_NAME} supports only one of them")
    if layout.level:
        fields |= {"class_embed_type": "timestep"}
    if layout.vector_width:
        types = {ours: theirs for theirs, ours in _VECTORS.items()}
        if net.vector_embedding not in types:
            raise _lacking("vector_embedding", net.vector_embedding, f"only supports {' or '.join(types)}")
        fields |= {"class_embed_type": types[net.vector_embedding]}
        if net.vector_embedding == "mlp":
            fields |= {"projection_class_embeddings_input_dim": layout.vector_width}
    return fields


def _lacking(field: str, value: Any, what: str) -> UserError:
    return unet_lib.lacking(field, value, what, _NAME)


# The tensors.


def example(net: UNet, layout: Layout, tokens: int = 77) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """x, t and cond for one image, all zeros, of the smallest size that the network takes.

    Input channels beyond the latents' belong to `cond["image"]`: for Stable Diffusion's inpainting network the mask and
    the four channels of the masked picture's latents, for super-resolution the enlarged picture.
    """
    side = 2 ** (len(net.widths) - 1)
    latents = layout.latent_channels
    cond = {"tokens": jnp.zeros((1, tokens, layout.context_width))}
    if layout.in_channels > latents:
        cond["image"] = jnp.zeros((1, side, side, layout.in_channels - latents))
    if layout.vector_width:
        cond["vector"] = jnp.zeros((1, layout.vector_width))
    if layout.level:
        cond["level"] = jnp.zeros(1)
    return jnp.zeros((1, side, side, latents)), jnp.zeros(1, jnp.int32), cond


def param_shapes(net: UNet, layout: Layout) -> dict[str, Any]:
    """The parameters of the network as `jax.ShapeDtypeStruct`s."""
    return jax.eval_shape(lambda: net.init(jax.random.key(0), *example(net, layout)))["params"]


def tensor_shapes(net: UNet, layout: Layout) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that the `UNet2DConditionModel` has."""
    return unet_tensors.tensor_shapes(param_shapes(net, layout), len(net.widths), layout.linear_projections)


def to_params(path: str | Path, tensors: tensors_lib.Tensors, net: UNet, layout: Layout) -> dict[str, Any]:
    """Our parameters from a `UNet2DConditionModel`'s tensors. Half precision becomes float32, which changes no value.

    Args:
      path: of the file, for error messages.
      tensors: by diffusers' names.
      net, layout: from its config.

    Raises:
      UserError: a tensor that is missing, unexpected, or of a different shape or dtype than the network's.
    """
    return unet_tensors.to_params(path, tensors, param_shapes(net, layout), len(net.widths), layout.linear_projections)


def to_tensors(params: Mapping[str, Any], levels: int, linear_projections: bool) -> tensors_lib.Tensors:
    """A `UNet2DConditionModel`'s tensors from our parameters; see `unet_tensors.to_tensors`."""
    return unet_tensors.to_tensors(params, levels, linear_projections)
