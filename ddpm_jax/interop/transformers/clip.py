"""Reads and writes CLIP's encoders.

This module supports text encoders (`CLIPTextModel`, `CLIPTextModelWithProjection` and the text half of a `CLIPModel`),
image encoders (`CLIPVisionModelWithProjection`), and a whole `CLIPModel`.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from ddpm_jax.interop import tensors as tensors_lib
from ddpm_jax.interop.transformers.folder import (
    WEIGHTS,
    architecture,
    check_tokenizer,
    converted,
    count,
    require,
    to_theirs,
    write_folder,
)
from ddpm_jax.models.clip import CLIPImageEncoder, CLIPTextEncoder
from ddpm_jax.models.transformer import ACTIVATIONS
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.files import read_json_object
from ddpm_jax.text.tokenizers import Tokenizer

ARCHITECTURES = ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel")

_PARTS = {
    "tokens": "embeddings.token_embedding",
    "patches": "embeddings.patch_embedding",
    "positions": "embeddings.position_embedding",
    "pre_norm": "pre_layrnorm",  # their spelling
    "post_norm": "post_layernorm",
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
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
# Our attribute, transformers' field and its default.
_TEXT_SIZES = {
    "vocab_size": ("vocab_size", 49_408),
    "max_length": ("max_position_embeddings", 77),
    "width": ("hidden_size", 512),
    "num_layers": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 8),
    "mlp_width": ("intermediate_size", 2048),
}
_IMAGE_SIZES = {
    "patch_size": ("patch_size", 32),
    "channels": ("num_channels", 3),
    "width": ("hidden_size", 768),
    "num_layers": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
    "mlp_width": ("intermediate_size", 3072),
}
_IMAGE_SIZE = ("image_size", 224)
_CHANNELS = (1, 3)
_PROJECTION = ("projection_dim", 512)
_LEGACY_END = 2  # eos_token_id in configs before transformers 4.31, which means that the end has the largest id
_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the RGB pixels that OpenAI's CLIP was trained on, from 0 to 1
_STD = (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = 3  # Pillow's constant


@dataclasses.dataclass(frozen=True, eq=False)
class CLIP:
    """A whole CLIP: both encoders, and the preprocessing of texts and images.

    Attributes:
      text, image: the encoders, with projections of the same width.
      params: float32, {"text": of the text encoder, "image": of the image encoder}.
      logit_scale: logarithm of the factor between cosine similarities and logits.
      tokenizer: of the texts, with the text encoder's length.
      image_mean, image_std: for each channel; the image encoder takes (pixels / 255 - mean) / std.
    """

    text: CLIPTextEncoder
    image: CLIPImageEncoder
    params: Mapping[str, Any]
    logit_scale: float
    tokenizer: Tokenizer
    image_mean: tuple[float, ...] = _MEAN
    image_std: tuple[float, ...] = _STD


def clip_width(folder: str | Path) -> int:
    """The embedding width of a `CLIPModel`'s folder, from its config; UserError as for `read_clip`."""
    path = Path(folder) / "config.json"
    config = read_json_object(path)
    kind = architecture(config)
    require(kind == "CLIPModel", "architectures", kind, str(path), "CLIPModel")
    return count(config, *_PROJECTION, str(path))


def read_image(folder: str | Path) -> tuple[CLIPImageEncoder, dict[str, Any]]:
    """Reads an image encoder and its float32 parameters from a `CLIPVisionModelWithProjection`'s folder.

    Raises:
      UserError: as for `read`.
    """
    path = Path(folder) / "config.json"
    config, where = read_json_object(path), str(path)
    kind, accepted = architecture(config), "CLIPVisionModelWithProjection"
    require(kind == accepted, "architectures", kind, where, accepted)
    net = _image_module({**config, "vision_config": config}, where)
    require(net.channels == 3, "num_channels", net.channels, where, "3")
    path, tensors = tensors_lib.read_weights(folder, WEIGHTS)
    shapes = _shapes(net)
    own = {name: value for name, value in tensors.items() if not _is_range(name)}
    return net, converted(path, own, shapes, {ours: _name(("image", *ours)) for ours in shapes})


