"""Folders of transformers: CLIP's text encoder, read and written without transformers or PyTorch.

Read are a `CLIPTextModel`, a `CLIPTextModelWithProjection` and the text half of a `CLIPModel`, from safetensors or
PyTorch's pickles, in one file or in shards. Values in half precision become float32, which changes none of them.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ddpm_jax.interop import tensors as tensors_lib
from ddpm_jax.models.clip import CLIPTextEncoder
from ddpm_jax.models.transformer import ACTIVATIONS
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.files import new_folder, read_json_object, write_text

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
ARCHITECTURES = ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel")

_PARTS = {
    "tokens": "embeddings.token_embedding",
    "positions": "embeddings.position_embedding",
    "final_norm": "final_layer_norm",
    "norm_0": "layer_norm1",
    "norm_1": "layer_norm2",
    "mlp_0": "mlp.fc1",
    "mlp_1": "mlp.fc2",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.out_proj",
}
# Our attribute, their field and its default.
_SIZES = {
    "vocab_size": ("vocab_size", 49_408),
    "max_length": ("max_position_embeddings", 77),
    "width": ("hidden_size", 512),
    "num_layers": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 8),
    "mlp_width": ("intermediate_size", 2048),
}
_LEGACY_END = 2  # the eos_token_id of configs before transformers 4.31, by which the end is the largest id


def read(folder: str | Path) -> tuple[CLIPTextEncoder, dict[str, Any]]:
    """The encoder and its parameters, float32, of a folder with config.json and weights.

    Raises:
      UserError: a file that is missing or broken, an architecture or activation that is not supported, or a tensor that
        is missing, too many, or of another shape or dtype.
    """
    net = read_module(folder)
    path, tensors = _read_weights(Path(folder))
    return net, to_params(path, tensors, net)


def read_module(folder: str | Path) -> CLIPTextEncoder:
    """The encoder of such a folder, without its parameters; UserError as of `read`."""
    path = Path(folder) / "config.json"
    return to_module(read_json_object(path), str(path))


def write(folder: str | Path, net: CLIPTextEncoder, params: Mapping[str, Any]) -> Path:
    """Writes a folder that transformers' `from_pretrained` opens, whole or not at all.

    Raises:
      UserError: the folder holds something, or cannot be written.
    """
    config = {
        "architectures": [ARCHITECTURES[0 if net.projection is None else 1]],
        "model_type": "clip_text_model",
        **{field: getattr(net, ours) for ours, (field, _) in _SIZES.items()},
        "hidden_act": net.activation,
        "layer_norm_eps": net.epsilon,
        "eos_token_id": _LEGACY_END if net.end_token is None else net.end_token,
        "projection_dim": net.width if net.projection is None else net.projection,
    }
    flat = flatten_dict(params)
    tensors = {name: _transposed(ours, np.asarray(flat[ours])) for ours, name in _names(flat)}
    with new_folder(folder, "the folder") as temporary:
        write_text(temporary / "config.json", json.dumps(config, indent=2) + "\n")
        tensors_lib.write(temporary / WEIGHTS[0], tensors, {"format": "pt"})
    return Path(folder).expanduser()


def to_module(config: Mapping[str, Any], where: str = "config.json") -> CLIPTextEncoder:
    """The encoder that a transformers config stands for; UserError by field."""
    kind = _architecture(config)
    _require(kind in ARCHITECTURES, "architectures", kind, where, ", ".join(ARCHITECTURES))
    text: Any = config
    if kind == "CLIPModel":
        # Older files have the text half's fields a second time, and those count.
        text = {}
        for field in ("text_config", "text_config_dict"):
            part = config.get(field) or {}
            if not isinstance(part, dict):
                raise UserError(f"{field} is {part!r} in {where!r}; accepted: a JSON object")
            text |= part

    sizes = {}
    for ours, (field, default) in _SIZES.items():
        sizes[ours] = text.get(field, default)
        _require(_is_count(sizes[ours]), field, sizes[ours], where, "a whole number above 0")
    projection = None
    if kind != "CLIPTextModel":
        projection = config.get("projection_dim", 512)
        _require(_is_count(projection), "projection_dim", projection, where, "a whole number above 0")
    activation, epsilon = text.get("hidden_act", "quick_gelu"), text.get("layer_norm_eps", 1e-5)
    end = text.get("eos_token_id", 49_407)
    _require(activation in tuple(ACTIVATIONS), "hidden_act", activation, where, ", ".join(ACTIVATIONS))
    _require(isinstance(epsilon, float), "layer_norm_eps", epsilon, where, "a number such as 1e-05")
    _require(isinstance(end, int), "eos_token_id", end, where, "a token's id")
    heads, width = sizes["num_heads"], sizes["width"]
    _require(width % heads == 0, "num_attention_heads", heads, where, f"a divisor of hidden_size, {width}")
    return CLIPTextEncoder(
        **sizes,
        activation=activation,
        epsilon=epsilon,
        end_token=None if end == _LEGACY_END else end,
        projection=projection,
    )


def _require(fits: bool, field: str, value: Any, where: str, accepted: str) -> None:
    if not fits:
        raise UserError(f"{field} is {value!r} in {where!r}; accepted: {accepted}")


def _architecture(config: Mapping[str, Any]) -> Any:
    """The class that a config names, or else the one that its type stands for."""
    names = config.get("architectures")
    if isinstance(names, list) and names:
        return names[0]
    kinds = {"clip_text_model": "CLIPTextModel", "clip": "CLIPModel"}
    return kinds.get(str(config.get("model_type")), config.get("model_type"))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def to_params(path: str | Path, tensors: Mapping[str, np.ndarray], net: CLIPTextEncoder) -> dict[str, Any]:
    """The encoder's parameters from the tensors of `path`; UserError unless they are exactly those that it has."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = flatten_dict(jax.eval_shape(net.init, jax.random.key(0), ids)["params"])
    names = dict(_names(shapes))
    if not any(name.startswith("text_model.") for name in tensors):  # as some releases of transformers write them
        names = {ours: name.removeprefix("text_model.") for ours, name in names.items()}
    own = {
        name: value.astype(np.float32) if value.dtype in (np.float16, jnp.bfloat16) else value
        for name, value in tensors.items()
        if name in names.values() or not _is_left_out(name)
    }
    wanted = {name: _transposed(ours, np.broadcast_to(0, shapes[ours].shape)).shape for ours, name in names.items()}
    tensors_lib.check(path, own, wanted)
    return unflatten_dict({ours: np.ascontiguousarray(_transposed(ours, own[name])) for ours, name in names.items()})


