"""Reads single-file Stable Diffusion checkpoints, as published by CompVis and Stability AI, with diffusers' names.

Such a file contains the network ("model.diffusion_model."), the autoencoder ("first_stage_model.") and the text encoder
("cond_stage_model."): CLIP's in 1.x, OpenCLIP's in 2.x. It contains neither a config nor a tokenizer. The sizes are
inferred from the tensors' shapes, and everything else is the same in all files of a version. For the tokenizer, the
caller must provide CLIP's vocabulary.

These parts are ignored: the averaged weights ("model_ema."; diffusers uses the others as well), the noise schedule's
buffers, the autoencoder's losses, and the unused parts of OpenCLIP's text encoder in 2.x: the last of its 24 layers and
the projection.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.interop import tensors as tensors_lib
from ddpm_jax.runtime.errors import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction")
PREDICTIONS = dict(zip(("eps", "v"), PREDICTION_TYPES, strict=True))  # this project's names first
PAD_TOKENS = {"1.x": "<|endoftext|>", "2.x": "!"}  # for each version's prompts

_UNET, _AUTOENCODER = "model.diffusion_model.", "first_stage_model."
_CLIP, _OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
_IGNORED = re.compile(
    r"model_ema\..*|first_stage_model\.(loss|model_ema)\..*|cond_stage_model\.(logit_scale|attn_mask)"
    r"|(.*_)?(alphas|betas|alphas_cumprod|alphas_cumprod_prev)|posterior_(variance|log_variance_clipped|mean_coef[12])"
    r"|lvlb_weights|logvar|scale_factor|denoiser\.sigmas"
)
# Fragments of tensor names that identify other kinds of files.
_OTHERS = {
    "conditioner.embedders.": "Stable Diffusion XL",
    "joint_blocks.": "Stable Diffusion 3",
    "double_blocks.": "Flux",
    "control_model.": "a ControlNet",
    "controlnet_cond_embedding.": "a ControlNet",
    "input_hint_block.": "a ControlNet",
    "lora_": "a LoRA, which changes a network but is not one",
    ".lora.": "a LoRA, which changes a network but is not one",
    "hada_": "a LoHa, which changes a network but is not one",
    "lokr_": "a LoKr, which changes a network but is not one",
    "motion_modules.": "AnimateDiff",
    "depth_model.": "Stable Diffusion 2 with depth",
    "string_to_param": "a textual inversion",
    "emb_params": "a textual inversion",
    "down_blocks.": "a part of a diffusers folder, to be opened as that folder",
}

# CompVis' names of the network's modules, and diffusers'.
RES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
OUTER = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_MIDDLE = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
_AUTOENCODER_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OPEN_CLIP_OUTER = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_OPEN_CLIP_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_OPEN_CLIP_LAYERS = 23  # those of ViT-H's 24 that Stable Diffusion 2 uses
_OPEN_CLIP_UNUSED = ("text_projection", "logit_scale", "attn_mask")
_TEXT_HEAD = 64  # channels of a head in the text encoders of both versions
_HEADS, _HEAD = 8, 64  # of the network: heads in 1.x, channels of a head in 2.x


@dataclasses.dataclass(frozen=True, eq=False)
class SingleFile:
    """The contents of a single file.

    Attributes:
      path: of the file.
      version: "1.x" or "2.x".
      in_channels: of the network: 4, or 9 with a mask and the masked picture's latents (inpainting).
      unet, autoencoder: tensors by diffusers' names, in the precision of the file.
      text_encoder: tensors by transformers' names for a `CLIPTextModel`; for 2.x, converted from OpenCLIP's.
    """

    path: str
    version: str
    in_channels: int
    unet: tensors_lib.Tensors
    autoencoder: tensors_lib.Tensors
    text_encoder: tensors_lib.Tensors

    def fields(self, prediction_type: str | None = None) -> dict[str, dict[str, Any]]:
        """The config fields of an equivalent diffusers folder, by part.

        Args:
          prediction_type: "epsilon" or "v_prediction"; None: "epsilon" for 1.x. Files of 2.x do not specify it: the
            models for 512 pixels and the inpainting model predict epsilon, those for 768 pixels v.

        Returns:
          The fields of "unet", "vae", "text_encoder" and "scheduler".

        Raises:
          UserError: another prediction_type, or none for 2.x; sizes that no Stable Diffusion file has.
        """
        if prediction_type is None and self.version == "1.x":
            prediction_type = "epsilon"
        if prediction_type not in PREDICTION_TYPES:
            raise UserError(
                f"prediction_type is {prediction_type!r} for {self.path!r}, a file of Stable Diffusion {self.version}, "
                f"which does not record it; accepted: {', '.join(map(repr, PREDICTION_TYPES))}"
            )
        side = 96 if self.version == "2.x" and prediction_type == "v_prediction" else 64
        autoencoder = _autoencoder_fields(self.path, self.autoencoder)
        size = side * 2 ** (len(autoencoder["block_out_channels"]) - 1)
        return {
            "unet": _unet_fields(self.path, self.unet, self.version) | {"sample_size": side},
            "vae": autoencoder | {"sample_size": size},
            "text_encoder": _text_fields(self.path, self.text_encoder, self.version),
            "scheduler": _scheduler_fields(self.version) | {"prediction_type": prediction_type},
        }


def read(path: str | Path) -> SingleFile:
    """Reads the parts of a .safetensors or .ckpt file of Stable Diffusion 1.x or 2.x.

    Raises:
      UserError: a file that is missing, broken, of another model, or incomplete; or a tensor that Stable Diffusion does
        not have.
    """
    where, tensors = str(path), tensors_lib.read_checkpoint(path)
    _refuse_others(where, tensors)
    parts: dict[str, tensors_lib.Tensors] = {prefix: {} for prefix in (_UNET, _AUTOENCODER, _CLIP, _OPEN_CLIP)}
    for name, value in tensors.items():
        prefix = next((prefix for prefix in parts if name.startswith(prefix)), None)
        if _IGNORED.fullmatch(name):
            continue
        if prefix is None:
            raise _unknown(where, name)
        parts[prefix][name.removeprefix(prefix)] = value
    version = "2.x" if parts[_OPEN_CLIP] else "1.x"
    for prefix, what in ((_UNET, "network"), (_AUTOENCODER, "autoencoder"), (_CLIP, "text encoder")):
        if not parts[prefix] and not (prefix == _CLIP and parts[_OPEN_CLIP]):
            raise UserError(f"{where!r} has no {what}, whose tensors' names begin with {prefix!r}")
    if parts[_CLIP] and parts[_OPEN_CLIP]:
        raise UserError(f"{where!r} has two text encoders, {_CLIP!r} and {_OPEN_CLIP!r}; accepted: one")
    (channels,) = _sizes(where, parts[_UNET], "input_blocks.0.0.weight", 1, prefix=_UNET)
    if channels not in (4, 9):
        raise UserError(
            f"the network in {where!r} takes {channels} channels; accepted: 4, or 9 (inpainting), not Stable Diffusion "
            "for depth, upscaling or editing by instruction"
        )
    text = _open_clip(where, parts[_OPEN_CLIP]) if parts[_OPEN_CLIP] else _clip(parts[_CLIP])
    return SingleFile(
        where, version, channels, _unet(where, parts[_UNET]), _autoencoder(where, parts[_AUTOENCODER]), text
    )


def unet_module(name: str, layers: int) -> str | None:
    """diffusers' name of a module of CompVis' network, such as "input_blocks.1.0.in_layers.2"; None for other names.

    Args:
      name: of the module, or of a part of it.
      layers: residual blocks per level in the encoder.
    """
    if name in OUTER:
        return OUTER[name]
    match = re.fullmatch(r"(?:(input|output)_blocks\.(\d{1,4})|middle_block)\.(\d{1,4})\.(.+)", name)
    if match is None:
        return None
    side, place, part = match[1], int(match[3]), match[4]
    if side is None:
        if place >= len(_MIDDLE):
            return None
        return _joined(_MIDDLE[place], part if place == 1 else RES.get(part))
    blocks, index = ("down", int(match[2]) - 1) if side == "input" else ("up", int(match[2]))
    level, layer = divmod(index, layers + 1)
    block = f"{blocks}_blocks.{level}"
    if (side, place, part) == ("input", 0, "op"):
        return f"{block}.downsamplers.0.conv"
    if side == "output" and place in (1, 2) and part == "conv":
        return f"{block}.upsamplers.0.conv"
    if index < 0 or place > 1:
        return None
    return _joined(f"{block}.{('resnets', 'attentions')[place]}.{layer}", part if place else RES.get(part))


def _joined(block: str, part: str | None) -> str | None:
    return None if part is None else f"{block}.{part}"


def _unknown(where: str, name: str) -> UserError:
    return UserError(f"{where!r} has a tensor {name!r}, which no Stable Diffusion 1.x or 2.x has")


def _refuse_others(where: str, tensors: Collection[str]) -> None:
    """UserError for files of other models, recognised by a tensor's name."""
    if any(name.startswith(_UNET + "input_blocks.") for name in tensors):
        others = {part: _OTHERS[part] for part in ("conditioner.embedders.", "control_model.", "depth_model.")}
    else:
        others = _OTHERS
    for part, what in others.items():
        if any(part in name for name in tensors):
            raise UserError(f"{where!r} is {what}; accepted: a Stable Diffusion 1.x or 2.x checkpoint")
    if not any(name.startswith(_UNET) for name in tensors):
        raise UserError(
            f"{where!r} is not a Stable Diffusion checkpoint: it has no tensor whose name begins with {_UNET!r}"
        )