def read_clip(folder: str | Path) -> CLIP:
    """Reads a `CLIPModel`'s folder: config.json, weights, tokenizer and preprocessor_config.json.

    Without the last file, images are preprocessed as for OpenAI's CLIP.

    Raises:
      UserError: as for `read`; a tokenizer that is missing or has more tokens than the encoder; or an image
        preprocessing other than CLIP's: resized bicubically, the shorter side to the encoder's size, cropped at the
        centre, and normalised.
    """
    folder = Path(folder)
    config, where = read_json_object(folder / "config.json"), str(folder / "config.json")
    kind = architecture(config)
    require(kind == "CLIPModel", "architectures", kind, where, "CLIPModel")
    text, image = to_module(config, where), _image_module(config, where)
    mean, std = read_preparation(folder / "preprocessor_config.json", image)
    tokenizer = Tokenizer.read(folder, text.max_length)
    check_tokenizer(tokenizer, text, str(folder))
    path, tensors = tensors_lib.read_weights(folder, WEIGHTS)
    shapes: dict[tuple[str, ...], Any] = {("logit_scale",): jax.ShapeDtypeStruct((), jnp.float32)}
    for half, net in (("text", text), ("image", image)):
        shapes |= {(half, *ours): shape for ours, shape in _shapes(net).items()}
    names = {ours: _name(ours) for ours in shapes}
    params = converted(path, {name: v for name, v in tensors.items() if not _is_range(name)}, shapes, names)
    scale = float(params.pop("logit_scale"))
    return CLIP(text, image, params, scale, tokenizer, mean, std)


def write(folder: str | Path, net: CLIPTextEncoder, params: Mapping[str, Any]) -> Path:
    """Writes a text encoder's folder that transformers' `from_pretrained` opens, atomically.

    Raises:
      UserError: the folder is not empty or cannot be written.
    """
    config = {
        "architectures": [ARCHITECTURES[0 if net.projection is None else 1]],
        "model_type": "clip_text_model",
        **_text_config(net),
        "projection_dim": net.width if net.projection is None else net.projection,
    }
    flat = flatten_dict({"text": params})
    return write_folder(
        folder, {_name(ours): to_theirs(ours, value) for ours, value in flat.items()}, {"config": config}
    )


def write_clip(folder: str | Path, clip: CLIP) -> Path:
    """Writes a `CLIPModel`'s folder with the files that `read_clip` reads; see `write`.

    transformers opens it if the images are square; `why_not` says so beforehand.
    """
    height, width, channels = clip.image.shape
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": clip.text.projection,
        "logit_scale_init_value": clip.logit_scale,
        "text_config": _text_config(clip.text),
        "vision_config": {
            **_config(clip.image, _IMAGE_SIZES),
            _IMAGE_SIZE[0]: height if height == width else [height, width],
        },
    }
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": height} if height == width else {"height": height, "width": width},
        "crop_size": {"height": height, "width": width},
        "resample": _BICUBIC,
        "do_convert_rgb": channels == 3,
        "image_mean": clip.image_mean,
        "image_std": clip.image_std,
    }
    flat = flatten_dict({"text": clip.params["text"], "image": clip.params["image"]})
    tensors = {_name(ours): to_theirs(ours, value) for ours, value in flat.items()}
    tensors["logit_scale"] = np.array(clip.logit_scale, np.float32)
    files = {
        "config": config,
        "preprocessor_config": preprocessor,
        "tokenizer": json.loads(clip.tokenizer.to_json()),
    }
    return write_folder(folder, tensors, files)


def why_not(clip: CLIP) -> str:
    """Why transformers does not support such a `CLIPModel`; "" if it does."""
    height, width, _ = clip.image.shape
    return "" if height == width else f"is for pictures of {height}x{width}, which are not square"


