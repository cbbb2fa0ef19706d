"""Stable Diffusion's pipelines of diffusers: UNet, scheduler, autoencoder, text encoder and tokenizer in one folder."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax.interop import tensors as tensors_lib
from ddpm_jax.interop import transformers
from ddpm_jax.interop.diffusers import autoencoder as autoencoder_lib
from ddpm_jax.interop.diffusers import scheduler as scheduler_lib
from ddpm_jax.interop.diffusers import unet_condition as unet_lib
from ddpm_jax.interop.diffusers.fields import refusal
from ddpm_jax.models.autoencoder import Autoencoder
from ddpm_jax.models.clip import CLIPTextEncoder
from ddpm_jax.models.unet import UNet
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.files import new_folder, read_json_object, write_text
from ddpm_jax.text.tokenizers import Tokenizer
from ddpm_jax.validation import validate

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
_INDEX = "model_index.json"
# Parts of other pipelines, and whose they are.
_FOREIGN = {
    "text_encoder_2": "a second text encoder, as Stable Diffusion XL has",
    "text_encoder_3": "a third text encoder, as Stable Diffusion 3 has",
    "transformer": "a transformer in place of the UNet, as Stable Diffusion 3 has",
    "prior": "a prior, as unCLIP has",
}
_GUIDANCE = 7.5  # of diffusers' pipeline, where nothing is said
_IGNORED = ("safety_checker", "feature_extractor", "image_encoder")


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A Stable Diffusion, read.

    Attributes:
      config: of the run.
      params: of the UNet.
      text_encoder: the module and its parameters.
      autoencoder: the module, its parameters and the scaling factor of its latents.
      tokenizer: of the prompts.
      notes: sentences about what is sampled otherwise than by diffusers, or was left aside.
    """

    config: ConfigDict
    params: Any
    text_encoder: tuple[CLIPTextEncoder, Any]
    autoencoder: tuple[Autoencoder, Any, float]
    tokenizer: Tokenizer
    notes: list[str]


def is_pipeline(folder: Path) -> bool:
    """Whether a folder of diffusers holds more than an unconditional UNet and its scheduler."""
    return (folder / "vae").is_dir() or (folder / "text_encoder").is_dir()


def read(folder: str | Path, source: str | None = None) -> Pipeline:
    """Reads a pipeline's folder.

    Args:
      folder: with model_index.json, unet/, scheduler/, vae/, text_encoder/ and tokenizer/.
      source: how the run's config calls it; None: the folder.

    Raises:
      UserError: a part that is missing, broken or not supported, by its name.
    """
    folder = Path(folder)
    index = read_json_object(folder / _INDEX) if (folder / _INDEX).is_file() else {}
    for part, whose in _FOREIGN.items():
        if index.get(part, [None])[0] is not None or (folder / part).is_dir():
            raise UserError(f"{str(folder)!r} has {part!r}, {whose}; accepted: Stable Diffusion 1 and 2")
    kind = index.get("_class_name", PIPELINES[0])
    if kind not in PIPELINES:
        raise refusal(str(folder / _INDEX), "_class_name", kind, PIPELINES)
    for part in ("unet", "scheduler", "vae", "text_encoder", "tokenizer"):
        if not (folder / part).is_dir():
            raise UserError(f"{str(folder)!r} has no {part}/, which a Stable Diffusion pipeline needs")
    fields = {
        name: read_json_object(folder / name / file)
        for name, file in (("unet", "config.json"), ("scheduler", "scheduler_config.json"))
    }
    text_encoder = transformers.read(folder / "text_encoder")
    autoencoder = autoencoder_lib.read(folder / "vae")
    tokenizer = Tokenizer.read(folder / "tokenizer")
    config, notes = to_config(
        fields["unet"],
        fields["scheduler"],
        autoencoder[0],
        text_encoder[0],
        source=source or str(folder),
        where=(str(folder / "unet" / "config.json"), str(folder / "scheduler" / "scheduler_config.json")),
    )
    path, tensors = tensors_lib.read_weights(folder / "unet", unet_lib.WEIGHTS)
    params = unet_lib.to_params(path, tensors, config)
    left = [part for part in _IGNORED if index.get(part, [None])[0] is not None]
    notes += [f"{part} is not a part of the run: pictures are not checked" for part in left if part == _IGNORED[0]]
    return Pipeline(config, params, text_encoder, autoencoder, tokenizer, notes)
