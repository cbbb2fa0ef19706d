"""Folders of diffusers: a `UNet2DModel` and its `DDPMScheduler`, read and written without diffusers or PyTorch.

The two networks differ in names and in the order of a kernel's axes only, so every value survives both ways to the bit.
What a diffusers config says that this project cannot do is refused by the name of its field.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax.interop import tensors as tensors_lib
from ddpm_jax.models.unet import UNet
from ddpm_jax.runtime.errors import UserError, first_line
from ddpm_jax.runtime.files import new_folder, write_text
from ddpm_jax.validation import validate

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_FILES = ("config.json", "scheduler_config.json", "model_index.json", *WEIGHTS)

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
    "time_0": "time_embedding.linear_1",
    "time_1": "time_embedding.linear_2",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}

_PREDICTIONS = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
_VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned",
}
_SCHEDULES = {"linear": "linear", "scaled_linear": "quadratic", "squaredcos_cap_v2": "cosine"}

# Fields that have one value here, and what diffusers takes where a config does not have them.
_FIXED_UNET: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "center_input_sample": (False, (False,)),
    "time_embedding_type": ("positional", ("positional",)),
    "freq_shift": (0, (1,)),
    "flip_sin_to_cos": (True, (False,)),
    "mid_block_type": ("UNetMidBlock2D", ("UNetMidBlock2D",)),
    "mid_block_scale_factor": (1, (1,)),
    "downsample_padding": (1, (0,)),
    "downsample_type": ("conv", ("conv",)),
    "upsample_type": ("conv", ("conv",)),
    "act_fn": ("silu", ("silu", "swish")),
    "norm_eps": (1e-5, (1e-6,)),
    "class_embed_type": (None, (None,)),
    "num_class_embeds": (None, (None,)),
}
_NEWER_UNET = {"time_embedding_dim": (None, (None,))}  # read, but not written for older releases of diffusers
_FREE_UNET = (
    "sample_size",
    "in_channels",
    "out_channels",
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "dropout",
    "attention_head_dim",
    "norm_num_groups",
    "attn_norm_num_groups",
    "resnet_time_scale_shift",
    "add_attention",
    "num_train_timesteps",
)
_FIXED_SCHEDULER: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "clip_sample_range": (1.0, (1.0,)),
    "steps_offset": (0, (0,)),
}
_FORMER_SCHEDULER = {"tensor_format": (None, (None, "pt", "np")), "timestep_values": (None, (None,))}
_FREE_SCHEDULER = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "variance_type",
    "clip_sample",
    "prediction_type",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "timestep_spacing",  # of fewer steps than T, which are chosen when sampling
)
_UNBOUNDED = 1e9  # diffusers' upper bound of a dynamic threshold, which the paper's does not have


def locate(name: str) -> Path:
    """The folder of that name, or else the model of that name on the Hugging Face hub, downloaded or from its cache.

    Raises:
      UserError: no such folder, and the hub does not have it or cannot be reached.
    """
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(
            f"{name!r} is no folder; accepted: a diffusers folder or a hub name such as google/ddpm-cifar10-32"
        )
    from huggingface_hub import snapshot_download

    try:
        patterns = [*_FILES, *(f"unet/{file}" for file in _FILES), "scheduler/*.json"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # of several libraries
        raise UserError(
            f"{name!r} is no folder here, and the Hugging Face hub does not give it: {first_line(error)}"
        ) from None


def read(folder: str | Path) -> tuple[ConfigDict, dict[str, Any]]:
    """The config and the parameters of a diffusers folder, of the pipeline's layout (unet/, scheduler/) or flat.

    Raises:
      UserError: a file that is missing or broken, a field that is not supported, a tensor that does not fit.
    """
    folder = Path(folder)
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    scheduler = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    config = to_config(
        _read_json(unet / "config.json"),
        _read_json(scheduler / "scheduler_config.json"),
        where=(str(unet / "config.json"), str(scheduler / "scheduler_config.json")),
    )
    files = [unet / name for name in WEIGHTS if (unet / name).is_file()]
    if not files:
        raise UserError(f"{str(unet)!r} has no weights; accepted: {' or '.join(WEIGHTS)}")
    return config, to_params(files[0], tensors_lib.read(files[0]), config)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"there is no {str(path)!r}; a diffusers folder has one") from None
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{str(path)!r} holds no JSON object")
    return value


def _refuse(where: str, field: str, value: Any, accepted: Sequence[Any]) -> UserError:
    return UserError(f"{field} is {value!r} in {where!r}; accepted: {', '.join(map(repr, accepted))}")


def _check_fields(
    where: str, found: Mapping[str, Any], fixed: Mapping[str, tuple[Any, tuple[Any, ...]]], free: Sequence[str]
) -> None:
    for field, value in found.items():
        if not field.startswith("_") and field not in fixed and field not in free:
            raise UserError(f"{field} is {value!r} in {where!r}, a field that this project does not know")
    for field, (default, accepted) in fixed.items():
        value = found.get(field, default)
        if value not in accepted:
            raise _refuse(where, field, value, accepted)


def to_config(
    unet: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    where: tuple[str, str] = ("config.json", "scheduler_config.json"),
) -> ConfigDict:
    """The run config that a `UNet2DModel`'s and a `DDPMScheduler`'s configs stand for; UserError by field."""
    config = config_lib.default_config()
    try:
        _read_unet(config, unet, where[0])
        _read_scheduler(config, scheduler, where[1])
    except KeyError as error:
        raise UserError(f"{where[0]!r} or {where[1]!r} has no field {error}") from None
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{where[0]!r} or {where[1]!r} holds a value that does not fit: {error}") from None
    validate(config)
    learned = config.diffusion.variance == "learned"
    expected = config.data.channels * (2 if learned else 1)
    if unet.get("out_channels") != expected:
        raise _refuse(where[0], "out_channels", unet.get("out_channels"), (expected,))
    return config


def _read_unet(config: ConfigDict, unet: Mapping[str, Any], where: str) -> None:
    if unet.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise _refuse(where, "_class_name", unet["_class_name"], ("UNet2DModel",))
    _check_fields(where, unet, _FIXED_UNET | _NEWER_UNET, _FREE_UNET)
    down, up, widths = unet["down_block_types"], unet["up_block_types"], unet["block_out_channels"]
    for field, blocks, accepted in (
        ("down_block_types", down, ("DownBlock2D", "AttnDownBlock2D")),
        ("up_block_types", up, ("UpBlock2D", "AttnUpBlock2D")),
    ):
        unknown = [block for block in blocks if block not in accepted]
        if unknown or len(blocks) != len(widths):
            raise _refuse(where, field, unknown[0] if unknown else blocks, accepted)
    attention = [block.startswith("Attn") for block in down]
    if [block.startswith("Attn") for block in reversed(up)] != attention:
        raise UserError(f"up_block_types is {up} in {where!r}; accepted: attention at the levels of down_block_types")
    if any(width % widths[0] for width in widths):
        raise UserError(f"block_out_channels is {widths} in {where!r}; accepted: multiples of the first")
    shift = unet.get("resnet_time_scale_shift", "default")
    if shift not in ("default", "scale_shift"):
        raise _refuse(where, "resnet_time_scale_shift", shift, ("default", "scale_shift"))
    middle = unet.get("add_attention", True)
    # The middle attention's norm; with scale_shift, diffusers leaves it out unless told its groups.
    groups, middle_groups = unet.get("norm_num_groups", 32), unet.get("attn_norm_num_groups")
    if middle and middle_groups != groups and (middle_groups is not None or shift == "scale_shift"):
        raise _refuse(where, "attn_norm_num_groups", middle_groups, (groups,))
    with_attention = {width for width, attends in zip(widths, attention, strict=True) if attends}
    with_attention |= {widths[-1]} if middle else set()
    head_dim = unet.get("attention_head_dim", 8)
    heads = {width // head_dim for width in with_attention} if head_dim else {1}
    if len(heads) > 1 or any(head_dim and width % head_dim for width in with_attention):
        raise UserError(
            f"attention_head_dim is {head_dim} in {where!r}, which does not give every level with attention the same "
            "number of heads; accepted: one that does, or null for one head"
        )
    size = unet["sample_size"]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    config.data.update(source="folder", height=height, width=width, channels=unet["in_channels"])
    config.model.update(
        channels=widths[0],
        channel_multipliers=tuple(w // widths[0] for w in widths),
        num_res_blocks=unet["layers_per_block"],
        attention_levels=tuple(attention),
        attention_resolutions=(),
        middle_attention=middle,
        num_heads=heads.pop() if heads else 1,
        dropout=float(unet.get("dropout", 0.0)),
        num_groups=groups,
        scale_shift=shift == "scale_shift",
    )


def _read_scheduler(config: ConfigDict, scheduler: Mapping[str, Any], where: str) -> None:
    kind = scheduler.get("_class_name", "DDPMScheduler")
    if kind != "DDPMScheduler":
        raise _refuse(where, "_class_name", kind, ("DDPMScheduler",))
    _check_fields(where, scheduler, _FIXED_SCHEDULER | _FORMER_SCHEDULER, _FREE_SCHEDULER)
    diffusion = config.diffusion

    def choose(field: str, default: str, accepted: Mapping[str, str]) -> str:
        value = scheduler.get(field, default)
        if value not in accepted:
            raise _refuse(where, field, value, tuple(accepted))
        return accepted[value]

    betas = scheduler.get("trained_betas")
    if betas is not None:
        if not betas or len(betas) != scheduler.get("num_train_timesteps", 1000):
            raise UserError(
                f"trained_betas has {len(betas)} values in {where!r}; accepted: num_train_timesteps of them"
            )
        diffusion.betas = tuple(map(float, betas))
    else:
        diffusion.schedule = choose("beta_schedule", "linear", _SCHEDULES)
        diffusion.num_timesteps = scheduler.get("num_train_timesteps", 1000)
        diffusion.beta_start = float(scheduler.get("beta_start", 1e-4))
        diffusion.beta_end = float(scheduler.get("beta_end", 0.02))
    diffusion.zero_terminal_snr = scheduler.get("rescale_betas_zero_snr", False)
    config.log.sample_steps = min(config.log.sample_steps, len(diffusion.betas) or diffusion.num_timesteps)
    diffusion.prediction = choose("prediction_type", "epsilon", _PREDICTIONS)
    diffusion.variance = choose("variance_type", "fixed_small", _VARIANCES)
    if diffusion.variance == "learned":
        diffusion.loss = "hybrid"
    diffusion.clip = scheduler.get("clip_sample", True)
    if scheduler.get("thresholding", False):
        bound = scheduler.get("sample_max_value", 1.0)
        if bound == 1.0:  # the threshold lies between 1 and this bound
            diffusion.clip = True
        elif bound >= _UNBOUNDED:
            diffusion.dynamic_threshold = float(scheduler.get("dynamic_thresholding_ratio", 0.995))
            if not diffusion.dynamic_threshold:
                raise _refuse(where, "dynamic_thresholding_ratio", 0.0, ("above 0 to 1",))
        else:
            raise _refuse(where, "sample_max_value", bound, (1.0, _UNBOUNDED))


def _names(params: Mapping[str, Any], levels: int) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path in our tree, name in theirs) of every parameter."""
    for path in flatten_dict(params):
        block, leaf = path[0], {"kernel": "weight", "scale": "weight", "bias": "bias"}[path[-1]]
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
                yield path, f"{blocks}.{rest[-1]}rs.0.conv.{leaf}"
                continue
            index, kind = rest
            prefix = f"{blocks}.{'resnets' if kind == 'res' else 'attentions'}.{index}"
        yield path, f"{prefix}.{(_RES if kind == 'res' else _ATTENTION)[path[1]]}.{leaf}"


