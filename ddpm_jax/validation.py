"""What no run can be told: everything in a config that could not run, said before anything is compiled."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax.data import digits
from ddpm_jax.data.sources import SOURCES
from ddpm_jax.diffusion import losses, tables
from ddpm_jax.diffusion.gaussian import PREDICTIONS, VARIANCES
from ddpm_jax.diffusion.schedules import BETAS_OF, Schedule
from ddpm_jax.diffusion.timesteps import TIMESTEP_SAMPLERS
from ddpm_jax.runtime.errors import UserError, first_line, nearest
from ddpm_jax.runtime.parallel import mesh_shape
from ddpm_jax.sampling.condition import check_guidance
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


def _fits(value: Any, kind: type) -> bool:
    accepted: Any = {float: (int, float), tuple: (tuple, list)}.get(kind, kind)
    return isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))


def _check_types(config: ConfigDict) -> None:
    known = dict(config_lib.fields(config_lib.default_config()))
    found = dict(config_lib.fields(config))
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


def _check_values(config: ConfigDict) -> None:
    diffusion, optimizer, train = config.diffusion, config.optimizer, config.train
    for name, value, accepted in (
        ("diffusion.prediction", diffusion.prediction, PREDICTIONS),
        ("diffusion.variance", diffusion.variance, VARIANCES),
        ("diffusion.loss", diffusion.loss, losses.LOSSES),
        ("diffusion.weighting", diffusion.weighting, losses.WEIGHTINGS),
        ("diffusion.timestep_sampler", diffusion.timestep_sampler, TIMESTEP_SAMPLERS),
        ("train.objective", train.objective, config_lib.OBJECTIVES),
        ("optimizer.decay", optimizer.decay, config_lib.DECAYS),
        ("sample.sampler", config.sample.sampler, tuple(tables.SAMPLERS)),
        ("evaluate.sampler", config.evaluate.sampler, tuple(tables.SAMPLERS)),
        ("sample.spacing", config.sample.spacing, ("", *tables.SPACINGS)),
        ("model.dtype", config.model.dtype, config_lib.DTYPES),
        ("data.source", config.data.source, SOURCES),
        ("upscale.enlarging", config.upscale.enlarging, ENLARGING),
    ):
        if value not in accepted:
            names = ", ".join(choice or "''" for choice in accepted)
            raise UserError(f"config.{name} is {value!r}; accepted: {names}.{nearest(value, accepted)}")
    for name, value, least in (
        ("train.batch_size", train.batch_size, 1),
        ("train.num_steps", train.num_steps, 1),
        ("train.accumulation", train.accumulation, 1),
        ("train.steps_per_dispatch", train.steps_per_dispatch, 1),
        ("seed", config.seed, 0),
        ("data.height", config.data.height, 1),
        ("data.width", config.data.width, 1),
        ("data.channels", config.data.channels, 1),
        ("data.cache_gib", config.data.cache_gib, 0),
        ("data.num_workers", config.data.num_workers, 0),
        ("model.channels", config.model.channels, 2),
        ("model.num_res_blocks", config.model.num_res_blocks, 1),
        ("model.num_heads", config.model.num_heads, 1),
        ("model.head_channels", config.model.head_channels, 0),
        ("model.num_groups", config.model.num_groups, 1),
        ("model.middle_attention_groups", config.model.middle_attention_groups, -1),
        ("model.attention_patch_size", config.model.attention_patch_size, 1),
        ("model.transformer_depth", config.model.transformer_depth, 0),
        ("model.context_groups", config.model.context_groups, 0),
        ("model.token_channels", config.model.token_channels, 0),
        ("model.pooling_heads", config.model.pooling_heads, 0),
        ("model.time_channels", config.model.time_channels, 0),
        ("autoencoder.scaling_factor", config.autoencoder.scaling_factor, 0),
        ("autoencoder.latent_channels", config.autoencoder.latent_channels, 1),
        ("autoencoder.num_res_blocks", config.autoencoder.num_res_blocks, 1),
        ("autoencoder.num_groups", config.autoencoder.num_groups, 1),
        ("autoencoder.kl_weight", config.autoencoder.kl_weight, 0),
        ("prior.width", config.prior.width, 2),
        ("prior.num_layers", config.prior.num_layers, 1),
        ("prior.num_heads", config.prior.num_heads, 1),
        ("prior.candidates", config.prior.candidates, 1),
        ("embedding.num_tokens", config.embedding.num_tokens, 1),
        ("embedding.token_width", config.embedding.token_width, 1),
        ("clip.patch_size", config.clip.patch_size, 1),
        ("clip.width", config.clip.width, 1),
        ("clip.num_layers", config.clip.num_layers, 1),
        ("clip.num_heads", config.clip.num_heads, 1),
        ("clip.projection", config.clip.projection, 1),
        ("upscale.height", config.upscale.height, 0),
        ("upscale.width", config.upscale.width, 0),
        ("lora.rank", config.lora.rank, 0),
        ("lora.alpha", config.lora.alpha, 0),
        ("text.vocab_size", config.text.vocab_size, MIN_VOCAB_SIZE),
        ("text.max_length", config.text.max_length, 0),
        ("text.width", config.text.width, 1),
        ("text.num_layers", config.text.num_layers, 0),
        ("text.num_heads", config.text.num_heads, 1),
        ("log.every_steps", config.log.every_steps, 1),
        ("log.sample_every_steps", config.log.sample_every_steps, 0),
        ("log.sample_images", config.log.sample_images, 1),
        ("log.sample_steps", config.log.sample_steps, 0),
        ("diffusion.num_timesteps", diffusion.num_timesteps, 1),
        ("diffusion.vlb_weight", diffusion.vlb_weight, 0),
        ("evaluate.every_steps", config.evaluate.every_steps, 0),
        ("evaluate.likelihood_images", config.evaluate.likelihood_images, 0),
        ("evaluate.num_images", config.evaluate.num_images, 0),
        ("evaluate.num_real", config.evaluate.num_real, 2),
        ("evaluate.num_steps", config.evaluate.num_steps, 1),
        ("optimizer.learning_rate", optimizer.learning_rate, 0),
        ("optimizer.decay_steps", optimizer.decay_steps, 0),
        ("optimizer.warmup_steps", optimizer.warmup_steps, 0),
        ("optimizer.grad_clip", optimizer.grad_clip, 0),
        ("checkpoint.every_steps", config.checkpoint.every_steps, 1),
        ("checkpoint.every_minutes", config.checkpoint.every_minutes, 0),
        ("checkpoint.keep", config.checkpoint.keep, 1),
        ("sample.num_images", config.sample.num_images, 1),
        ("sample.batch_size", config.sample.batch_size, 1),
        ("sample.num_steps", config.sample.num_steps, 0),
        ("sample.spacing_offset", config.sample.spacing_offset, 0),
    ):
        if not value >= least:  # NaN too
            raise UserError(f"config.{name} is {value}; at least {least} is needed")
    if not 0.0 <= config.model.dropout < 1.0:
        raise UserError(f"config.model.dropout is {config.model.dropout}; accepted: 0 to below 1")
    if config.seed >= 2**32:
        raise UserError(f"config.seed is {config.seed}; accepted: 0 to {2**32 - 1}")
    decays = train.ema_decays
    if not decays or not all(0.0 <= decay < 1.0 for decay in decays):
        raise UserError(f"config.train.ema_decays is {decays}; accepted: one or more values from 0 to below 1")
    if not config.model.channel_multipliers or min(config.model.channel_multipliers) < 1:
        raise UserError(
            f"config.model.channel_multipliers is {config.model.channel_multipliers}; accepted: integers of 1 or more"
        )
    if any(width < 1 for width in config.model.level_channels):
        raise UserError(
            f"config.model.level_channels is {config.model.level_channels}; accepted: integers of 1 or more"
        )
    widths = config.autoencoder.level_channels
    if not widths or min(widths) < 1:
        raise UserError(f"config.autoencoder.level_channels is {widths}; accepted: integers of 1 or more")
    for name, value in (
        ("model.norm_epsilon", config.model.norm_epsilon),
        ("diffusion.clip_range", diffusion.clip_range),
    ):
        if not value > 0:
            raise UserError(f"config.{name} is {value}; accepted: above 0")
    for name in () if diffusion.betas else BETAS_OF.get(diffusion.schedule, ()):
        if not 0.0 < diffusion[name] <= 1.0:
            raise UserError(f"config.diffusion.{name} is {diffusion[name]}; accepted: above 0, to 1")
    for name, share in (
        ("model.time_frequency_shift", config.model.time_frequency_shift),
        ("train.label_dropout", train.label_dropout),
        ("text.dropout", config.text.dropout),
        ("diffusion.dynamic_threshold", diffusion.dynamic_threshold),
        ("embedding.dropout", config.embedding.dropout),
        ("upscale.max_augmentation", config.upscale.max_augmentation),
        ("upscale.augmentation", config.upscale.augmentation),
    ):
        if not 0.0 <= share <= 1.0:
            raise UserError(f"config.{name} is {share}; accepted: 0 to 1")
    if diffusion.threshold_limit and not diffusion.threshold_limit >= 1:
        raise UserError(f"config.diffusion.threshold_limit is {diffusion.threshold_limit}; accepted: 0, or 1 and more")
    if train.label_dropout and not config.model.class_conditional:
        raise UserError("config.train.label_dropout is for config.model.class_conditional=True")
    if train.label_dropout and not config.model.null_class:
        raise UserError("config.train.label_dropout needs a null class; accepted with model.null_class=False: 0")
    if config.text.encoder and config.model.class_conditional:
        raise UserError(
            f"config.text.encoder is {config.text.encoder!r} and config.model.class_conditional is True; accepted: "
            "captions or classes"
        )
    if config.data.caption and not (config.text.encoder and config.data.source == "tfds"):
        raise UserError(
            f"config.data.caption is {config.data.caption!r}, which is for config.data.source='tfds' and a "
            "config.text.encoder"
        )
    if config.autoencoder.source:
        _check_latents(config)
    if config.prior.clip or config.embedding.clip:
        _check_embeddings(config)
    if train.objective == "clip":
        _check_clip(config)
    if config.model.masked_picture and not config.autoencoder.source:
        raise UserError(
            "config.model.masked_picture is True, and the run diffuses no latents; accepted: with an autoencoder.source"
        )
    if config.upscale.height or config.upscale.width:
        _check_upscale(config)
    if config.lora.rank and (train.objective != "diffusion" or config.text.encoder == config_lib.TRAINED):
        trained = "an encoder of text that is trained along"
        what = {"autoencoder": "an autoencoder", "clip": "a CLIP"}.get(train.objective, trained)
        raise UserError(f"config.lora.rank is {config.lora.rank}; accepted for {what}: 0")
    if config.lora.text_encoder and not (config.lora.rank and config.text.encoder):
        found = f"config.lora.rank is {config.lora.rank} and config.text.encoder {config.text.encoder!r}"
        raise UserError(
            f"config.lora.text_encoder is True, and {found}; accepted: a rank above 0 and the folder of a text encoder"
        )
    if 1 in (config.evaluate.likelihood_images, config.evaluate.num_images):
        raise UserError("config.evaluate has likelihood_images or num_images of 1; accepted: 0, or 2 and more")
    steps_of = {"sample.num_steps": config.sample.num_steps}
    if config.log.sample_every_steps:
        steps_of["log.sample_steps"] = config.log.sample_steps
    if config.evaluate.every_steps:
        steps_of["evaluate.num_steps"] = config.evaluate.num_steps
    for name, steps in steps_of.items():
        most = len(diffusion.betas) or diffusion.num_timesteps
        if steps > most:
            field = f"betas has {most} values" if diffusion.betas else f"num_timesteps is {most}"
            raise UserError(
                f"config.diffusion.{field} and config.{name} is {steps}; accepted: {steps} or more timesteps, or a "
                f"config.{name} of at most {most}"
            )


def _check_latents(config: ConfigDict) -> None:
    """What a run of latents cannot have."""
    if config.train.objective == "autoencoder":
        raise UserError(
            f"config.autoencoder.source is {config.autoencoder.source!r} and config.train.objective is 'autoencoder'; "
            "accepted: one of the two"
        )
    for name in ("clip", "dynamic_threshold"):
        if config.diffusion[name]:
            raise UserError(
                f"config.diffusion.{name} is {config.diffusion[name]}, and latents lie outside of [-1, 1], too; "
                f"accepted with an autoencoder.source: {type(config.diffusion[name])(0)}"
            )
    if config.evaluate.every_steps and config.evaluate.likelihood_images:
        raise UserError(
            f"config.evaluate.likelihood_images is {config.evaluate.likelihood_images}, and a run of latents has no "
            "likelihood of its pictures; accepted with an autoencoder.source: 0"
        )


def _check_embeddings(config: ConfigDict) -> None:
    """What a run that draws embeddings, or is given one, cannot have."""
    name = "prior.clip" if config.prior.clip else "embedding.clip"
    others = {
        "embedding.clip": config.embedding.clip if config.prior.clip else "",
        "autoencoder.source": config.autoencoder.source,
        "upscale.height": config.upscale.height or "",
    }
    for other, value in others.items():
        if value:
            raise UserError(f"config.{name} and config.{other} are both set; accepted: one of the two")
    if len(config.prior.mean) != len(config.prior.std) or not all(std > 0 for std in config.prior.std):
        raise UserError(
            f"config.prior.mean has {len(config.prior.mean)} values and config.prior.std {len(config.prior.std)}; "
            "accepted: as many, and standard deviations above 0"
        )
    diffusion = config.diffusion
    if config.prior.clip and ((diffusion.clip and diffusion.clip_range == 1) or diffusion.dynamic_threshold):
        raise UserError(
            "config.diffusion.clip or dynamic_threshold is set, and embeddings lie outside of [-1, 1], too; accepted "
            "with prior.clip: False or a larger clip_range, and 0.0"
        )
    if config.evaluate.every_steps and (config.prior.clip or config.evaluate.likelihood_images):
        raise UserError(
            f"config.evaluate asks for what a run with {name} does not have; accepted: evaluate.every_steps=0"
            + ("" if config.prior.clip else " or evaluate.likelihood_images=0")
        )


def _check_clip(config: ConfigDict) -> None:
    """What a CLIP must have."""
    text, train = config.text, config.train
    if text.encoder != config_lib.TRAINED:
        raise UserError(
            f"config.text.encoder is {text.encoder!r}, and a CLIP trains its own on captions; accepted with "
            "train.objective 'clip': 'trained'"
        )
    if not text.num_layers:
        raise UserError(
            "config.text.num_layers is 0, with which the state at the end of a text knows nothing of it; accepted with "
            "train.objective 'clip': 1 or more"
        )
    if train.batch_size < 2:
        raise UserError("config.train.batch_size is 1, and a CLIP tells pictures apart; accepted: 2 or more")
    if train.accumulation > 1:
        raise UserError(
            f"config.train.accumulation is {train.accumulation}, and a CLIP's loss is of the whole batch, not the mean "
            "of its parts'; accepted with train.objective 'clip': 1"
        )
    if config.evaluate.every_steps and not config.evaluate.num_images:
        raise UserError(
            "config.evaluate.num_images is 0, and a CLIP is evaluated by pictures; accepted with evaluate.every_steps "
            "and train.objective 'clip': 2 or more"
        )
    for name, value in (("autoencoder.source", config.autoencoder.source), ("upscale.height", config.upscale.height)):
        if value:
            raise UserError(
                f"config.{name} is {value!r}, and a CLIP is trained on pictures themselves; accepted with "
                f"train.objective 'clip': {type(value)()!r}"
            )


def _check_upscale(config: ConfigDict) -> None:
    """What a run that enlarges pictures must have."""
    data, upscale = config.data, config.upscale
    small, large = (f"{size.height}x{size.width}" for size in (upscale, data))
    fits = 0 < upscale.height < data.height and upscale.height * data.width == upscale.width * data.height
    if not fits:
        raise UserError(
            f"config.upscale is {small} and config.data {large}; accepted: smaller pictures of the same shape"
        )
    if upscale.enlarging == "corners" and min(upscale.height, upscale.width) < 2:
        raise UserError(f"config.upscale is {small}; accepted with enlarging 'corners': 2x2 and larger")
    if config.autoencoder.source or config.train.objective == "autoencoder":
        raise UserError(f"config.upscale is {small}; accepted with an autoencoder, whose latents are no pictures: 0x0")
    if upscale.max_augmentation and upscale.augmentation > upscale.max_augmentation:
        raise UserError(
            f"config.upscale.augmentation is {upscale.augmentation}; accepted: at most upscale.max_augmentation, "
            f"{upscale.max_augmentation}, which the network knows"
        )
    if config.evaluate.every_steps and config.evaluate.likelihood_images:
        raise UserError(
            f"config.evaluate.likelihood_images is {config.evaluate.likelihood_images}, and a run that enlarges "
            "pictures has no likelihood of theirs; accepted with upscale: 0"
        )


def _check_training(config: ConfigDict) -> None:
    """What only a run that is trained must have: another is opened without."""
    diffusion, evaluate, data, train = config.diffusion, config.evaluate, config.data, config.train
    if config.model.masked_picture:
        raise UserError(
            "config.model.masked_picture is True, and networks that are given a masked picture are not trained here; "
            "accepted: False"
        )
    if config.lora.rank and not train.init_from:
        raise UserError(
            f"config.lora.rank is {config.lora.rank}, and adapters need a trained network; give its workdir by "
            "--init_from"
        )
    if config.train.objective == "autoencoder" and evaluate.every_steps:
        raise UserError(
            f"config.evaluate.every_steps is {evaluate.every_steps}, and an autoencoder makes no samples to judge; "
            "accepted with train.objective 'autoencoder': 0"
        )
    if diffusion.loss == "vlb" and diffusion.weighting != "none":
        raise UserError(
            f"config.diffusion.weighting is {diffusion.weighting!r}, of the squared error, which loss 'vlb' does not "
            "have; accepted there: none"
        )
    if not (evaluate.every_steps and evaluate.num_images):
        return
    name = evaluate.features
    if name == "digits" and not digits.side_by_side((data.height, data.width, data.channels)):
        raise UserError(
            "config.evaluate.features is 'digits', which judges 8x8x1 images, or several side by side, and these are "
            f"{data.height}x{data.width}x{data.channels}; accepted: inception, or the file of its weights"
        )
    if name not in ("", "digits", "inception") and not Path(name).expanduser().is_file():
        raise UserError(
            f"config.evaluate.features is {name!r}; accepted: digits, inception, or the file of its weights"
        )


def validate(config: ConfigDict, num_devices: int | None = None, dataset: Mapping[str, Any] | None = None) -> None:
    """Raises UserError, in one sentence, for anything in the config that could not run; compiles nothing.

    With num_devices, also for what so many devices could not train. `dataset` is what the workdir has of the data.
    """
    _check_types(config)
    _check_values(config)
    if num_devices is not None:
        _check_training(config)
        mesh_shape(num_devices, **config.mesh)
        batch_size, parts = config.train.batch_size, config.train.accumulation
        if batch_size % (num_devices * parts):
            times = f" times the {parts} parts of config.train.accumulation" if parts > 1 else ""
            raise UserError(
                f"config.train.batch_size is {batch_size}; it must be divisible by the {num_devices} devices{times}"
            )
    try:
        schedule = config_lib.make_schedule_from(config)
        _check_pure_noise(config, schedule)
        config_lib.sampling_calls(config, schedule)
        optimizer = config_lib.make_optimizer(config)
        if config.train.objective == "clip":
            text, image = config_lib.make_clip_encoders(config, dataset)
            jax.eval_shape(text.init, jax.random.key(0), jax.ShapeDtypeStruct((1, text.max_length), jnp.int32))
            jax.eval_shape(image.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *image.shape), jnp.float32))
            return
        if config.train.objective == "autoencoder":
            autoencoder = config_lib.make_autoencoder(config)
            shape = (1, config.data.height, config.data.width, config.data.channels)
            jax.eval_shape(autoencoder.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
            return
        model = config_lib.make_model(config, dataset)
        check_guidance(model.condition, config_lib.guidance(config))

        def start(key: jax.Array) -> Any:
            x, t, cond = model.example()
            out, variables = model.net.init_with_output(key, x, t, cond)
            loss = losses.training_loss(schedule, lambda x_t, t: out, key, x, t=t, **config_lib.loss_options(config))
            return loss, optimizer.update(variables, optimizer.init(variables), variables)

        jax.eval_shape(lambda: start(jax.random.key(0)))
    except (ValueError, TypeError, MemoryError, OverflowError) as error:
        raise UserError(f"config: {first_line(error)}") from None


def _check_pure_noise(config: ConfigDict, schedule: Schedule) -> None:
    if config.diffusion.prediction == "eps" and schedule.alphas_cumprod[-1] == 0:
        raise ValueError(
            "diffusion.prediction 'eps' says nothing at the last timestep, which is pure noise; accepted there: x_0, v"
        )
