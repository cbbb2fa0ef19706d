"""diffusers' `UNet2DConditionModel`, the network of Stable Diffusion, as this project's UNet, and back."""

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
from ddpm_jax.interop.diffusers.fields import check_accepted, choose, refusal, with_defaults
from ddpm_jax.models.unet import UNet
from ddpm_jax.runtime.errors import UserError

_NAME = "UNet2DConditionModel"
# Every field, with what diffusers takes where a file does not have it.
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
    "addition_embed_type_num_heads": 64,  # counts with an addition_embed_type only
}
# Fields of which this project has one value.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),  # of the time embedding and the output, too
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_attention_heads": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "addition_embed_type": (None,),
    "addition_time_embed_dim": (None,),
    "num_class_embeds": (None,),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "projection_class_embeddings_input_dim": (None,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
}
_DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "ResnetDownsampleBlock2D")
_UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D", "ResnetUpsampleBlock2D")
_BOOLS = {False: False, True: True}


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a `UNet2DConditionModel`'s config says beside the fields of a run's config.

    Attributes:
      context_width: of the tokens that the network attends to.
      in_channels: of the latents and of the image that is joined to them.
      latent_channels: of the latents; the output has twice as many with a learned variance.
      sample_size: height and width of the latents that the network is for.
      linear_projections: the transformers' projections lie in the file as linear layers, not as 1 x 1 convolutions.
      upcast_attention: in half precision, diffusers computes attention's logits in float32; ours always are.
    """

    context_width: int
    in_channels: int = 4
    latent_channels: int = 4
    sample_size: tuple[int, int] = (64, 64)
    linear_projections: bool = False
    upcast_attention: bool = False


# The config.


def read(config: ConfigDict, found: Mapping[str, Any], where: str) -> Layout:
    """Sets the fields of config.model that a `UNet2DConditionModel`'s config stands for.

    Args:
      config: of a run, whose diffusion is set already.
      found: the fields of the file.
      where: its name.

    Raises:
      UserError: a value that this project's network does not have, by the name of its field.
    """
    check_accepted(where, {"_class_name": _NAME, **found}, {"_class_name": (_NAME,)})
    unet = with_defaults(where, found, _DEFAULTS)
    if unet["addition_embed_type"] == "text_time":
        raise UserError(
            f"addition_embed_type is 'text_time' in {where!r}, which makes it a network of Stable Diffusion XL; "
            "accepted: Stable Diffusion 1.x and 2.x"
        )
    check_accepted(where, unet, _ACCEPTED)
    attention, halvings, doublings = unet_lib.read_blocks(
        unet, where, _DOWN_BLOCKS, _UP_BLOCKS, ("conv", "conv", "residual"), ("nearest", "nearest", "residual")
    )
    used = (*attention[:-1], True)  # the middle has attention of the last level's kind
    unet["layers_per_block"] = _one_for_all(where, unet, "layers_per_block", (True,) * len(attention))
    if any(_by_level(where, unet, "only_cross_attention")):
        raise refusal(where, "only_cross_attention", unet["only_cross_attention"], (False,))
    in_channels, out_channels = unet["in_channels"], unet["out_channels"]
    latent_channels = out_channels // 2 if config.diffusion.variance == "learned" else out_channels
    if in_channels < latent_channels:
        raise refusal(where, "in_channels", in_channels, (f"the {latent_channels} of the latents or more",))
    if unet["center_input_sample"] and in_channels > latent_channels:
        raise refusal(where, "center_input_sample", True, (f"with {in_channels} in_channels, False",))
    config.model.update(
        **unet_lib.read_common(unet, where, attention, halvings, doublings),
        **_read_heads(where, unet, used),
        middle_attention=True,
        middle_attention_groups=-1,
        transformer_depth=_one_for_all(where, unet, "transformer_layers_per_block", used),
        activation="swish",
        time_embedding="sinusoids",
        class_conditional=False,
        null_class=True,
    )
    return Layout(
        _one_for_all(where, unet, "cross_attention_dim", used),
        in_channels,
        latent_channels,
        unet_lib.read_size(unet, where),
        choose(where, unet, "use_linear_projection", _BOOLS),
        choose(where, unet, "upcast_attention", _BOOLS),
    )


def _by_level(where: str, unet: Mapping[str, Any], field: str) -> tuple[Any, ...]:
    """A field of one value, or of one a level."""
    value, levels = unet[field], len(unet["block_out_channels"])
    if isinstance(value, list | tuple):
        if len(value) != levels:
            raise refusal(where, field, value, (f"one value, or {levels}",))
        return tuple(value)
    return (value,) * levels


def _one_for_all(where: str, unet: Mapping[str, Any], field: str, used: tuple[bool, ...]) -> int:
    """The number that a field gives the levels that use it, which must be the same for all."""
    values = [value for value, uses in zip(_by_level(where, unet, field), used, strict=True) if uses]
    if not all(isinstance(value, int) and value > 0 for value in values) or len(set(values)) > 1:
        raise refusal(where, field, unet[field], ("a whole number above 0, the same in all levels",))
    return values[0]


def _read_heads(where: str, unet: Mapping[str, Any], used: tuple[bool, ...]) -> dict[str, int]:
    """attention_head_dim, which is how many heads there are, as a number of heads or as the width of each."""
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
        accepted = ("as many heads in all levels", "heads of the same width in all levels")
        raise refusal(where, field, unet[field], accepted)
    return {"num_heads": 1, "head_channels": head_widths.pop()}


def to_fields(config: ConfigDict, net: UNet, layout: Layout) -> dict[str, Any]:
    """The config of the `UNet2DConditionModel` that computes what a run's network does.

    Raises:
      UserError: an option that diffusers' network does not have, by name.
    """
    model = config.model
    common = unet_lib.common_fields(config, net, layout.sample_size, _NAME)
    if not net.transformer_depth:
        raise _lacking("transformer_depth", 0, "has 1 or more")
    for field, accepted in (
        ("class_conditional", False),
        ("middle_attention", True),
        ("time_embedding", "sinusoids"),
        ("activation", "swish"),
    ):
        if model[field] != accepted:
            raise _lacking(field, model[field], f"is written with {accepted!r} only")
    if model.center_input and layout.in_channels > layout.latent_channels:
        raise _lacking("center_input", True, "would center the image that is joined to the latents, too")
    attends = net.levels_with_attention(*layout.sample_size)
    for field, methods, accepted, levels in zip(
        ("downsample", "upsample"),
        unet_lib.resampling(net),
        ("conv", "nearest"),
        (attends[:-1], attends[1:]),
        strict=True,
    ):
        other = [method for method, here in zip(methods, levels, strict=True) if here and method != accepted]
        if other:
            raise _lacking(field, other[0], f"has {accepted} only in levels with attention")
    heads: int | list[int] = net.num_heads
    if net.head_channels:
        heads = [max(width // net.head_channels, 1) for width in net.widths]
    return {
        **_DEFAULTS,
        **common,
        **unet_lib.write_blocks(net, attends, _DOWN_BLOCKS, _UP_BLOCKS, _NAME),
        "in_channels": layout.in_channels,
        "out_channels": layout.latent_channels * (2 if net.learned_variance else 1),
        "act_fn": "silu",
        "attention_head_dim": heads,
        "transformer_layers_per_block": net.transformer_depth,
        "cross_attention_dim": layout.context_width,
        "use_linear_projection": layout.linear_projections,
        "upcast_attention": layout.upcast_attention,
    }


def _lacking(field: str, value: Any, what: str) -> UserError:
    return unet_lib.lacking(field, value, what, _NAME)


# The tensors.


def example(net: UNet, layout: Layout, tokens: int = 77) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """x, t and cond of one image, all zeros, of the smallest size that the network takes.

    Channels that the network reads beyond the latents' are those of `cond["image"]`: of Stable Diffusion's inpainting
    network four of the masked picture's latents and the mask.
    """
    side = 2 ** (len(net.widths) - 1)
    latents = layout.latent_channels
    cond = {"tokens": jnp.zeros((1, tokens, layout.context_width))}
    if layout.in_channels > latents:
        cond["image"] = jnp.zeros((1, side, side, layout.in_channels - latents))
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
      path: of the file, for what is said of it.
      tensors: by diffusers' names.
      net, layout: what its config stands for.

    Raises:
      UserError: a tensor that is missing, too many, or of another shape or dtype than the network has.
    """
    return unet_tensors.to_params(path, tensors, param_shapes(net, layout), len(net.widths), layout.linear_projections)


def to_tensors(params: Mapping[str, Any], levels: int, linear_projections: bool) -> tensors_lib.Tensors:
    """A `UNet2DConditionModel`'s tensors from our parameters; see `unet_tensors.to_tensors`."""
    return unet_tensors.to_tensors(params, levels, linear_projections)