def _to_theirs(name: str, value: np.ndarray) -> np.ndarray:
    """Kernels [h, w, C, D] become [D, C, h, w], [C, D] become [D, C] ([D, C, 1, 1] in a shortcut)."""
    if value.ndim == 4:
        return value.transpose(3, 2, 0, 1)
    if value.ndim == 2:
        return value.T[..., None, None] if ".conv_shortcut." in name else value.T
    return value


def _to_ours(name: str, value: np.ndarray) -> np.ndarray:
    if value.ndim == 4:
        value = value.transpose(2, 3, 1, 0)
        return value[0, 0] if ".conv_shortcut." in name else value
    return value.T if value.ndim == 2 else value


def tensor_shapes(config: ConfigDict) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that a `UNet2DModel` of this config has."""
    shapes = config_lib.make_model(config).param_shapes()
    empty = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    return {name: value.shape for name, value in to_tensors(empty, len(config.model.channel_multipliers)).items()}


def to_params(path: str | Path, tensors: tensors_lib.Tensors, config: ConfigDict) -> dict[str, Any]:
    """Our parameters from a `UNet2DModel`'s tensors, with today's or the old names of attention.

    Raises:
      UserError: a tensor that is missing, too many, or of another shape or dtype than the config's network has.
    """
    shapes = config_lib.make_model(config).param_shapes()
    names = dict(_names(shapes, len(config.model.channel_multipliers)))
    wanted = tensor_shapes(config)
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
    """A `UNet2DModel`'s tensors from our parameters; `levels` is the number of channel_multipliers."""
    flat = flatten_dict(params)
    return {name: _to_theirs(name, np.asarray(flat[ours])) for ours, name in _names(params, levels)}


