"""diffusers' Karlo pipelines, which are DALL-E 2's stages: a prior, a decoder and super-resolution."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax.interop.diffusers import embedding_condition as condition_lib
from ddpm_jax.interop.diffusers import prior as prior_lib
from ddpm_jax.interop.diffusers import scheduler as scheduler_lib
from ddpm_jax.interop.diffusers import unet as super_resolution_lib
from ddpm_jax.interop.diffusers import unet_condition as unet_lib
from ddpm_jax.interop.diffusers.fields import check_accepted, refusal
from ddpm_jax.interop.diffusers.stages import (
    Stage,
    read_fields,
    read_tensors,
    read_texts,
    require_parts,
    values_of,
)
from ddpm_jax.interop.transformers import CLIP, Encoder
from ddpm_jax.interop.transformers import clip as clip_lib
from ddpm_jax.models.clip import CLIPTextEncoder
from ddpm_jax.models.embedding_condition import Embedded
from ddpm_jax.models.unet import UNet
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.sampling.condition import NoCondition
from ddpm_jax.text.tokenizers import Tokenizer

WITH_PRIOR, OF_PICTURES = PIPELINES = ("UnCLIPPipeline", "UnCLIPImageVariationPipeline")
_PARTS = (
    *("decoder", "text_proj", "text_encoder", "tokenizer", "super_res_first", "super_res_last"),
    *("decoder_scheduler", "super_res_scheduler"),
)
_OTHER_PARTS = {WITH_PRIOR: ("prior", "prior_scheduler"), OF_PICTURES: ("image_encoder",)}
_CHANNELS = 3
# The defaults of diffusers' pipelines.
_PRIOR_GUIDANCE, _DECODER_GUIDANCE = 4.0, 8.0
_NUM_STEPS, _SUPER_RESOLUTION_STEPS = 25, 7
# Options with a fixed value in a run's prior: our attribute, diffusers' field and the value.
_ONLY = (
    ("time_width", "time_embed_dim", None),
    ("time_activation", "time_embed_act_fn", "swish"),
    ("project_tokens", "encoder_hid_proj_type", True),
    ("norm_vector", "embedding_proj_norm_type", False),
    ("norm_in", "norm_in_type", False),
)
_LOGIT_SCALE = math.log(100)  # OpenAI CLIP's; unused here

Texts = tuple[Tokenizer, Encoder, Any]


def read(folder: Path, kind: str, source: str) -> list[Stage]:
    """Reads a pipeline's folder: its prior, if it has one, its decoder and its super-resolution.

    Args:
      folder: with model_index.json and a folder for each part.
      kind: the pipeline's class, one of `PIPELINES`.
      source: its name in the runs' configs.

    Raises:
      UserError: a part that is missing, broken or not supported; it is named.
    """
    require_parts(folder, kind, _PARTS + _OTHER_PARTS[kind])
    texts, clip = read_texts(folder), None
    encoder = texts[1]
    if not isinstance(encoder, CLIPTextEncoder) or encoder.projection is None:
        raise UserError(
            f"{str(folder / 'text_encoder')!r} is not a CLIP text encoder with a projection; accepted: a "
            "CLIPTextModelWithProjection"
        )
    if kind == OF_PICTURES:
        clip = _read_clip(folder, texts, encoder)
    decoder = _read_decoder(folder, source, texts, encoder, clip)
    shape = (decoder.config.data.height, decoder.config.data.width)
    prior = [_read_prior(folder, source, texts, encoder, shape)] if kind == WITH_PRIOR else []
    if prior and prior[0].described != decoder.described:
        widths = [stage.described["embedding_width"] for stage in (*prior, decoder)]
        raise UserError(
            f"the prior of {str(folder)!r} draws embeddings of width {widths[0]}, but text_proj takes {widths[1]}; "
            "accepted: the same"
        )
    return [*prior, decoder, _read_super_resolution(folder, shape)]


def _read_clip(folder: Path, texts: Texts, text: CLIPTextEncoder) -> CLIP:
    """Combines the pipeline's text encoder and image encoder to a CLIP."""
    tokenizer, _, text_params = texts
    image, image_params = clip_lib.read_image(folder / "image_encoder")
    if image.projection != text.projection:
        raise UserError(
            f"projection_dim is {image.projection} in image_encoder/, but {text.projection} in text_encoder/ of "
            f"{str(folder)!r}; accepted: the same"
        )
    mean, std = clip_lib.read_preparation(folder / "feature_extractor" / "preprocessor_config.json", image)
    params = {"text": text_params, "image": image_params}
    return CLIP(text, image, params, _LOGIT_SCALE, tokenizer, mean, std)


def _read_prior(folder: Path, source: str, texts: Texts, encoder: CLIPTextEncoder, shape: tuple[int, int]) -> Stage:
    config = config_lib.default_config()
    notes = _read_scheduler(config, folder, "prior_scheduler")
    fields, where = read_fields(folder, "prior")
    with values_of(where):
        net, widths = prior_lib.to_module(fields, where)
    for ours, theirs, accepted in _ONLY:
        if getattr(net, ours) != accepted:
            raise UserError(f"{theirs} is {fields[theirs]!r} in {where!r}; accepted in a pipeline: Karlo's")
    if net.num_tokens != texts[0].max_length:
        raise refusal(where, "num_embeddings", net.num_tokens, (texts[0].max_length,))
    _check_widths(where, encoder, {"embedding_dim": widths.embedding}, widths.vector)
    path, tensors = read_tensors(folder, "prior")
    params, statistics = prior_lib.to_params(path, tensors, net, widths)
    _set_pictures(config, shape)
    _set_texts(config, source)
    config.prior.update(
        clip=source,
        width=net.width,
        num_layers=net.num_layers,
        num_heads=net.num_heads,
        candidates=1,
        mean=tuple(statistics.mean.tolist()),
        std=tuple(statistics.std.tolist()),
    )
    _set_sampling(config, _NUM_STEPS, _PRIOR_GUIDANCE)
    return Stage("prior", config, params, texts, None, {"embedding_width": widths.embedding}, tuple(notes))