def _is_left_out(name: str) -> bool:
    """Whether a tensor is the image half's of a CLIPModel, or the numbers 0, 1, ... that older releases write."""
    image_half = name.startswith("vision_model.") or name in ("visual_projection.weight", "logit_scale")
    return image_half or name.endswith("embeddings.position_ids")


def _names(paths: Mapping[tuple[str, ...], Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path in our tree, name in theirs) of every parameter."""
    leaves = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
    for path in paths:
        *_, part, leaf = path
        if path[0] == "projection":
            yield path, "text_projection.weight"
        elif path[0] == "transformer":
            layer = path[1].removeprefix("block_")
            yield path, f"text_model.encoder.layers.{layer}.{_PARTS[part]}.{leaves[leaf]}"
        else:
            yield path, f"text_model.{_PARTS[part]}.{leaves[leaf]}"


def _transposed(path: tuple[str, ...], value: np.ndarray) -> np.ndarray:
    """Their kernels are [D, C], ours [C, D]."""
    return value.T if path[-1] == "kernel" else value


def _read_weights(folder: Path) -> tuple[Path, tensors_lib.Tensors]:
    """The file of the weights, or the index of its shards, and all tensors."""
    for name in WEIGHTS:
        path, index = folder / name, folder / f"{name}.index.json"
        if path.is_file():
            return path, tensors_lib.read(path)
        if index.is_file():
            files = read_json_object(index).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
                raise UserError(f"{str(index)!r} has no weight_map from names of tensors to files")
            tensors: tensors_lib.Tensors = {}
            for file in sorted(set(files.values())):
                if Path(file).name != file:
                    raise UserError(f"{str(index)!r} names {file!r}; accepted: files of its own folder")
                tensors |= tensors_lib.read(folder / file)
            return index, tensors
    raise UserError(f"{str(folder)!r} has no weights; accepted: {' or '.join(WEIGHTS)}, whole or in shards")
