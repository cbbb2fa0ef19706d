"""A run's config: every field with its default, and the objects that are made from a config.

`defaults` documents the fields, `limits` has the values that they accept, and `values` has functions of whole configs.
The other modules make objects and arguments for `diffusion/`, `models/`, `sampling/` and `training/`, which do not know
a config.
"""

from ddpm_jax.config.defaults import DECAYS, DTYPES, OBJECTIVES, TRAINED, default_config
from ddpm_jax.config.diffusion import loss_options, make_betas_from, make_schedule_from, parameterization
from ddpm_jax.config.encoders import (
    autoencoder_folder,
    is_workdir,
    make_autoencoder,
    make_clip_encoders,
    make_embedder,
    make_texts,
    open_autoencoder,
    open_text_encoder,
    train_tokenizer,
)
from ddpm_jax.config.model import (
    make_condition,
    make_decoder,
    make_given,
    make_model,
    make_network,
    make_pixels,
)
from ddpm_jax.config.sampling import (
    evaluation_request,
    guidance,
    sampling_calls,
    sampling_request,
    sampling_steps,
)
from ddpm_jax.config.training import history_timesteps, learning_rate, lora_scale, make_optimizer, step_options
from ddpm_jax.config.values import FREE_FORM, differences, fields, from_json, to_json

__all__ = [
    "DECAYS",
    "DTYPES",
    "FREE_FORM",
    "OBJECTIVES",
    "TRAINED",
    "autoencoder_folder",
    "default_config",
    "differences",
    "evaluation_request",
    "fields",
    "from_json",
    "guidance",
    "history_timesteps",
    "is_workdir",
    "learning_rate",
    "lora_scale",
    "loss_options",
    "make_autoencoder",
    "make_betas_from",
    "make_clip_encoders",
    "make_condition",
    "make_decoder",
    "make_embedder",
    "make_given",
    "make_model",
    "make_network",
    "make_optimizer",
    "make_pixels",
    "make_schedule_from",
    "make_texts",
    "open_autoencoder",
    "open_text_encoder",
    "parameterization",
    "sampling_calls",
    "sampling_request",
    "sampling_steps",
    "step_options",
    "to_json",
    "train_tokenizer",
]
