"""Converts tensors of diffusers' `UNet2DModel` and `UNet2DConditionModel` to this project's parameters and back.

The networks differ only in names and in the order of the kernels' axes, so a round trip preserves every bit. The
projections of a spatial transformer are 1 x 1 convolutions in Stable Diffusion 1.x and linear layers in 2.x: the same
values, in different shapes.
"""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ddpm_jax.interop import tensors as tensors_lib

_RES = {
    "norm_0": "norm1",
    "conv_0": "conv1",
    "embedding": "time_emb_proj",
    "norm_1": "norm2",
    "conv_1": "conv2",
    "shortcut": "conv_shortcut",
}
_ATTENTION = {
    "norm": "group_norm",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "out": "to_out.0",
    "context_norm": "norm_cross",
    "cross_key": "add_k_proj",
    "cross_value": "add_v_proj",
}
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_TRANSFORMER = {
    **_ATTENTION,
    "norm": "norm",
    "project_in": "proj_in",
    "project_out": "proj_out",
    "attention": "attn1",
    "cross": "attn2",
    "norm_0": "norm1",
    "norm_1": "norm2",
    "norm_2": "norm3",
    "mlp_0": "ff.net.0.proj",
    "mlp_1": "ff.net.2",
}
# diffusers' name of each kind of block, and the names of its parts.
_KINDS = {
    "res": ("resnets", _RES),
    "attention": ("attentions", _ATTENTION),
    "transformer": ("attentions", _TRANSFORMER),
}
_OUTER = {
    "time_table": "time_proj",
    "time_0": "time_embedding.linear_1",
    "time_1": "time_embedding.linear_2",
    "label": "class_embedding",
    "level_0": "class_embedding.linear_1",
    "level_1": "class_embedding.linear_2",
    "vector_0": "class_embedding.linear_1",
    "vector_1": "class_embedding.linear_2",
    "tokens": "encoder_hid_proj",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_POOLING = {
    "norm_0": "norm1",
    "place": "pool.positional_embedding",
    "query": "pool.q_proj",
    "key": "pool.k_proj",
    "value": "pool.v_proj",
    "project": "proj",
    "norm_1": "norm2",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
# Embedding tables, [rows, features] in both.
_TABLES = ("time_proj.weight", "class_embedding.weight", "add_embedding.pool.positional_embedding")


def to_tensors(
    params: Mapping[str, Any], levels: int, linear_projections: bool = False, prefix: str = ""
) -> tensors_lib.Tensors:
    """A network's tensors from our parameters.

    Args:
      params: of a `UNet`, or of one half of an `Autoencoder`.
      levels: number of levels.
      linear_projections: whether its spatial transformers use these instead of 1 x 1 convolutions.
      prefix: of the tensors' names.
    """
    flat = flatten_dict(params)
    pointwise = _pointwise(linear_projections)
    return {prefix + name: _to_theirs(name, np.asarray(flat[ours]), pointwise) for ours, name in _names(params, levels)}


def tensor_shapes(
    param_shapes: Mapping[str, Any], levels: int, linear_projections: bool = False, prefix: str = ""
) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of a network with parameters of these shapes."""
    flat = flatten_dict(param_shapes)
    empty = unflatten_dict({path: np.broadcast_to(np.float32(0), leaf.shape) for path, leaf in flat.items()})
    return {name: value.shape for name, value in to_tensors(empty, levels, linear_projections, prefix).items()}


def to_params(
    path: str | Path,
    tensors: tensors_lib.Tensors,
    param_shapes: Mapping[str, Any],
    levels: int,
    linear_projections: bool = False,
    prefix: str = "",
) -> dict[str, Any]:
    """Our parameters from a network's tensors, with the current or the old names of attention, whose kernels are 1 x 1
    convolutions in some old files. Half precision becomes float32, which changes no value.

    Args:
      path: of the file, for error messages.
      tensors: [D, C, h, w] and so on, by diffusers' names.
      param_shapes: of our network.
      levels, linear_projections, prefix: see `to_tensors`.

    Raises:
      UserError: a tensor that is missing, unexpected, or of a different shape or dtype than the network's.
    """
    names = {ours: prefix + name for ours, name in _names(param_shapes, levels)}
    wanted = tensor_shapes(param_shapes, levels, linear_projections, prefix)
    tensors = tensors_lib.to_float32(tensors)
    if any(".attentions." in name and ".query." in name for name in tensors):
        for new, former in _OLD_ATTENTION.items():
            pattern = re.compile(rf"(\.attentions\.\d+\.){re.escape(new)}(?=\.)")
            former_name = partial(pattern.sub, rf"\g<1>{former}")
            names = {ours: former_name(name) for ours, name in names.items()}
            wanted = {former_name(name): shape for name, shape in wanted.items()}
        tensors = {
            name: value[..., 0, 0] if value.shape[2:] == (1, 1) and len(wanted.get(name, ())) == 2 else value
            for name, value in tensors.items()
        }
    tensors_lib.check(path, tensors, wanted)
    pointwise = _pointwise(linear_projections)
    return unflatten_dict(
        {ours: np.ascontiguousarray(_to_ours(name, tensors[name], pointwise)) for ours, name in names.items()}
    )


def paths(params: Mapping[str, Any], levels: int) -> dict[str, tuple[str, ...]]:
    """The path in our tree of each diffusers tensor; the arguments as in `to_tensors`."""
    return {name: ours for ours, name in _names(params, levels)}


def _names(params: Mapping[str, Any], levels: int) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields (path in our tree, diffusers' name) of every parameter."""
    for path in flatten_dict(params):
        block = path[0]
        if block == "pooling":
            yield path, ".".join(["add_embedding", _POOLING[path[1]], *(_LEAVES[leaf] for leaf in path[2:])])
            continue
        leaf = _LEAVES[path[-1]]
        if block in _OUTER:
            yield path, f"{_OUTER[block]}.{leaf}"
            continue
        side, level, *rest = block.split("_")
        if side == "middle":
            prefix, index, kind = "mid_block", level, rest[0]
        else:
            prefix = f"{side}_blocks.{level if side == 'down' else levels - 1 - int(level)}"
            if rest[-1].endswith("sample"):
                part = _RES.get(path[1], "conv")  # of a residual block, or the convolution itself
                yield path, f"{prefix}.{rest[-1]}rs.0.{part}.{leaf}"
                continue
            index, kind = rest
        blocks, parts = _KINDS[kind]
        inner = [parts.get(name) or name.replace("block_", "transformer_blocks.") for name in path[1:-1]]
        yield path, ".".join([prefix, blocks, index, *inner, leaf])


def _pointwise(linear_projections: bool) -> tuple[str, ...]:
    """Layers that are 1 x 1 convolutions in diffusers and matrix products here."""
    return ("conv_shortcut",) if linear_projections else ("conv_shortcut", "proj_in", "proj_out")


def _to_theirs(name: str, value: np.ndarray, pointwise: tuple[str, ...]) -> np.ndarray:
    """Kernels [h, w, C, D] become [D, C, h, w], [C, D] become [D, C] ([D, C, 1, 1] in a 1 x 1 convolution)."""
    if value.ndim == 4:
        return value.transpose(3, 2, 0, 1)
    if value.ndim == 2 and name not in _TABLES:
        return value.T[..., None, None] if name.split(".")[-2] in pointwise else value.T
    return value


def _to_ours(name: str, value: np.ndarray, pointwise: tuple[str, ...]) -> np.ndarray:
    if value.ndim == 4:
        value = value.transpose(2, 3, 1, 0)
        return value[0, 0] if name.split(".")[-2] in pointwise else value
    return value.T if value.ndim == 2 and name not in _TABLES else value