def _sizes(where: str, tensors: Mapping[str, np.ndarray], name: str, *axes: int, prefix: str = "") -> tuple[int, ...]:
    """The lengths of some axes of a tensor; UserError if the tensor is missing or has too few axes."""
    if name not in tensors or tensors[name].ndim <= max(axes):
        raise UserError(f"{where!r} has no tensor {prefix + name!r}, or one with too few axes")
    return tuple(tensors[name].shape[axis] for axis in axes)


def _count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that the pattern matches at the start of a name."""
    found = (re.match(pattern, name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


# The tensors.


def _unet(where: str, tensors: Mapping[str, np.ndarray]) -> tensors_lib.Tensors:
    found = (re.fullmatch(r"input_blocks\.(\d{1,4})\.0\.op\.weight", name) for name in tensors)
    halvings = [int(match[1]) for match in found if match]
    layers = min(halvings, default=_count(tensors, r"input_blocks\.(\d{1,4})\.")) - 1
    return _renamed(where, tensors, _UNET, lambda module: unet_module(module, layers))


def _autoencoder(where: str, tensors: Mapping[str, np.ndarray]) -> tensors_lib.Tensors:
    levels = _count(tensors, r"decoder\.up\.(\d{1,4})\.")
    renamed = _renamed(where, tensors, _AUTOENCODER, lambda module: _autoencoder_module(module, levels))
    return {  # attention's projections were once 1 x 1 convolutions
        name: value[:, :, 0, 0] if ".attentions." in name and value.shape[2:] == (1, 1) else value
        for name, value in renamed.items()
    }


def _renamed(
    where: str, tensors: Mapping[str, np.ndarray], prefix: str, rename: Callable[[str], str | None]
) -> tensors_lib.Tensors:
    """Renames the tensors to diffusers' module names; UserError for an unknown module."""
    renamed = {}
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        theirs = rename(module)
        if theirs is None:
            raise _unknown(where, prefix + name)
        renamed[f"{theirs}.{leaf}"] = value
    return renamed


