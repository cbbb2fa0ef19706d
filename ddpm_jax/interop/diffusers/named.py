"""Conversion by name of components that consist of dense layers, norms and embeddings."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ddpm_jax.interop import tensors as tensors_lib

Name = Callable[[tuple[str, ...]], tuple[str, int]]
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def tensor_shapes(shapes: Mapping[str, Any], name: Name) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor.

    Args:
      shapes: a tree of our parameters, or of their shapes.
      name: maps a parameter's path to its name in diffusers and the number of leading axes of length 1 it has there.
    """
    wanted = {}
    for path, leaf in flatten_dict(shapes).items():
        theirs, axes = name(path)
        wanted[theirs] = (1,) * axes + (leaf.shape[::-1] if path[-1] == "kernel" else leaf.shape)
    return wanted


def to_params(
    path: str | Path, tensors: Mapping[str, np.ndarray], shapes: Mapping[str, Any], name: Name
) -> dict[str, Any]:
    """Our float32 parameters from the tensors of the file `path`.

    Raises:
      UserError: a tensor that is missing, unexpected, or of a different shape or dtype than the component's.
    """
    tensors = tensors_lib.to_float32(tensors)
    tensors_lib.check(path, tensors, tensor_shapes(shapes, name))
    params = {}
    for ours, leaf in flatten_dict(shapes).items():
        value = tensors[name(ours)[0]]
        params[ours] = np.ascontiguousarray(value.T) if ours[-1] == "kernel" else value.reshape(leaf.shape)
    return unflatten_dict(params)


def to_tensors(params: Mapping[str, Any], name: Name) -> tensors_lib.Tensors:
    """The tensors by their names from our parameters."""
    tensors = {}
    for path, leaf in flatten_dict(params).items():
        theirs, axes = name(path)
        value = np.asarray(leaf)
        value = np.ascontiguousarray(value.T) if path[-1] == "kernel" else value
        tensors[theirs] = value.reshape((1,) * axes + value.shape)
    return tensors