def _config(net: CLIPTextEncoder | CLIPImageEncoder, sizes: Mapping[str, tuple[str, int]]) -> dict[str, Any]:
    fields = {field: getattr(net, ours) for ours, (field, _) in sizes.items()}
    return {**fields, "hidden_act": net.activation, "layer_norm_eps": net.epsilon}


def _text_config(net: CLIPTextEncoder) -> dict[str, Any]:
    end = _LEGACY_END if net.end_token is None else net.end_token
    return {**_config(net, _TEXT_SIZES), "eos_token_id": end}


def to_module(config: Mapping[str, Any], where: str = "config.json") -> CLIPTextEncoder:
    """Converts a transformers config to a text encoder; UserError by field."""
    kind = architecture(config)
    require(kind in ARCHITECTURES, "architectures", kind, where, ", ".join(ARCHITECTURES))
    text = _half(config, "text", where) if kind == "CLIPModel" else config
    options = _options(text, _TEXT_SIZES, where)
    if kind != "CLIPTextModel":
        options["projection"] = count(config, *_PROJECTION, where)
    end = text.get("eos_token_id", 49_407)
    require(isinstance(end, int), "eos_token_id", end, where, "a token's id")
    return CLIPTextEncoder(**options, end_token=None if end == _LEGACY_END else end)


def _image_module(config: Mapping[str, Any], where: str) -> CLIPImageEncoder:
    options = _options(_half(config, "vision", where), _IMAGE_SIZES, where)
    patch, channels = options["patch_size"], options["channels"]
    size = _image_size(_half(config, "vision", where), where)
    sides = size if isinstance(size, tuple) else (size,)
    require(not any(side % patch for side in sides), "patch_size", patch, where, f"a divisor of image_size, {size}")
    require(channels in _CHANNELS, "num_channels", channels, where, " or ".join(map(str, _CHANNELS)))
    return CLIPImageEncoder(**options, image_size=size, projection=count(config, *_PROJECTION, where))


def _image_size(fields: Mapping[str, Any], where: str) -> int | tuple[int, int]:
    """One number, as in transformers, or the height and the width of pictures that are not square."""
    field, default = _IMAGE_SIZE
    value = fields.get(field, default)
    if not isinstance(value, list):
        return count(fields, field, default, where)
    fits = len(value) == 2 and all(isinstance(side, int) and side > 0 for side in value)
    require(fits, field, value, where, "a whole number above 0, or a height and a width")
    return value[0], value[1]


