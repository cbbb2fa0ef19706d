"""A run's parameters as one .safetensors file with our own names, such as "down_0_0_res.conv_0.kernel".

The file's metadata contain the config, the data set's description and the step, from which a workdir can be restored.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open

from ddpm_jax import config as config_lib
from ddpm_jax.interop import tensors as tensors_lib
from ddpm_jax.runtime import workdir
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.validation import make_valid_model

_FORMAT = "ddpm_jax"


def is_export(path: str | Path) -> bool:
    """Whether a .safetensors file was made by `write`, according to its metadata."""
    try:
        with safe_open(path, "numpy") as file:
            return (file.metadata() or {}).get("format") == _FORMAT
    except (SafetensorError, OSError):  # reported when the file is read
        return False


def write(
    path: str | Path, config: ConfigDict, dataset: Mapping[str, Any], step: int, params: Mapping[str, Any]
) -> Path:
    """Writes the file; UserError if it already exists."""
    path = Path(os.path.expanduser(path))
    if os.path.exists(path):
        raise UserError(f"{str(path)!r} already exists; choose another name")
    config = config.copy_and_resolve_references()
    config.lora.rank = 0  # adapters are already merged into the weights
    metadata = {
        "format": _FORMAT,
        "config": config_lib.to_json(config),
        "dataset": json.dumps({name: value for name, value in dataset.items() if name not in workdir.PARTS}),
        "step": str(step),
    }
    tensors = {name: np.asarray(value) for name, value in flatten_dict(params, sep=".").items()}
    tensors_lib.write(path, tensors, metadata)
    return path


def read(path: str | Path) -> tuple[ConfigDict, dict[str, Any], int, dict[str, Any]]:
    """Reads config, description of the data set, step and parameters from a file made by `write`.

    Raises:
      UserError: any other file, or a tensor that its config's network does not have.
    """
    tensors = tensors_lib.read(path)
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
        config, dataset = config_lib.from_json(metadata["config"]), json.loads(metadata["dataset"])
        step = int(metadata["step"])
        if not 0 <= step < 2**31 or not dataset.keys() >= {"class_names", "fingerprint", "num_images", "shape"}:
            raise ValueError("a valid step or a complete description of the data set")
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{str(path)!r} was not exported from a run: its metadata lack {error}") from None
    shapes = flatten_dict(make_valid_model(config, dataset)[1], sep=".")
    tensors_lib.check(path, tensors, {name: leaf.shape for name, leaf in shapes.items()})
    return config, dataset, step, unflatten_dict(tensors, sep=".")
