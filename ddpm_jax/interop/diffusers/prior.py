"""Converts diffusers' `PriorTransformer`, the prior of Karlo and Kandinsky, to this project's prior and back."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.interop import tensors as tensors_lib
from ddpm_jax.interop.diffusers import named
from ddpm_jax.interop.diffusers.fields import (
    WEIGHTS,
    check_accepted,
    check_counts,
    choose,
    refusal,
    with_defaults,
)
from ddpm_jax.models.prior import ADDED_TOKENS, Prior
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.files import new_folder, read_json_object, write_text

_NAME = "PriorTransformer"
# All fields, with diffusers' defaults for those missing from a file.
_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 32,
    "attention_head_dim": 64,
    "num_layers": 20,
    "embedding_dim": 768,
    "num_embeddings": 77,
    "additional_embeddings": ADDED_TOKENS,
    "dropout": 0.0,
    "time_embed_act_fn": "silu",
    "norm_in_type": None,
    "embedding_proj_norm_type": None,
    "encoder_hid_proj_type": "linear",
    "added_emb_type": "prd",
    "time_embed_dim": None,
    "embedding_proj_dim": None,
    "clip_embed_dim": None,
}
# Fields for which this project supports these values only.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "additional_embeddings": (ADDED_TOKENS,),
    "dropout": (0.0,),
    "added_emb_type": ("prd",),
}
_ACTIVATIONS = {"silu": "swish", "swish": "swish", "gelu": "gelu", "mish": "mish", "relu": "relu"}
_NORMS = {None: False, "layer": True}
_PARTS = {
    "time_0": "time_embedding.linear_1",
    "time_1": "time_embedding.linear_2",
    "x": "proj_in",
    "vector_norm": "embedding_proj_norm",
    "vector": "embedding_proj",
    "tokens": "encoder_hidden_states_proj",
    "out": "proj_to_clip_embeddings",
    "norm_0": "norm1",
    "query": "attn1.to_q",
    "key": "attn1.to_k",
    "value": "attn1.to_v",
    "norm_1": "norm3",
    "mlp_0": "ff.net.0.proj",
    "mlp_1": "ff.net.2",
}
_STATISTICS = ("clip_mean", "clip_std")


@dataclasses.dataclass(frozen=True)
class Widths:
    """The widths of a prior's inputs.

    Attributes:
      embedding: of the image embedding, which is also the output.
      vector: of the text embedding.
    """

    embedding: int = 768
    vector: int = 768


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of CLIP's image embeddings, which are normalised for the network to (embedding - mean) / std.

    Attributes:
      mean, std: float32 [D].
    """

    mean: np.ndarray
    std: np.ndarray


def read_module(folder: str | Path) -> tuple[Prior, Widths]:
    """Reads a folder's prior without its parameters, and the widths of its inputs; UserError by field."""
    path = Path(folder) / "config.json"
    return to_module(read_json_object(path), str(path))


def read(folder: str | Path) -> tuple[Prior, dict[str, Any], Statistics]:
    """Reads a folder's prior, its float32 parameters, and the statistics of the embeddings that it was trained on.

    Raises:
      UserError: a file that is missing or broken, a field that is not supported, or a tensor that does not fit.
    """
    net, widths = read_module(folder)
    path, tensors = tensors_lib.read_weights(folder, WEIGHTS)
    return net, *to_params(path, tensors, net, widths)


def write(folder: str | Path, net: Prior, params: Mapping[str, Any], statistics: Statistics) -> None:
    """Writes a folder that diffusers' `PriorTransformer.from_pretrained` opens, atomically.

    Raises:
      UserError: the folder is not empty or cannot be written; or widths that diffusers' network does not support.
    """
    fields, tensors = to_fields(net, params), to_tensors(params, statistics)
    with new_folder(folder, "the folder") as temporary:
        write_text(temporary / "config.json", json.dumps(fields, indent=2) + "\n")
        tensors_lib.write(temporary / WEIGHTS[0], tensors, {"format": "pt"})


# The config.


