"""Converts diffusers' `UnCLIPTextProjModel`, which prepares the condition of Karlo's decoder, and back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.interop import tensors as tensors_lib
from ddpm_jax.interop.diffusers import named
from ddpm_jax.interop.diffusers.fields import WEIGHTS, check_accepted, check_counts, with_defaults
from ddpm_jax.models.embedding_condition import EmbeddingCondition
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.files import new_folder, read_json_object, write_text

_NAME = "UnCLIPTextProjModel"
# All fields, with diffusers' defaults for those missing from a file; two are required.
_DEFAULTS: dict[str, Any] = {
    "clip_extra_context_tokens": 4,
    "clip_embeddings_dim": 768,
    "time_embed_dim": None,
    "cross_attention_dim": None,
}
_PARTS = {
    "vector_to_time": "embedding_proj",
    "embedding_to_time": "clip_image_embeddings_project_to_time_embeddings",
    "embedding_to_tokens": "clip_extra_context_tokens_proj",
    "tokens": "encoder_hidden_states_proj",
    "tokens_norm": "text_encoder_hidden_states_norm",
}


def read_module(folder: str | Path) -> tuple[EmbeddingCondition, int]:
    """Reads a folder's module without its parameters, and the width of CLIP's embeddings; UserError by field."""
    path = Path(folder) / "config.json"
    return to_module(read_json_object(path), str(path))


def read(folder: str | Path) -> tuple[EmbeddingCondition, dict[str, Any]]:
    """Reads a folder's module and its float32 parameters.

    Raises:
      UserError: a file that is missing or broken, a field that is not supported, or a tensor that does not fit.
    """
    module, width = read_module(folder)
    path, tensors = tensors_lib.read_weights(folder, WEIGHTS)
    return module, to_params(path, tensors, module, width)


def write(folder: str | Path, module: EmbeddingCondition, params: Mapping[str, Any]) -> None:
    """Writes a folder that diffusers' `UnCLIPTextProjModel.from_pretrained` opens, atomically.

    Raises:
      UserError: the folder is not empty or cannot be written; or widths that diffusers' module does not support.
    """
    fields = to_fields(module, params)
    with new_folder(folder, "the folder") as temporary:
        write_text(temporary / "config.json", json.dumps(fields, indent=2) + "\n")
        tensors_lib.write(temporary / WEIGHTS[0], to_tensors(params), {"format": "pt"})


def to_module(found: Mapping[str, Any], where: str = "config.json") -> tuple[EmbeddingCondition, int]:
    """Converts an `UnCLIPTextProjModel`'s config; see `read_module`."""
    check_accepted(where, {"_class_name": _NAME, **found}, {"_class_name": (_NAME,)})
    fields = with_defaults(where, found, _DEFAULTS)
    check_counts(where, fields, *_DEFAULTS)
    module = EmbeddingCondition(
        width=fields["cross_attention_dim"],
        time_width=fields["time_embed_dim"],
        num_tokens=fields["clip_extra_context_tokens"],
    )
    return module, fields["clip_embeddings_dim"]


def to_fields(module: EmbeddingCondition, params: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the equivalent `UnCLIPTextProjModel`; UserError if there is none."""
    (width,) = params["null"].shape
    for name, what in (("tokens", "the text's tokens have"), ("vector_to_time", "the text's embedding has")):
        found = params[name]["kernel"].shape[0]
        if found != width:
            raise UserError(f"{what} width {found}; accepted by diffusers' {_NAME}: the image embeddings', {width}")
    return {
        "_class_name": _NAME,
        "clip_extra_context_tokens": module.num_tokens,
        "clip_embeddings_dim": width,
        "time_embed_dim": module.time_width,
        "cross_attention_dim": module.width,
    }


def param_shapes(module: EmbeddingCondition, width: int) -> dict[str, Any]:
    """The parameters of the module as `jax.ShapeDtypeStruct`s, for CLIP's embeddings of this width."""
    embedding, tokens = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, width), (1, 1, width)))
    cond = {"tokens": tokens, "vector": embedding}
    return jax.eval_shape(module.init, jax.random.key(0), embedding, cond)["params"]


def to_params(
    path: str | Path, tensors: Mapping[str, np.ndarray], module: EmbeddingCondition, width: int
) -> dict[str, Any]:
    """Our parameters from an `UnCLIPTextProjModel`'s tensors; UserError if any is missing or unexpected."""
    return named.to_params(path, tensors, param_shapes(module, width), _name)


def to_tensors(params: Mapping[str, Any]) -> tensors_lib.Tensors:
    """An `UnCLIPTextProjModel`'s tensors from our parameters."""
    return named.to_tensors(params, _name)


def _name(path: tuple[str, ...]) -> tuple[str, int]:
    if path == ("null",):
        return "learned_classifier_free_guidance_embeddings", 0
    part, leaf = path
    return f"{_PARTS[part]}.{named.LEAVES[leaf]}", 0
