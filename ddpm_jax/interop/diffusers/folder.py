"""Reads and writes whole diffusers folders: an unconditional pipeline's `UNet2DModel` and scheduler."""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax.interop import tensors as tensors_lib
from ddpm_jax.interop import transformers
from ddpm_jax.interop.diffusers import scheduler as scheduler_lib
from ddpm_jax.interop.diffusers import unet as unet_lib
from ddpm_jax.interop.diffusers.fields import WEIGHTS
from ddpm_jax.interop.diffusers.stages import read_fields, values_of
from ddpm_jax.models.unet import UNet
from ddpm_jax.runtime.errors import UserError, first_line
from ddpm_jax.runtime.files import new_folder, write_text
from ddpm_jax.validation import validate

# The files of a repository that are read besides weights, and the parts whose weights are read.
_TEXTS = re.compile(
    r"model_index\.json"
    r"|((unet|vae|text_encoder|image_encoder|prior|text_proj|decoder|super_res_first|super_res_last)/)?config\.json"
    r"|(((image_noising|prior|decoder|super_res)_)?scheduler/)?scheduler_config\.json"
    r"|tokenizer/(tokenizer|vocab|tokenizer_config|special_tokens_map)\.json|tokenizer/(merges\.txt|spiece\.model)"
    r"|feature_extractor/preprocessor_config\.json"
)
_OF_DIFFUSERS = ("", *("unet", "vae", "prior", "text_proj", "decoder", "super_res_first", "super_res_last"))
_OF_TRANSFORMERS = ("text_encoder", "image_encoder")
_PARTS = {
    **{f"{part}/" if part else "": WEIGHTS for part in _OF_DIFFUSERS},
    **{f"{part}/": transformers.WEIGHTS for part in _OF_TRANSFORMERS},
}


@dataclasses.dataclass(frozen=True)
class Described:
    """The contents of a folder's config files.

    Attributes:
      config: of the run.
      num_classes: number of classes of the network; 0: none.
      notes: sentences about differences from diffusers in sampling.
    """

    config: ConfigDict
    num_classes: int
    notes: list[str]


def needed(files: Collection[str]) -> list[str]:
    """The repository's files that are read here: no safety checker, and only one format of each weights file."""
    wanted = [file for file in files if _TEXTS.fullmatch(file)]
    for part, names in _PARTS.items():
        own = [file.removeprefix(part) for file in files if file.startswith(part)]
        wanted += [part + file for file in tensors_lib.weight_files(own, names)]
    return wanted


def locate(name: str, choose: Callable[[Collection[str]], list[str]] = needed) -> Path:
    """The folder with this name, or else the model with this name on the Hugging Face hub, downloaded or cached.

    Args:
      name: of the folder, or "owner/model".
      choose: selects the files to download from all files of the model.

    Raises:
      UserError: no such folder, and the hub does not have it or cannot be reached.
    """
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(
            f"{name!r} is not a folder; accepted: a diffusers folder or a hub name such as google/ddpm-cifar10-32"
        )
    from huggingface_hub import HfApi, snapshot_download

    try:
        try:
            files = HfApi().list_repo_files(name)
        except Exception:  # of several libraries: the hub cannot be reached, so try the cache
            with suppress(Exception):
                return Path(snapshot_download(name, local_files_only=True))
            raise
        return Path(snapshot_download(name, allow_patterns=choose(files)))
    except Exception as error:
        raise UserError(
            f"{name!r} is not a local folder, and the Hugging Face hub does not provide it: {first_line(error)}"
        ) from None


def read(folder: str | Path) -> tuple[Described, dict[str, Any]]:
    """Reads a diffusers folder's description and parameters; the layout is a pipeline's (unet/, scheduler/) or flat.

    Raises:
      UserError: a file that is missing or broken, a field that is not supported, a tensor that does not fit.
    """
    folder = Path(folder)
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    scheduler = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    (of_unet, unet_path), (of_scheduler, scheduler_path) = (
        read_fields(unet),
        read_fields(scheduler, file="scheduler_config.json"),
    )
    described = describe(of_unet, of_scheduler, where=(unet_path, scheduler_path))
    path, tensors = tensors_lib.read_weights(unet, WEIGHTS)
    return described, unet_lib.to_params(path, tensors, described.config, described.num_classes)


def describe(
    unet: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    where: tuple[str, str] = ("config.json", "scheduler_config.json"),
) -> Described:
    """Converts a `UNet2DModel`'s and a scheduler's config files.

    Args:
      unet, scheduler: the fields of the files.
      where: their names.

    Raises:
      UserError: a field or a value that is not supported; it is named.
    """
    config = config_lib.default_config()
    with values_of(*where):
        notes = scheduler_lib.read(config, scheduler, where[1])
        num_classes = unet_lib.read(config, unet, where[0])
    validate(config)
    unet_lib.check_out_channels(config, unet, where[0])
    return Described(config, num_classes, notes)


def write(folder: str | Path, config: ConfigDict, net: UNet, params: Mapping[str, Any]) -> list[str]:
    """Writes a folder that diffusers' pipelines open, atomically.

    Args:
      folder: must not exist, or be empty.
      config, net, params: of a run.

    Returns:
      Sentences about differences between diffusers and the run in sampling.

    Raises:
      UserError: the folder is not empty, or the run uses something that diffusers does not support.
    """
    unet = unet_lib.to_fields(config, net)
    scheduler, notes = scheduler_lib.to_fields(config)
    kind = scheduler["_class_name"]
    if kind == "UniPCMultistepScheduler":
        notes.append(f"{kind} does not work with DDPMPipeline's call; use the pipeline's unet and scheduler directly")
    tensors = unet_lib.to_tensors(params, len(net.widths))
    pipeline = {
        "_class_name": "DDIMPipeline" if kind == "DDIMScheduler" else "DDPMPipeline",
        "scheduler": ["diffusers", kind],
        "unet": ["diffusers", "UNet2DModel"],
    }
    with new_folder(folder, "--out") as temporary:
        for name, value in (
            ("model_index.json", pipeline),
            ("unet/config.json", unet),
            ("scheduler/scheduler_config.json", scheduler),
        ):
            write_text(temporary / name, json.dumps(value, indent=2) + "\n")
        tensors_lib.write(temporary / "unet" / WEIGHTS[0], tensors, {"format": "pt"})
    return notes
