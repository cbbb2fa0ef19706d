"""The values that each field of a config accepts, independently of the others."""

from typing import Any

from ml_collections import ConfigDict

from ddpm_jax.config.defaults import DECAYS, DTYPES, OBJECTIVES, default_config
from ddpm_jax.config.values import fields
from ddpm_jax.data.sources import SOURCES
from ddpm_jax.diffusion import losses, tables
from ddpm_jax.diffusion.gaussian import PREDICTIONS, VARIANCES
from ddpm_jax.diffusion.timesteps import TIMESTEP_SAMPLERS
from ddpm_jax.runtime.errors import UserError, nearest
from ddpm_jax.sampling.given import ENLARGING
from ddpm_jax.text.tokenizers import MIN_VOCAB_SIZE

_ELEMENTS: dict[str, type] = {
    "model.channel_multipliers": int,
    "autoencoder.level_channels": int,
    "model.level_channels": int,
    "model.level_res_blocks": int,
    "model.time_activations": str,
    "model.attention_resolutions": int,
    "model.downsample_levels": str,
    "model.upsample_levels": str,
    "model.attention_levels": bool,
    "data.held_out": int,
    "prior.mean": float,
    "prior.std": float,
    "diffusion.betas": float,
    "train.ema_decays": float,
    "sample.guidance_interval": int,
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "diffusion.prediction": PREDICTIONS,
    "diffusion.variance": VARIANCES,
    "diffusion.loss": losses.LOSSES,
    "diffusion.weighting": losses.WEIGHTINGS,
    "diffusion.timestep_sampler": TIMESTEP_SAMPLERS,
    "train.objective": OBJECTIVES,
    "optimizer.decay": DECAYS,
    "sample.sampler": tuple(tables.SAMPLERS),
    "evaluate.sampler": tuple(tables.SAMPLERS),
    "sample.spacing": ("", *tables.SPACINGS),
    "model.dtype": DTYPES,
    "data.source": SOURCES,
    "upscale.enlarging": ENLARGING,
}
_LEAST = {
    "train.batch_size": 1,
    "train.num_steps": 1,
    "train.accumulation": 1,
    "train.steps_per_dispatch": 1,
    "seed": 0,
    "data.height": 1,
    "data.width": 1,
    "data.channels": 1,
    "data.cache_gib": 0,
    "data.num_workers": 0,
    "model.channels": 2,
    "model.num_res_blocks": 1,
    "model.num_heads": 1,
    "model.head_channels": 0,
    "model.num_groups": 1,
    "model.middle_attention_groups": -1,
    "model.attention_patch_size": 1,
    "model.transformer_depth": 0,
    "model.context_groups": 0,
    "model.token_channels": 0,
    "model.pooling_heads": 0,
    "model.time_channels": 0,
    "autoencoder.scaling_factor": 0,
    "autoencoder.latent_channels": 1,
    "autoencoder.num_res_blocks": 1,
    "autoencoder.num_groups": 1,
    "autoencoder.kl_weight": 0,
    "prior.width": 2,
    "prior.num_layers": 1,
    "prior.num_heads": 1,
    "prior.candidates": 1,
    "embedding.num_tokens": 1,
    "embedding.token_width": 1,
    "clip.patch_size": 1,
    "clip.width": 1,
    "clip.num_layers": 1,
    "clip.num_heads": 1,
    "clip.projection": 1,
    "upscale.height": 0,
    "upscale.width": 0,
    "lora.rank": 0,
    "lora.alpha": 0,
    "text.vocab_size": MIN_VOCAB_SIZE,
    "text.max_length": 0,
    "text.width": 1,
    "text.num_layers": 0,
    "text.num_heads": 1,
    "log.every_steps": 1,
    "log.sample_every_steps": 0,
    "log.sample_images": 1,
    "log.sample_steps": 0,
    "diffusion.num_timesteps": 1,
    "diffusion.vlb_weight": 0,
    "evaluate.every_steps": 0,
    "evaluate.likelihood_images": 0,
    "evaluate.num_images": 0,
    "evaluate.num_real": 2,
    "evaluate.num_steps": 1,
    "optimizer.learning_rate": 0,
    "optimizer.decay_steps": 0,
    "optimizer.warmup_steps": 0,
    "optimizer.grad_clip": 0,
    "checkpoint.every_steps": 1,
    "checkpoint.every_minutes": 0,
    "checkpoint.keep": 1,
    "sample.num_images": 1,
    "sample.batch_size": 1,
    "sample.num_steps": 0,
    "sample.spacing_offset": 0,
}
_ABOVE_0 = ("model.norm_epsilon", "diffusion.clip_range")
_FROM_0_TO_1 = (
    "model.time_frequency_shift",
    "train.label_dropout",
    "text.dropout",
    "diffusion.dynamic_threshold",
    "embedding.dropout",
    "upscale.max_augmentation",
    "upscale.augmentation",
)
_WIDTHS = {  # of levels, and whether there may be none
    "model.channel_multipliers": False,
    "model.level_channels": True,
    "autoencoder.level_channels": False,
}