def _read_decoder(folder: Path, source: str, texts: Texts, encoder: CLIPTextEncoder, clip: CLIP | None) -> Stage:
    config = config_lib.default_config()
    notes = _read_scheduler(config, folder, "decoder_scheduler")
    unet, where = read_fields(folder, "decoder")
    projections, their_file = read_fields(folder, "text_proj")
    with values_of(where, their_file):
        layout = unet_lib.read(config, unet, where)
        told, width = condition_lib.to_module(projections, their_file)
    accepted: dict[str, Any] = {
        "in_channels": (_CHANNELS,),
        "out_channels": (_CHANNELS,),
        "class_embed_type": ("identity",),
        "cross_attention_dim": (told.width,),
        "block_out_channels": (told.time_width // 4,),
    }
    found = {
        "in_channels": layout.in_channels,
        "out_channels": layout.latent_channels,
        "class_embed_type": unet.get("class_embed_type"),
        "cross_attention_dim": layout.context_width,
        "block_out_channels": layout.vector_width // 4,  # the first of them
    }
    check_accepted(where, found, accepted)
    _check_widths(their_file, encoder, {"clip_embeddings_dim": width}, width)
    _set_pictures(config, layout.sample_size)
    _set_texts(config, source)
    embedding = {"num_tokens": told.num_tokens, "token_width": told.width}
    config.embedding.update(clip=source, normalized=False, **embedding)
    _set_sampling(config, _NUM_STEPS, _DECODER_GUIDANCE)
    net = config_lib.make_network(config, NoCondition())
    assert isinstance(net, Embedded)
    assert isinstance(net.net, UNet)
    path, tensors = read_tensors(folder, "text_proj")
    condition = condition_lib.to_params(path, tensors, told, width)
    path, tensors = read_tensors(folder, "decoder")
    params = {"net": unet_lib.to_params(path, tensors, net.net, layout), "condition": condition}
    described = {} if clip else {"embedding_width": width}
    return Stage("decoder", config, params, texts, clip, described, tuple(notes))


def _read_super_resolution(folder: Path, small: tuple[int, int]) -> Stage:
    config = config_lib.default_config()
    notes = _read_scheduler(config, folder, "super_res_scheduler")
    first, where = read_fields(folder, "super_res_first")
    last, last_file = read_fields(folder, "super_res_last")
    with values_of(where, last_file):
        own, others = (
            super_resolution_lib.complete(fields, file) for fields, file in ((first, where), (last, last_file))
        )
        for field, value in own.items():
            if others[field] != value:
                raise refusal(last_file, field, others[field], (f"{value!r}, as super_res_first",))
        num_classes = super_resolution_lib.read(config, first, where, _CHANNELS)
    if num_classes or config.data.channels != _CHANNELS:
        raise refusal(where, "in_channels", first.get("in_channels"), (f"{2 * _CHANNELS}, and no classes",))
    super_resolution_lib.check_out_channels(config, first, where)
    params = {}
    for name, part in (("net", "super_res_first"), ("last", "super_res_last")):
        path, tensors = read_tensors(folder, part)
        params[name] = super_resolution_lib.to_params(path, tensors, config, image_channels=_CHANNELS)
    config.data.flip = False
    config.upscale.update(
        height=small[0],
        width=small[1],
        max_augmentation=0.0,
        augmentation=0.0,
        enlarging="cubic",
        own_last_step=True,
    )
    _set_sampling(config, _SUPER_RESOLUTION_STEPS, 1.0)
    return Stage("super_resolution", config, params, notes=tuple(notes))


def _read_scheduler(config: ConfigDict, folder: Path, part: str) -> list[str]:
    fields, where = read_fields(folder, part, "scheduler_config.json")
    check_accepted(where, fields, {"_class_name": ("UnCLIPScheduler",)})
    with values_of(where):
        return scheduler_lib.read(config, fields, where)


def _check_widths(where: str, encoder: CLIPTextEncoder, embedding: Mapping[str, int], vector: int) -> None:
    """UserError unless a network's widths match the text encoder's."""
    ((field, width),) = embedding.items()
    if (width, vector) != (encoder.width, encoder.projection):
        raise UserError(
            f"{field} is {width} in {where!r}, but the text encoder has hidden_size {encoder.width} and projection_dim "
            f"{encoder.projection}; accepted: the same"
        )


def _set_pictures(config: ConfigDict, shape: tuple[int, int]) -> None:
    config.data.update(source="folder", height=shape[0], width=shape[1], channels=_CHANNELS, flip=False)


def _set_texts(config: ConfigDict, source: str) -> None:
    config.text.update(encoder=f"{source}/text_encoder", mask_padding=True, pooled=True, dropout=0.1)


def _set_sampling(config: ConfigDict, num_steps: int, guidance: float) -> None:
    most = config.diffusion.num_timesteps
    config.sample.update(guidance_scale=guidance, num_steps=min(num_steps, most), num_images=4, batch_size=4)
    config.log.sample_images = 4