def to_module(found: Mapping[str, Any], where: str = "config.json") -> tuple[Prior, Widths]:
    """Converts a `PriorTransformer`'s config; see `read_module`."""
    check_accepted(where, {"_class_name": _NAME, **found}, {"_class_name": (_NAME,)})
    fields = with_defaults(where, found, _DEFAULTS)
    check_accepted(where, fields, _ACCEPTED)
    for name in ("time_embed_dim", "embedding_proj_dim", "clip_embed_dim"):
        if fields[name] is not None:
            check_counts(where, fields, name)
    counts = ("num_attention_heads", "attention_head_dim", "num_layers", "embedding_dim", "num_embeddings")
    check_counts(where, fields, *counts)
    embedding = fields["embedding_dim"]
    if fields["clip_embed_dim"] not in (None, embedding):
        raise refusal(where, "clip_embed_dim", fields["clip_embed_dim"], (None, embedding))
    net = Prior(
        width=fields["num_attention_heads"] * fields["attention_head_dim"],
        num_layers=fields["num_layers"],
        num_heads=fields["num_attention_heads"],
        num_tokens=fields["num_embeddings"],
        time_width=fields["time_embed_dim"],
        time_activation=choose(where, fields, "time_embed_act_fn", _ACTIVATIONS),
        project_tokens=choose(where, fields, "encoder_hid_proj_type", {"linear": True, None: False}),
        norm_vector=choose(where, fields, "embedding_proj_norm_type", _NORMS),
        norm_in=choose(where, fields, "norm_in_type", _NORMS),
    )
    return net, Widths(embedding, fields["embedding_proj_dim"] or embedding)


def to_fields(net: Prior, params: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the equivalent `PriorTransformer`; UserError if there is none."""
    if net.width % net.num_heads:
        raise UserError(f"num_heads is {net.num_heads}; accepted: a divisor of the width, {net.width}")
    embedding, vector = (params[name]["kernel"].shape[0] for name in ("x", "vector"))
    if net.project_tokens and params["tokens"]["kernel"].shape[0] != embedding:
        raise UserError(
            f"the text's tokens have width {params['tokens']['kernel'].shape[0]}; accepted by diffusers' {_NAME}: the "
            f"image embeddings', {embedding}"
        )
    return {
        "_class_name": _NAME,
        **_DEFAULTS,
        "num_attention_heads": net.num_heads,
        "attention_head_dim": net.width // net.num_heads,
        "num_layers": net.num_layers,
        "embedding_dim": embedding,
        "num_embeddings": net.num_tokens,
        "time_embed_act_fn": next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == net.time_activation),
        "norm_in_type": "layer" if net.norm_in else None,
        "embedding_proj_norm_type": "layer" if net.norm_vector else None,
        "encoder_hid_proj_type": "linear" if net.project_tokens else None,
        "time_embed_dim": net.time_width,
        "embedding_proj_dim": None if vector == embedding else vector,
    }


# The tensors.


def param_shapes(net: Prior, widths: Widths) -> dict[str, Any]:
    """The parameters of the prior as `jax.ShapeDtypeStruct`s."""
    tokens = widths.embedding if net.project_tokens else net.width
    shapes = {"tokens": (1, net.num_tokens, tokens), "vector": (1, widths.vector)}
    cond = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    x, t = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 1, 1, widths.embedding), (1,)))
    return jax.eval_shape(net.init, jax.random.key(0), x, t, cond)["params"]


def tensor_shapes(net: Prior, widths: Widths) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that the `PriorTransformer` has."""
    statistics = dict.fromkeys(_STATISTICS, (1, widths.embedding))
    return named.tensor_shapes(param_shapes(net, widths), _name) | statistics


def to_params(
    path: str | Path, tensors: Mapping[str, np.ndarray], net: Prior, widths: Widths
) -> tuple[dict[str, Any], Statistics]:
    """Our parameters and the embeddings' statistics from a `PriorTransformer`'s tensors.

    Half precision becomes float32, which changes no value.

    Raises:
      UserError: a tensor that is missing, unexpected, or of a different shape or dtype than the prior's.
    """
    shape = jax.ShapeDtypeStruct((widths.embedding,), jnp.float32)
    shapes = {**param_shapes(net, widths), **dict.fromkeys(_STATISTICS, shape)}
    params = named.to_params(path, tensors, shapes, _name)
    return params, Statistics(*(params.pop(name) for name in _STATISTICS))


def to_tensors(params: Mapping[str, Any], statistics: Statistics) -> tensors_lib.Tensors:
    """A `PriorTransformer`'s tensors from our parameters and the embeddings' statistics."""
    values = dict(zip(_STATISTICS, (statistics.mean, statistics.std), strict=True))
    return named.to_tensors({**params, **values}, _name)


def _name(path: tuple[str, ...]) -> tuple[str, int]:
    """A parameter's name in diffusers, and the number of its leading axes of length 1 there."""
    if path[0] in _STATISTICS:
        return path[0], 1
    if path == ("positions",):
        return "positional_embedding", 1
    if path == ("query",):
        return "prd_embedding", 2
    *_, part, leaf = path
    if path[0] == "transformer":
        block = f"transformer_blocks.{path[1].removeprefix('block_')}"
        inner = "attn1.to_out.0" if part == "out" else _PARTS[part]
        return f"{block}.{inner}.{named.LEAVES[leaf]}", 0
    return f"{_PARTS.get(part, part)}.{named.LEAVES[leaf]}", 0