def _autoencoder_module(name: str, levels: int) -> str | None:
    if name in ("quant_conv", "post_quant_conv"):
        return name
    half, _, rest = name.partition(".")
    if half not in ("encoder", "decoder"):
        return None
    if rest in ("conv_in", "conv_out"):
        return name
    if rest == "norm_out":
        return f"{half}.conv_norm_out"
    if match := re.fullmatch(r"mid\.attn_1\.(\w+)", rest):
        return _joined(f"{half}.mid_block.attentions.0", _AUTOENCODER_ATTENTION.get(match[1]))
    if match := re.fullmatch(r"mid\.block_([12])\.(\w+)", rest):
        return f"{half}.mid_block.resnets.{int(match[1]) - 1}.{_shortcut(match[2])}"
    side, reverse = ("down", False) if half == "encoder" else ("up", True)
    match = re.fullmatch(rf"{side}\.(\d{{1,4}})\.(?:block\.(\d{{1,4}})\.(\w+)|{side}sample\.conv)", rest)
    if match is None:
        return None
    level = levels - 1 - int(match[1]) if reverse else int(match[1])
    block = f"{half}.{side}_blocks.{level}"
    return f"{block}.{side}samplers.0.conv" if match[2] is None else f"{block}.resnets.{match[2]}.{_shortcut(match[3])}"


def _shortcut(part: str) -> str:
    return "conv_shortcut" if part == "nin_shortcut" else part


def _clip(tensors: Mapping[str, np.ndarray]) -> tensors_lib.Tensors:
    """transformers' own names, whose prefix is missing in some files."""
    return {
        "text_model." + name.removeprefix("text_model."): value
        for name, value in tensors.items()
        if not name.endswith("embeddings.position_ids")
    }


def _open_clip(where: str, tensors: Mapping[str, np.ndarray]) -> tensors_lib.Tensors:
    converted = {}
    for name, value in tensors.items():
        if name in _OPEN_CLIP_UNUSED:
            continue
        if name in _OPEN_CLIP_OUTER:
            converted[f"text_model.{_OPEN_CLIP_OUTER[name]}"] = value
            continue
        match = re.fullmatch(r"transformer\.resblocks\.(\d{1,4})\.(.+)[._](weight|bias)", name)
        if match is None or (match[2] != "attn.in_proj" and match[2] not in _OPEN_CLIP_PARTS):
            raise _unknown(where, _OPEN_CLIP + name)
        layer, part, leaf = int(match[1]), match[2], match[3]
        if layer >= _OPEN_CLIP_LAYERS:
            continue
        block = f"text_model.encoder.layers.{layer}"
        if part != "attn.in_proj":
            converted[f"{block}.{_OPEN_CLIP_PARTS[part]}.{leaf}"] = value
        elif len(value) % 3:
            raise UserError(
                f"tensor {_OPEN_CLIP + name!r} in {where!r} has {len(value)} rows; accepted: a multiple of 3"
            )
        else:
            for head, rows in zip("qkv", np.split(value, 3), strict=True):
                converted[f"{block}.self_attn.{head}_proj.{leaf}"] = rows
    return converted