def _half(config: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """The fields of one half of a CLIPModel. Older files have them twice, and the second copy counts."""
    fields: dict[str, Any] = {}
    for field in (f"{name}_config", f"{name}_config_dict"):
        part = config.get(field) or {}
        if not isinstance(part, dict):
            raise UserError(f"{field} is {part!r} in {where!r}; accepted: a JSON object")
        fields |= part
    return fields


def _options(fields: Mapping[str, Any], sizes: Mapping[str, tuple[str, int]], where: str) -> dict[str, Any]:
    """The attributes that both encoders have, and those in `sizes`."""
    options: dict[str, Any] = {ours: count(fields, *theirs, where) for ours, theirs in sizes.items()}
    activation, epsilon = fields.get("hidden_act", "quick_gelu"), fields.get("layer_norm_eps", 1e-5)
    require(activation in tuple(ACTIVATIONS), "hidden_act", activation, where, ", ".join(ACTIVATIONS))
    require(isinstance(epsilon, float), "layer_norm_eps", epsilon, where, "a number such as 1e-05")
    heads, width = options["num_heads"], options["width"]
    require(width % heads == 0, "num_attention_heads", heads, where, f"a divisor of hidden_size, {width}")
    return {**options, "activation": activation, "epsilon": epsilon}


def read_preparation(path: Path, net: CLIPImageEncoder) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation from a preprocessor_config.json with CLIP's preprocessing."""
    height, width, channels = net.shape
    if not path.is_file() and channels == len(_MEAN):
        return _MEAN, _STD
    config = read_json_object(path)
    both = {"height": height, "width": width}
    # Older files have a number where newer ones have an object.
    sizes = {"size": (height, {"shortest_edge": height}), "crop_size": (height, both)}
    wanted = {
        **(sizes if height == width else {"size": (both,), "crop_size": (both,)}),
        "resample": (_BICUBIC,),
        "rescale_factor": (1 / 255,),
        **{f"do_{step}": (True, None) for step in ("resize", "center_crop", "rescale", "normalize")},
    }
    for field, accepted in wanted.items():
        value = config.get(field, accepted[0])
        require(value in accepted, field, value, str(path), json.dumps(accepted[0]))
    if channels == 1:
        converts = config.get("do_convert_rgb")
        require(
            converts is False, "do_convert_rgb", converts, str(path), "false, since the encoder takes grey pictures"
        )
    mean, std = config.get("image_mean", _MEAN), config.get("image_std", _STD)
    for field, values in (("image_mean", mean), ("image_std", std)):
        fits = isinstance(values, list | tuple) and len(values) == channels
        fits = fits and all(isinstance(value, int | float) for value in values)
        require(fits, field, values, str(path), f"{channels} numbers")
    require(min(std) > 0, "image_std", std, str(path), "numbers above 0")
    return tuple(map(float, mean)), tuple(map(float, std))


def to_params(path: str | Path, tensors: Mapping[str, np.ndarray], net: CLIPTextEncoder) -> dict[str, Any]:
    """The text encoder's parameters from the tensors of `path`; UserError if any is missing or unexpected."""
    shapes = _shapes(net)
    names = {ours: _name(("text", *ours)) for ours in shapes}
    if not any(name.startswith("text_model.") for name in tensors):  # as written by some releases of transformers
        names = {ours: name.removeprefix("text_model.") for ours, name in names.items()}
    wanted = set(names.values())
    own = {name: v for name, v in tensors.items() if name in wanted or not (_is_image_half(name) or _is_range(name))}
    return converted(path, own, shapes, names)


def _is_image_half(name: str) -> bool:
    """Whether a tensor of a CLIPModel does not belong to its text encoder."""
    return name.startswith("vision_model.") or name in ("visual_projection.weight", "logit_scale")


def _is_range(name: str) -> bool:
    """Whether a tensor contains the position numbers 0, 1, ... that older releases write."""
    return name.endswith("embeddings.position_ids")


def paths(net: CLIPTextEncoder) -> dict[str, tuple[str, ...]]:
    """The path in our tree of each tensor of a text encoder."""
    return {_name(("text", *ours)): ours for ours in _shapes(net)}


def tensor_shapes(net: CLIPTextEncoder) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of a text encoder."""
    shapes = _shapes(net).items()
    return {_name(("text", *ours)): to_theirs(ours, np.broadcast_to(0, leaf.shape)).shape for ours, leaf in shapes}


def _shapes(net: CLIPTextEncoder | CLIPImageEncoder) -> dict[tuple[str, ...], Any]:
    """The paths in our tree of an encoder's parameters, with their shapes."""
    if isinstance(net, CLIPTextEncoder):
        example = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    else:
        example = jax.ShapeDtypeStruct((1, *net.shape), jnp.float32)
    return flatten_dict(jax.eval_shape(net.init, jax.random.key(0), example)["params"])


def _name(path: tuple[str, ...]) -> str:
    """transformers' name of our parameter, whose path begins with its half, "text" or "image"."""
    if path == ("logit_scale",):
        return "logit_scale"
    half, *rest = path
    model, projection = {
        "text": ("text_model", "text_projection"),
        "image": ("vision_model", "visual_projection"),
    }[half]
    if rest == ["class_token"]:
        return f"{model}.embeddings.class_embedding"
    *_, part, leaf = rest
    if rest[0] == "projection":
        return f"{projection}.weight"
    if rest[0] == "transformer":
        return f"{model}.encoder.layers.{rest[1].removeprefix('block_')}.{_PARTS[part]}.{_LEAVES[leaf]}"
    return f"{model}.{_PARTS[part]}.{_LEAVES[leaf]}"