def from_config(config: ConfigDict, net: UNet) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configs of the `UNet2DModel` and the `DDPMScheduler` that compute what a run does.

    Raises:
      UserError: an option that diffusers' network does not have, by name.
    """
    model, diffusion, data = config.model, config.diffusion, config.data
    for field, accepted in (
        ("downsample", "conv"),
        ("upsample", "nearest"),
        ("attention_patch_size", 1),
        ("class_conditional", False),
    ):
        if model[field] != accepted:
            raise UserError(f"config.model.{field} is {model[field]!r}; diffusers' UNet2DModel only has {accepted!r}")
    attends = net.levels_with_attention(data.height, data.width)
    widths = [model.channels * multiplier for multiplier in model.channel_multipliers]
    with_attention = {width for width, attention in zip(widths, attends, strict=True) if attention}
    with_attention |= {widths[-1]} if model.middle_attention else set()
    if model.num_heads > 1 and len(with_attention) > 1:
        raise UserError(
            f"config.model.num_heads is {model.num_heads} at levels of {sorted(with_attention)} channels; diffusers' "
            "UNet2DModel has one number of channels a head"
        )
    unet = {
        "_class_name": "UNet2DModel",
        "sample_size": data.height if data.height == data.width else [data.height, data.width],
        "in_channels": data.channels,
        "out_channels": data.channels * (2 if net.learned_variance else 1),
        "block_out_channels": widths,
        "layers_per_block": model.num_res_blocks,
        "down_block_types": ["AttnDownBlock2D" if attention else "DownBlock2D" for attention in attends],
        "up_block_types": ["AttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)],
        "add_attention": model.middle_attention,
        "attention_head_dim": max(with_attention) // model.num_heads
        if with_attention and model.num_heads > 1
        else None,
        "norm_num_groups": model.num_groups,
        "attn_norm_num_groups": model.num_groups if model.scale_shift else None,
        "dropout": model.dropout,
        "resnet_time_scale_shift": "scale_shift" if model.scale_shift else "default",
        **{field: accepted[0] for field, (_, accepted) in _FIXED_UNET.items()},
    }
    scheduler = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": len(diffusion.betas) or diffusion.num_timesteps,
        "prediction_type": {ours: theirs for theirs, ours in _PREDICTIONS.items()}[diffusion.prediction],
        "variance_type": {ours: theirs for theirs, ours in reversed(_VARIANCES.items())}[diffusion.variance],
        "clip_sample": diffusion.clip,
        **{field: accepted[0] for field, (_, accepted) in _FIXED_SCHEDULER.items()},
    }
    if diffusion.dynamic_threshold:
        scheduler |= {
            "thresholding": True,
            "dynamic_thresholding_ratio": diffusion.dynamic_threshold,
            "sample_max_value": _UNBOUNDED,
        }
    if diffusion.schedule == "linear" and not diffusion.betas:
        scheduler |= {"beta_schedule": "linear", "beta_start": diffusion.beta_start, "beta_end": diffusion.beta_end}
        scheduler["rescale_betas_zero_snr"] = diffusion.zero_terminal_snr
    else:
        scheduler["trained_betas"] = config_lib.make_betas_from(config).tolist()
    return unet, scheduler


def write(folder: str | Path, config: ConfigDict, net: UNet, params: Mapping[str, Any]) -> Path:
    """Writes a folder that `diffusers.DDPMPipeline.from_pretrained` opens, whole or not at all.

    Args:
      folder: must not be there, or be empty.
      config, net, params: of a run.

    Raises:
      UserError: the folder holds something, or the run something that diffusers does not have.
    """
    unet, scheduler = from_config(config, net)
    tensors = to_tensors(params, len(config.model.channel_multipliers))
    pipeline = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    with new_folder(folder, "--out") as temporary:
        for name, value in (
            ("model_index.json", pipeline),
            ("unet/config.json", unet),
            ("scheduler/scheduler_config.json", scheduler),
        ):
            write_text(temporary / name, json.dumps(value, indent=2) + "\n")
        tensors_lib.write(temporary / "unet" / WEIGHTS[0], tensors, {"format": "pt"})
    return Path(folder).expanduser()
