"""A run's parameters as one .safetensors file with our own names, such as "down_0_0_res.conv_0.kernel".

The file's metadata contain the config, the data set's description and the step, from which a workdir can be restored.
The files of frozen parts, such as an autoencoder, are in it too: tensors under names such as
"autoencoder/diffusion_pytorch_model.safetensors/encoder.conv_in.weight", JSON files in the metadata.
"""

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open

from ddpm_jax import config as config_lib
from ddpm_jax.interop import tensors as tensors_lib
from ddpm_jax.runtime import workdir
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.files import write_text
from ddpm_jax.validation import make_valid_model

_FORMAT = "ddpm_jax"


Files = Mapping[str, str | tensors_lib.Tensors]  # by name: the text of a JSON file, or the tensors of another


class Export(NamedTuple):
    """The contents of a file made by `write`; `files` are those of the frozen parts."""

    config: ConfigDict
    dataset: dict[str, Any]
    step: int
    params: dict[str, Any]
    files: Files


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
    """Writes the file, with the frozen parts whose folders the description names; UserError if it already exists."""
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
    for part in workdir.PARTS:
        for file in sorted(Path(dataset[part]).iterdir()) if part in dataset else ():
            name = f"{part}/{file.name}"
            if file.suffix == ".json":
                metadata[name] = file.read_text("utf-8")
            else:
                tensors |= {f"{name}/{tensor}": value for tensor, value in tensors_lib.read(file).items()}
    tensors_lib.write(path, tensors, metadata)
    return path


def read(path: str | Path) -> Export:
    """Reads a file made by `write`.

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
    texts, weights = _files(path, metadata, tensors)
    with tempfile.TemporaryDirectory() as folder:  # the network's shapes depend on the configs of the frozen parts
        write_files(folder, texts)
        parts = {name.split("/")[0] for name in texts}
        described = dataset | {part: str(Path(folder, part)) for part in parts}
        shapes = flatten_dict(make_valid_model(config, described)[1], sep=".")
    tensors_lib.check(path, tensors, {name: leaf.shape for name, leaf in shapes.items()})
    return Export(config, dataset, step, unflatten_dict(tensors, sep="."), {**texts, **weights})


def write_files(folder: str | Path, files: Files) -> None:
    """Writes the files of frozen parts to where `workdir.read_dataset` finds them."""
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, str):
            write_text(path, content)
        else:
            tensors_lib.write(path, content, {"format": "pt"})


def _files(
    path: str | Path, metadata: Mapping[str, str], tensors: dict[str, np.ndarray]
) -> tuple[dict[str, str], dict[str, tensors_lib.Tensors]]:
    """The JSON files of the frozen parts, and the files of their tensors, which are taken out of `tensors`."""
    weights: dict[str, tensors_lib.Tensors] = defaultdict(dict)
    for name in [name for name in tensors if "/" in name]:
        file, _, tensor = name.rpartition("/")
        weights[file][tensor] = tensors.pop(name)
    texts = {name: text for name, text in metadata.items() if "/" in name}
    for name in (*texts, *weights):
        part, _, file = name.partition("/")
        if part not in workdir.PARTS or not file or Path(file).name != file:
            raise UserError(f"{str(path)!r} has a file {name!r}; accepted: files in {', '.join(workdir.PARTS)}")
    return texts, weights
