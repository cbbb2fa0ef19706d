"""Converts diffusers' `AutoencoderKL` to this project's autoencoder and back."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.interop import tensors as tensors_lib
from ddpm_jax.interop.diffusers import unet_tensors
from ddpm_jax.interop.diffusers.fields import WEIGHTS, check_accepted, check_counts, refusal, with_defaults
from ddpm_jax.models.autoencoder import Autoencoder, param_shapes
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.files import new_folder, read_json_object, write_text

_NAME = "AutoencoderKL"
# All fields, with diffusers' defaults for those missing from a file.
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
# Fields for which this project supports these values only.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "shift_factor": (None, 0.0),
    "latents_mean": (None,),
    "latents_std": (None,),
    "force_upcast": (True, False),  # only matters in half precision
    "use_quant_conv": (True, False),
    "use_post_quant_conv": (True, False),
    "mid_block_add_attention": (True, False),
}
_EPSILON = 1e-6  # of all their norms
_HALVES = ("encoder", "decoder")


def read_module(folder: str | Path) -> tuple[Autoencoder, float]:
    """Reads a folder's autoencoder without parameters, and the scaling factor of its latents; UserError by field."""
    path = Path(folder) / "config.json"
    return to_module(read_json_object(path), str(path))


def read(folder: str | Path) -> tuple[Autoencoder, dict[str, Any], float]:
    """Reads a folder's autoencoder, its float32 parameters, and the scaling factor of its latents.

    Raises:
      UserError: a file that is missing or broken, a field that is not supported, or a tensor that does not fit.
    """
    net, factor = read_module(folder)
    path, tensors = tensors_lib.read_weights(folder, WEIGHTS)
    return net, to_params(path, tensors, net), factor


def write(folder: str | Path, net: Autoencoder, params: Mapping[str, Any], scaling_factor: float) -> None:
    """Writes a folder that diffusers' `AutoencoderKL.from_pretrained` opens, atomically.

    Raises:
      UserError: the folder is not empty or cannot be written.
    """
    with new_folder(folder, "the folder") as temporary:
        write_text(temporary / "config.json", json.dumps(to_fields(net, scaling_factor), indent=2) + "\n")
        tensors_lib.write(temporary / WEIGHTS[0], to_tensors(params, net), {"format": "pt"})


# The config.


def to_module(found: Mapping[str, Any], where: str = "config.json") -> tuple[Autoencoder, float]:
    """Converts an `AutoencoderKL`'s config; see `read_module`."""
    check_accepted(where, {"_class_name": _NAME, **found}, {"_class_name": (_NAME,)})
    fields = with_defaults(where, found, _DEFAULTS)
    check_accepted(where, fields, _ACCEPTED)
    check_counts(where, fields, "in_channels", "latent_channels", "layers_per_block", "norm_num_groups")
    widths = fields["block_out_channels"]
    if not isinstance(widths, list | tuple) or not widths:
        raise refusal(where, "block_out_channels", widths, ("a list of widths",))
    for width in widths:
        check_counts(where, {"block_out_channels": width}, "block_out_channels")
    for field, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if list(fields[field]) != [kind] * len(widths):
            raise UserError(
                f"{field} is {fields[field]!r} in {where!r}; accepted: {kind} for each of block_out_channels"
            )
    if fields["in_channels"] != fields["out_channels"]:
        raise refusal(where, "out_channels", fields["out_channels"], (fields["in_channels"],))
    groups, factor = fields["norm_num_groups"], fields["scaling_factor"]
    if any(width % groups for width in widths):
        raise UserError(f"norm_num_groups is {groups} in {where!r}; accepted: a divisor of {tuple(widths)}")
    if not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise UserError(f"scaling_factor is {factor!r} in {where!r}; accepted: a number above 0")
    net = Autoencoder(
        channels=fields["in_channels"],
        latent_channels=fields["latent_channels"],
        widths=tuple(widths),
        num_res_blocks=fields["layers_per_block"],
        num_groups=groups,
        norm_epsilon=_EPSILON,
        middle_attention=fields["mid_block_add_attention"],
        use_quant_conv=fields["use_quant_conv"],
        use_post_quant_conv=fields["use_post_quant_conv"],
    )
    return net, float(factor)


def to_fields(net: Autoencoder, scaling_factor: float) -> dict[str, Any]:
    """The config of the equivalent `AutoencoderKL`; UserError if there is none."""
    if net.norm_epsilon != _EPSILON:
        raise UserError(f"norm_epsilon is {net.norm_epsilon}; diffusers' {_NAME} only has {_EPSILON}")
    levels = len(net.widths)
    return {
        "_class_name": _NAME,
        "in_channels": net.channels,
        "out_channels": net.channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(net.widths),
        "layers_per_block": net.num_res_blocks,
        "act_fn": "silu",
        "latent_channels": net.latent_channels,
        "norm_num_groups": net.num_groups,
        "sample_size": 8 * net.downscaling,
        "scaling_factor": scaling_factor,
        "use_quant_conv": net.use_quant_conv,
        "use_post_quant_conv": net.use_post_quant_conv,
        "mid_block_add_attention": net.middle_attention,
    }


# The tensors.


def to_params(path: str | Path, tensors: Mapping[str, np.ndarray], net: Autoencoder) -> dict[str, Any]:
    """Our parameters from an `AutoencoderKL`'s tensors; see `unet_tensors.to_params`.

    Raises:
      UserError: a tensor that is missing, unexpected, or of a different shape or dtype than the autoencoder's.
    """
    shapes, params, levels = param_shapes(net), {}, len(net.widths)
    for half in _HALVES:
        own = {name: value for name, value in tensors.items() if name.startswith(f"{half}.")}
        params[half] = unet_tensors.to_params(path, own, shapes[half], levels, prefix=f"{half}.")
    rest = {name: value for name, value in tensors.items() if name.partition(".")[0] not in _HALVES}
    layers = [layer for layer in shapes if layer not in _HALVES]
    wanted: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        inputs, outputs = shapes[layer]["kernel"].shape
        wanted |= {f"{layer}.weight": (outputs, inputs, 1, 1), f"{layer}.bias": (outputs,)}
    rest = tensors_lib.to_float32(rest)
    tensors_lib.check(path, rest, wanted)
    for layer in layers:
        kernel = np.ascontiguousarray(rest[f"{layer}.weight"][..., 0, 0].T)
        params[layer] = {"kernel": kernel, "bias": rest[f"{layer}.bias"]}
    return params


def to_tensors(params: Mapping[str, Any], net: Autoencoder) -> tensors_lib.Tensors:
    """An `AutoencoderKL`'s tensors from our parameters."""
    tensors: tensors_lib.Tensors = {}
    for part, inner in params.items():
        if part in _HALVES:
            tensors |= unet_tensors.to_tensors(inner, len(net.widths), prefix=f"{part}.")
        else:
            tensors[f"{part}.weight"] = np.asarray(inner["kernel"]).T[..., None, None]
            tensors[f"{part}.bias"] = np.asarray(inner["bias"])
    return tensors
