"""diffusers' DeepFloyd IF pipelines, which are Imagen's stages: T5, a pixel UNet, and a super-resolution UNet."""

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax.interop.diffusers import scheduler as scheduler_lib
from ddpm_jax.interop.diffusers import unet_condition as unet_lib
from ddpm_jax.interop.diffusers.fields import check_accepted, refusal
from ddpm_jax.interop.diffusers.stages import (
    Stage,
    named_parts,
    read_fields,
    read_tensors,
    read_texts,
    require_parts,
    values_of,
)
from ddpm_jax.models.t5 import T5Encoder
from ddpm_jax.models.unet import UNet
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.sampling.condition import NoCondition
from ddpm_jax.text.tokenizers import Tokenizer

BASE, SUPER_RESOLUTION = PIPELINES = ("IFPipeline", "IFSuperResolutionPipeline")
_CHANNELS = 3
_NUM_TOKENS = 77  # of a prompt, whatever T5's own length is
_GUIDANCE = {BASE: 7.0, SUPER_RESOLUTION: 4.0}  # diffusers' defaults, like the next two
_NUM_STEPS = {BASE: 100, SUPER_RESOLUTION: 50}
_NOISE_LEVEL = 250  # of the enlarged picture
_FACTOR = 4  # the enlargement, which the files do not give
_LEFT_ASIDE = {
    "safety_checker": "the safety checker is ignored: the run does not check its pictures",
    "watermarker": "the watermark is ignored: the run's pictures have none",
}
_PROMPTS = (
    "prompts are lowercased and stripped of surrounding spaces; diffusers also removes links and some punctuation if "
    "beautifulsoup4 and ftfy are installed (clean_caption)"
)


def read(folder: Path, kind: str, source: str) -> Stage:
    """Reads the folder of one stage.

    Args:
      folder: with model_index.json, unet/, scheduler/, text_encoder/ and tokenizer/; for super-resolution also
        image_noising_scheduler/.
      kind: the pipeline's class, one of `PIPELINES`.
      source: its name in the run's config.

    Raises:
      UserError: a part that is missing, broken or not supported; it is named.
    """
    enlarges = kind == SUPER_RESOLUTION
    others = ("image_noising_scheduler",) if enlarges else ()
    require_parts(folder, kind, ("unet", "scheduler", "text_encoder", "tokenizer", *others))
    config = config_lib.default_config()
    scheduler, scheduler_file = read_fields(folder, "scheduler", "scheduler_config.json")
    unet, unet_file = read_fields(folder, "unet")
    with values_of(scheduler_file, unet_file):
        notes = scheduler_lib.read(config, scheduler, scheduler_file)
        layout = unet_lib.read(config, unet, unet_file)
    _check(unet_file, layout, enlarges)
    height, width = layout.sample_size
    config.data.update(source="folder", height=height, width=width, channels=_CHANNELS, flip=False)
    if enlarges:
        _set_enlarging(config, folder, height, width, unet_file)
    # The encoder ignores padding; the network attends to it.
    texts = {"mask_padding": False, "mask_in_encoder": True, "pooled": False, "max_length": _NUM_TOKENS}
    config.text.update(encoder=f"{source}/text_encoder", dropout=0.1, **texts)
    most = len(config.diffusion.betas) or config.diffusion.num_timesteps
    config.sample.update(guidance_scale=_GUIDANCE[kind], num_images=4, batch_size=4)
    config.sample.num_steps = min(_NUM_STEPS[kind], most)
    config.log.sample_images = 4
    tokenizer, encoder, encoder_params = read_texts(folder, _NUM_TOKENS, Tokenizer.lowercased)
    if not isinstance(encoder, T5Encoder) or encoder.width != layout.context_width:
        raise UserError(
            f"the text encoder of {str(folder)!r} has states of width {encoder.width}, but encoder_hid_dim is "
            f"{layout.context_width} in {unet_file!r}; accepted: a T5 of that width"
        )
    net = config_lib.make_network(config, NoCondition())
    assert isinstance(net, UNet)
    path, tensors = read_tensors(folder, "unet")
    params = unet_lib.to_params(path, tensors, net, layout)
    left_aside = (sentence for part, sentence in _LEFT_ASIDE.items() if part in named_parts(folder))
    name = "super_resolution" if enlarges else "base"
    return Stage(name, config, params, (tokenizer, encoder, encoder_params), notes=(*notes, _PROMPTS, *left_aside))


def _check(where: str, layout: unet_lib.Layout, enlarges: bool) -> None:
    """UserError for a network of a different kind from the pipeline's."""
    found: dict[str, Any] = {
        "in_channels": layout.in_channels,
        "out_channels": layout.latent_channels,
        "class_embed_type": "timestep" if layout.level else "of a vector" if layout.vector_width else None,
    }
    accepted: dict[str, Any] = {
        "in_channels": (2 * _CHANNELS if enlarges else _CHANNELS,),
        "out_channels": (_CHANNELS,),
        "class_embed_type": ("timestep" if enlarges else None,),
    }
    check_accepted(where, found, accepted)


def _set_enlarging(config: ConfigDict, folder: Path, height: int, width: int, where: str) -> None:
    """Sets the size of the low-resolution picture and its noise schedule."""
    if height % _FACTOR or width % _FACTOR:
        raise refusal(where, "sample_size", (height, width), (f"multiples of {_FACTOR}",))
    noising, file = read_fields(folder, "image_noising_scheduler", "scheduler_config.json")
    other = config_lib.default_config()
    with values_of(file):
        scheduler_lib.read(other, noising, file)
    betas = config_lib.make_betas_from(config)
    if not np.array_equal(betas, config_lib.make_betas_from(other)):
        raise UserError(f"{file!r} has a different noise schedule from the scheduler beside it; accepted: the same")
    last = len(betas) - 1
    config.upscale.update(
        height=height // _FACTOR,
        width=width // _FACTOR,
        max_augmentation=1.0,
        augmentation=min(_NOISE_LEVEL, last) / last,
        enlarging="corners",
    )
