"""The model of a config: its condition, network, schedule and decoder, and its further input."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from ddpm_jax.config.diffusion import make_betas_from, make_schedule_from
from ddpm_jax.config.encoders import held_in, make_embedder, make_texts, open_autoencoder
from ddpm_jax.diffusion.schedules import Schedule
from ddpm_jax.interop.diffusers import autoencoder as autoencoder_lib
from ddpm_jax.models.embedding_condition import Embedded, EmbeddingCondition
from ddpm_jax.models.last_step import OwnLastStep
from ddpm_jax.models.prior import Prior
from ddpm_jax.models.unet import UNet
from ddpm_jax.sampling.captions import CaptionCondition
from ddpm_jax.sampling.condition import ClassCondition, Condition, NoCondition
from ddpm_jax.sampling.decoder import Decoder, Pixels
from ddpm_jax.sampling.embeddings import Embeddings, ImageEmbedding
from ddpm_jax.sampling.generate import Model
from ddpm_jax.sampling.given import Given, LowResolution, MaskedPicture
from ddpm_jax.sampling.latents import Latents

_ANY_CLASSES = tuple(map(str, range(10)))  # of a class-conditional run before its images are opened


def make_model(config: ConfigDict, dataset: Mapping[str, Any] | None = None, dtype: str | None = None) -> Model:
    """The model of the run; `dataset` and `dtype` as in `make_condition`."""
    condition, decoder = make_condition(config, dataset, dtype), make_decoder(config, dataset, dtype)
    net, schedule = make_network(config, condition), make_schedule_from(config)
    return Model(condition, net, schedule, decoder, make_given(config, schedule, decoder, dataset))


def make_condition(config: ConfigDict, dataset: Mapping[str, Any] | None = None, dtype: str | None = None) -> Condition:
    """The condition of the run.

    Args:
      config: of the run.
      dataset: the workdir's description of the training set and of its texts; None: there is none yet, and classes
        and captions are not known.
      dtype: of the weights of frozen parts; None: float32.
    """
    if config.text.encoder:
        return CaptionCondition(
            texts=make_texts(config, dataset or {}, dtype),
            dropout=config.text.dropout,
            shown=tuple((dataset or {}).get("shown_captions", ("",))),
        )
    if not config.model.class_conditional:
        return NoCondition()
    names = (dataset or {}).get("class_names")
    names = tuple(_ANY_CLASSES if names is None else names)
    return ClassCondition(names, config.train.label_dropout, config.model.null_class)


def make_network(config: ConfigDict, condition: Condition | None = None) -> nn.Module:
    """The network; condition=None uses the config's."""
    condition = make_condition(config) if condition is None else condition
    if config.prior.clip:
        return condition.network(_make_prior(config, condition))
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in config.model.items()
    }
    del options["class_conditional"], options["masked_picture"]
    off = (
        *("level_channels", "level_res_blocks", "attention_levels", "downsample_levels", "upsample_levels"),
        *("head_channels", "token_channels", "time_channels"),
    )
    groups = options["middle_attention_groups"]
    net = UNet(
        **{
            **options,
            **{name: options[name] or None for name in off},
            "middle_attention_groups": None if groups < 0 else groups,
            "num_timesteps": len(make_betas_from(config)) if options["time_embedding"] == "learned" else None,
            "dtype": jnp.dtype(options["dtype"]),
            "learned_variance": config.diffusion.variance == "learned",
            **condition.network_options(),
            **({"vector_embedding": "none"} if config.embedding.clip else {}),
        }
    )
    embedding = config.embedding
    if embedding.clip:
        time_width = net.time_channels or 4 * net.channels
        told = EmbeddingCondition(embedding.token_width, time_width, embedding.num_tokens, net.dtype)
        return condition.network(Embedded(net, told))
    if config.upscale.own_last_step:
        return condition.network(OwnLastStep(net, net.clone()))
    return condition.network(net)


def _make_prior(config: ConfigDict, condition: Condition) -> Prior:
    if not isinstance(condition, CaptionCondition):
        raise ValueError("prior.clip needs texts: a text.encoder, which is usually the same CLIP")
    prior, num_tokens = config.prior, condition.texts.tokenizer.max_length
    return Prior(prior.width, prior.num_layers, prior.num_heads, num_tokens, dtype=jnp.dtype(config.model.dtype))


def make_pixels(config: ConfigDict) -> Pixels:
    data = config.data
    return Pixels((data.height, data.width, data.channels), data.flip)


def make_decoder(config: ConfigDict, dataset: Mapping[str, Any] | None = None, dtype: str | None = None) -> Decoder:
    """The decoder between pictures and what the run diffuses; `dataset` and `dtype` as in `make_condition`."""
    if config.prior.clip:
        return Embeddings(make_embedder(config, dataset))
    if not config.autoencoder.source:
        return make_pixels(config)
    data, folder = config.data, (dataset or {}).get("autoencoder", config.autoencoder.source)
    autoencoder, scaling_factor = open_autoencoder(folder)
    return Latents(
        (data.height, data.width, data.channels),
        autoencoder,
        open_params=lambda: held_in(dtype, autoencoder_lib.read(folder)[1]),
        scaling_factor=config.autoencoder.scaling_factor or scaling_factor,
        flip=data.flip,
        cache_bytes=int(data.cache_gib * 2**30),
    )


def make_given(
    config: ConfigDict, schedule: Schedule, decoder: Decoder, dataset: Mapping[str, Any] | None = None
) -> Given | None:
    """The further input of the run; None: there is none. `dataset` as in `make_condition`."""
    data, upscale = config.data, config.upscale
    if config.embedding.clip:
        return ImageEmbedding(make_embedder(config, dataset), config.embedding.dropout)
    if config.model.masked_picture:
        assert isinstance(decoder, Latents)
        return MaskedPicture(decoder.shape, decoder.autoencoder.downscaling)
    if not upscale.height:
        return None
    low, high = ((sizes.height, sizes.width, data.channels) for sizes in (upscale, data))
    return LowResolution(
        low, high, schedule, upscale.max_augmentation, upscale.augmentation, data.flip, upscale.enlarging
    )
