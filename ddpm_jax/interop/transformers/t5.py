"""Reads and writes T5's encoder: a `T5EncoderModel`, or the encoder of a whole T5, whose decoder is ignored."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from ddpm_jax.interop.transformers.folder import architecture, converted, count, require, to_theirs, write_folder
from ddpm_jax.models.t5 import T5Encoder
from ddpm_jax.models.transformer import ACTIVATIONS
from ddpm_jax.runtime.errors import UserError

ARCHITECTURES = ("T5EncoderModel", "T5Model", "T5ForConditionalGeneration", "T5WithLMHeadModel")

# Our attribute, transformers' field and its default.
_SIZES = {
    "vocab_size": ("vocab_size", 32_128),
    "width": ("d_model", 512),
    "num_layers": ("num_layers", 6),
    "num_heads": ("num_heads", 8),
    "head_width": ("d_kv", 64),
    "mlp_width": ("d_ff", 2048),
    "num_buckets": ("relative_attention_num_buckets", 32),
    "max_distance": ("relative_attention_max_distance", 128),
}
_GATED = "gated-"
_GATED_GELU = "gated-gelu"  # with the approximate GELU
_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")  # a file may have one or both, which are the same
_OTHERS = ("decoder.", "lm_head.")
_OUTER = {
    "tokens": _EMBEDDINGS[0],
    "distances": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "final_norm": "encoder.final_layer_norm.weight",
}
_PARTS = {
    "norm_0": "layer.0.layer_norm",
    "query": "layer.0.SelfAttention.q",
    "key": "layer.0.SelfAttention.k",
    "value": "layer.0.SelfAttention.v",
    "out": "layer.0.SelfAttention.o",
    "norm_1": "layer.1.layer_norm",
    "mlp_1": "layer.1.DenseReluDense.wo",
}
_HIDDEN = {
    False: {"mlp_0": "layer.1.DenseReluDense.wi"},
    True: {"mlp_0": "layer.1.DenseReluDense.wi_0", "mlp_linear": "layer.1.DenseReluDense.wi_1"},
}


def to_module(config: Mapping[str, Any], where: str = "config.json") -> T5Encoder:
    """Converts a transformers config to an encoder; UserError by field."""
    kind = architecture(config)
    require(kind in ARCHITECTURES, "architectures", kind, where, ", ".join(ARCHITECTURES))
    options: dict[str, Any] = {ours: count(config, *theirs, where) for ours, theirs in _SIZES.items()}
    buckets, distance = options["num_buckets"], options["max_distance"]
    require(buckets >= 4, _SIZES["num_buckets"][0], buckets, where, "4 or more")
    require(distance > buckets // 4, _SIZES["max_distance"][0], distance, where, f"more than {buckets // 4}")
    activation, gated = _hidden_layer(config.get("feed_forward_proj", "relu"), where)
    epsilon = config.get("layer_norm_epsilon", 1e-6)
    require(isinstance(epsilon, float), "layer_norm_epsilon", epsilon, where, "a number such as 1e-06")
    return T5Encoder(**options, activation=activation, gated=gated, epsilon=epsilon)


def _hidden_layer(name: Any, where: str) -> tuple[str, bool]:
    """The activation of an MLP, and whether it is gated."""
    if name == _GATED_GELU:
        return "gelu_new", True
    plain = tuple(ACTIVATIONS)
    accepted = (*plain, *(_GATED + activation for activation in plain))
    require(name in accepted, "feed_forward_proj", name, where, ", ".join(accepted))
    return name.removeprefix(_GATED), name.startswith(_GATED)


def to_params(path: str | Path, tensors: Mapping[str, np.ndarray], net: T5Encoder) -> dict[str, Any]:
    """The encoder's parameters from the tensors of `path`; UserError if any is missing or unexpected, except for a
    decoder's."""
    own = {name: value for name, value in tensors.items() if not name.startswith(_OTHERS)}
    tables = [own.pop(name) for name in _EMBEDDINGS if name in own]
    if tables:
        own[_EMBEDDINGS[0]] = tables[0]
        if not all(np.array_equal(table, tables[0]) for table in tables[1:]):
            raise UserError(
                f"tensors {' and '.join(map(repr, _EMBEDDINGS))} in {str(path)!r} differ; accepted: the same"
            )
    return converted(path, own, _shapes(net), {ours: theirs for theirs, ours in paths(net).items()})


def to_fields(net: T5Encoder) -> dict[str, Any]:
    """The config of a `T5EncoderModel`."""
    return {
        "architectures": [ARCHITECTURES[0]],
        "model_type": "t5",
        "is_encoder_decoder": False,
        **{field: getattr(net, ours) for ours, (field, _) in _SIZES.items()},
        "feed_forward_proj": _projection(net),
        "layer_norm_epsilon": net.epsilon,
    }


def _projection(net: T5Encoder) -> str:
    if not net.gated:
        return net.activation
    return _GATED_GELU if net.activation == "gelu_new" else _GATED + net.activation


def write(folder: str | Path, net: T5Encoder, params: Mapping[str, Any]) -> Path:
    """Writes a folder that transformers' `T5EncoderModel` opens, atomically.

    Raises:
      UserError: the folder is not empty or cannot be written.
    """
    flat = flatten_dict(params)
    tensors = {theirs: to_theirs(ours, flat[ours]) for theirs, ours in paths(net).items()}
    return write_folder(folder, tensors, {"config": to_fields(net)})


def paths(net: T5Encoder) -> dict[str, tuple[str, ...]]:
    """The path in our tree of each tensor of the encoder."""
    return {_name(ours, net.gated): ours for ours in _shapes(net)}


def _shapes(net: T5Encoder) -> dict[tuple[str, ...], Any]:
    """The paths in our tree of the encoder's parameters, with their shapes."""
    example = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return flatten_dict(jax.eval_shape(net.init, jax.random.key(0), example)["params"])


def _name(path: tuple[str, ...], gated: bool) -> str:
    """transformers' name of our parameter."""
    if path[0] != "transformer":
        return _OUTER[path[0]]
    return f"encoder.block.{path[1].removeprefix('block_')}.{(_PARTS | _HIDDEN[gated])[path[-2]]}.weight"
