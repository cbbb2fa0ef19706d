"""Reading and writing common to all transformers folders."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from flax.traverse_util import unflatten_dict

from ddpm_jax.interop import tensors as tensors_lib
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.files import new_folder, write_text
from ddpm_jax.text.tokenizers import Tokenizer

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# The class implied by a config's model_type, if the config names no class.
_KINDS = {"clip_text_model": "CLIPTextModel", "clip": "CLIPModel", "t5": "T5ForConditionalGeneration"}


class TakesTokens(Protocol):
    """A text encoder.

    Attributes:
      vocab_size: number of tokens.
      max_length: the most tokens a text may have; None: any number.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_length(self) -> int | None: ...


def check_tokenizer(tokenizer: Tokenizer, net: TakesTokens, where: str) -> None:
    """UserError for a tokenizer with more tokens, or longer texts, than the text encoder in `where` supports."""
    length = net.max_length
    if tokenizer.vocab_size > net.vocab_size or (length is not None and tokenizer.max_length > length):
        texts = "" if length is None else f" and texts of {length}"
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and texts of {tokenizer.max_length}; accepted: at most "
            f"the {net.vocab_size} tokens{texts} of the encoder {where!r}"
        )


def architecture(config: Mapping[str, Any]) -> Any:
    """The class that a config names, or else the one implied by its model_type."""
    names = config.get("architectures")
    if isinstance(names, list) and names:
        return names[0]
    return _KINDS.get(str(config.get("model_type")), config.get("model_type"))


def count(fields: Mapping[str, Any], field: str, default: int, where: str) -> int:
    """A field that must be a whole number above 0."""
    value = fields.get(field, default)
    fits = isinstance(value, int) and not isinstance(value, bool) and value > 0
    require(fits, field, value, where, "a whole number above 0")
    return value


def require(fits: bool, field: str, value: Any, where: str, accepted: str) -> None:
    """UserError unless the value of the field fits."""
    if not fits:
        raise UserError(f"{field} is {value!r} in {where!r}; accepted: {accepted}")


def write_folder(folder: str | Path, tensors: Mapping[str, Any], files: Mapping[str, Any]) -> Path:
    """Atomically writes a folder of tensors and JSON files, which are given by name without suffix."""
    with new_folder(folder, "the folder") as temporary:
        for name, value in files.items():
            write_text(temporary / f"{name}.json", json.dumps(value, indent=2) + "\n")
        tensors_lib.write(temporary / WEIGHTS[0], tensors, {"format": "pt"})
    return Path(folder).expanduser()


def converted(
    path: str | Path,
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[tuple[str, ...], Any],
    names: Mapping[tuple[str, ...], str],
) -> dict[str, Any]:
    """A tree of our parameters from transformers' tensors, which must be exactly the named ones."""
    own = tensors_lib.to_float32(tensors)
    wanted = {name: to_theirs(ours, np.broadcast_to(0, shapes[ours].shape)).shape for ours, name in names.items()}
    tensors_lib.check(path, own, wanted)
    return unflatten_dict({ours: np.asarray(_to_ours(ours, own[name]), order="C") for ours, name in names.items()})


def to_theirs(path: tuple[str, ...], value: Any) -> np.ndarray:
    """Converts our kernels [..., C, D] to transformers' [D, C, ...]."""
    return np.moveaxis(np.asarray(value), (-1, -2), (0, 1)) if path[-1] == "kernel" else np.asarray(value)


def _to_ours(path: tuple[str, ...], value: np.ndarray) -> np.ndarray:
    return np.moveaxis(value, (0, 1), (-1, -2)) if path[-1] == "kernel" else value