# The fields.


def _unet_fields(where: str, tensors: Mapping[str, np.ndarray], version: str) -> dict[str, Any]:
    levels = _count(tensors, r"down_blocks\.(\d{1,4})\.")
    if levels == 0:
        raise UserError(f"the network in {where!r} has no levels")
    widths = [_sizes(where, tensors, f"down_blocks.{i}.resnets.0.conv1.weight", 0)[0] for i in range(levels)]
    cross = next((name for name in tensors if name.endswith("attn2.to_k.weight")), None)
    if cross is None:
        raise UserError(f"the network in {where!r} has no attention to a text")
    block = cross.partition(".transformer_blocks.")[0]
    _sizes(where, tensors, f"{block}.proj_in.weight", 1)
    if version == "1.x":
        heads: int | list[int] = _HEADS
    elif any(width % _HEAD for width in widths):
        raise UserError(f"the levels in {where!r} have {widths} channels; accepted for 2.x: multiples of {_HEAD}")
    else:
        heads = [width // _HEAD for width in widths]

    def kinds(side: str) -> list[str]:
        attends = [any(name.startswith(f"{side}_blocks.{i}.attentions.") for name in tensors) for i in range(levels)]
        name = side.capitalize()
        return [f"CrossAttn{name}Block2D" if attention else f"{name}Block2D" for attention in attends]

    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": heads,
        "block_out_channels": widths,
        "center_input_sample": False,
        "cross_attention_dim": _sizes(where, tensors, cross, 1)[0],
        "down_block_types": kinds("down"),
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": _sizes(where, tensors, "conv_in.weight", 1)[0],
        "layers_per_block": _count(tensors, r"down_blocks\.0\.resnets\.(\d{1,4})\."),
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "out_channels": _sizes(where, tensors, "conv_out.weight", 0)[0],
        "transformer_layers_per_block": _count(tensors, re.escape(block) + r"\.transformer_blocks\.(\d{1,4})\."),
        "up_block_types": kinds("up"),
        "use_linear_projection": tensors[f"{block}.proj_in.weight"].ndim == 2,
    }


def _autoencoder_fields(where: str, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    levels = _count(tensors, r"encoder\.down_blocks\.(\d{1,4})\.")
    names = [f"encoder.down_blocks.{i}.resnets.0.conv1.weight" for i in range(levels)]
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [_sizes(where, tensors, name, 0)[0] for name in names],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": _sizes(where, tensors, "encoder.conv_in.weight", 1)[0],
        "latent_channels": _sizes(where, tensors, "decoder.conv_in.weight", 1)[0],
        "layers_per_block": _count(tensors, r"encoder\.down_blocks\.0\.resnets\.(\d{1,4})\."),
        "norm_num_groups": 32,
        "out_channels": _sizes(where, tensors, "decoder.conv_out.weight", 0)[0],
        "scaling_factor": 0.18215,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _text_fields(where: str, tensors: Mapping[str, np.ndarray], version: str) -> dict[str, Any]:
    rows, width = _sizes(where, tensors, "text_model.embeddings.token_embedding.weight", 0, 1)
    if width % _TEXT_HEAD:
        raise UserError(f"the text encoder in {where!r} has {width} channels; accepted: a multiple of {_TEXT_HEAD}")
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 2,  # means that the end has the largest id, as in Stable Diffusion's own configs
        "hidden_act": "quick_gelu" if version == "1.x" else "gelu",
        "hidden_size": width,
        "intermediate_size": _sizes(where, tensors, "text_model.encoder.layers.0.mlp.fc1.weight", 0)[0],
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": _sizes(where, tensors, "text_model.embeddings.position_embedding.weight", 0)[0],
        "num_attention_heads": width // _TEXT_HEAD,
        "num_hidden_layers": _count(tensors, r"text_model\.encoder\.layers\.(\d{1,4})\."),
        "pad_token_id": 1,
        "projection_dim": width if version == "1.x" else 512,
        "vocab_size": rows,
    }


def _scheduler_fields(version: str) -> dict[str, Any]:
    """The fields of the scheduler in diffusers' own folders for this version."""
    return {
        "_class_name": "PNDMScheduler" if version == "1.x" else "DDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    }
