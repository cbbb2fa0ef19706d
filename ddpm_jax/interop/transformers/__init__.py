"""Reads and writes transformers folders without transformers or PyTorch: one module per family of encoders.

The functions here work for text encoders of both families, CLIP and T5, as determined by the config or the encoder.
Weights are read from safetensors or PyTorch's pickles, in one file or in shards. Half precision becomes float32, which
changes no value.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.interop import tensors as tensors_lib
from ddpm_jax.interop.transformers import clip, t5
from ddpm_jax.interop.transformers.clip import CLIP, clip_width, read_clip, read_image, why_not, write_clip
from ddpm_jax.interop.transformers.folder import WEIGHTS, architecture, check_tokenizer, require
from ddpm_jax.models.clip import CLIPTextEncoder
from ddpm_jax.models.t5 import T5Encoder
from ddpm_jax.runtime.files import read_json_object

__all__ = [
    "CLIP",
    "WEIGHTS",
    "Encoder",
    "check_tokenizer",
    "clip_width",
    "read",
    "read_clip",
    "read_image",
    "read_module",
    "to_module",
    "to_params",
    "why_not",
    "write",
    "write_clip",
]

Encoder = CLIPTextEncoder | T5Encoder
_ARCHITECTURES = (*clip.ARCHITECTURES, *t5.ARCHITECTURES)


def read(folder: str | Path) -> tuple[Encoder, dict[str, Any]]:
    """Reads a text encoder and its float32 parameters from a folder with config.json and weights.

    Raises:
      UserError: a file that is missing or broken, an architecture or activation that is not supported, or a tensor that
        is missing, unexpected, or of a different shape or dtype.
    """
    net = read_module(folder)
    path, tensors = tensors_lib.read_weights(folder, WEIGHTS)
    return net, to_params(path, tensors, net)


def read_module(folder: str | Path) -> Encoder:
    """Reads the encoder of such a folder without its parameters; UserError as for `read`."""
    path = Path(folder) / "config.json"
    return to_module(read_json_object(path), str(path))


def to_module(config: Mapping[str, Any], where: str = "config.json") -> Encoder:
    """Converts a transformers config to an encoder; UserError by field."""
    kind = architecture(config)
    require(kind in _ARCHITECTURES, "architectures", kind, where, ", ".join(_ARCHITECTURES))
    return (t5 if kind in t5.ARCHITECTURES else clip).to_module(config, where)


def to_params(path: str | Path, tensors: Mapping[str, np.ndarray], net: Encoder) -> dict[str, Any]:
    """The encoder's parameters from the tensors of `path`; UserError if any is missing or unexpected."""
    if isinstance(net, T5Encoder):
        return t5.to_params(path, tensors, net)
    return clip.to_params(path, tensors, net)


def write(folder: str | Path, net: Encoder, params: Mapping[str, Any]) -> Path:
    """Writes a folder that transformers' `from_pretrained` opens, atomically.

    Raises:
      UserError: the folder is not empty or cannot be written.
    """
    return t5.write(folder, net, params) if isinstance(net, T5Encoder) else clip.write(folder, net, params)