def check_types(config: ConfigDict) -> None:
    """UserError for fields that do not exist or are missing, and for values of a different type than the default's."""
    known, found = dict(fields(default_config())), dict(fields(config))
    for name, value in found.items():
        if name not in known:
            raise UserError(f"config field {name!r} does not exist.{nearest(name, known)}")
        default = known[name]
        if not _fits(value, type(default)):
            raise UserError(f"config.{name} is {value!r}; accepted: a value of type {type(default).__name__}")
        if name in _ELEMENTS and not all(_fits(element, _ELEMENTS[name]) for element in value):
            raise UserError(f"config.{name} is {value!r}; accepted: values of type {_ELEMENTS[name].__name__}")
    for name in known:
        if name not in found:
            raise UserError(f"config field {name!r} is missing")


def _fits(value: Any, kind: type) -> bool:
    accepted: Any = {float: (int, float), tuple: (tuple, list)}.get(kind, kind)
    return isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))


def check_values(config: ConfigDict) -> None:
    """UserError for a value outside of what its field accepts."""
    values = dict(fields(config))
    for name, accepted in _CHOICES.items():
        if values[name] not in accepted:
            names = ", ".join(choice or "''" for choice in accepted)
            raise UserError(f"config.{name} is {values[name]!r}; accepted: {names}.{nearest(values[name], accepted)}")
    for name, least in _LEAST.items():
        if not values[name] >= least:  # NaN too
            raise UserError(f"config.{name} is {values[name]}; at least {least} is needed")
    if not 0.0 <= config.model.dropout < 1.0:
        raise UserError(f"config.model.dropout is {config.model.dropout}; accepted: 0 to below 1")
    if config.seed >= 2**32:
        raise UserError(f"config.seed is {config.seed}; accepted: 0 to {2**32 - 1}")
    decays = config.train.ema_decays
    if not decays or not all(0.0 <= decay < 1.0 for decay in decays):
        raise UserError(f"config.train.ema_decays is {decays}; accepted: one or more values from 0 to below 1")
    for name, may_be_empty in _WIDTHS.items():
        if min(values[name], default=int(may_be_empty)) < 1:
            raise UserError(f"config.{name} is {values[name]}; accepted: integers of 1 or more")
    for name in _ABOVE_0:
        if not values[name] > 0:
            raise UserError(f"config.{name} is {values[name]}; accepted: above 0")
    for name in _FROM_0_TO_1:
        if not 0.0 <= values[name] <= 1.0:
            raise UserError(f"config.{name} is {values[name]}; accepted: 0 to 1")
    limit = config.diffusion.threshold_limit
    if limit and not limit >= 1:
        raise UserError(f"config.diffusion.threshold_limit is {limit}; accepted: 0, or at least 1")
    if 1 in (config.evaluate.likelihood_images, config.evaluate.num_images):
        raise UserError("config.evaluate has likelihood_images or num_images of 1; accepted: 0, or 2 and more")
