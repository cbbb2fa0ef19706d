"""Checks a config before anything is compiled."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax.config.limits import check_types, check_values
from ddpm_jax.data import digits
from ddpm_jax.diffusion import losses
from ddpm_jax.diffusion.schedules import BETAS_OF, Schedule
from ddpm_jax.runtime.errors import UserError, first_line
from ddpm_jax.runtime.parallel import mesh_shape
from ddpm_jax.sampling.condition import check_guidance
from ddpm_jax.sampling.generate import Model


def validate(config: ConfigDict, num_devices: int | None = None, dataset: Mapping[str, Any] | None = None) -> None:
    """Raises UserError, with one sentence, for anything in the config that cannot run; compiles nothing.

    With num_devices, also for anything that cannot be trained on that many devices. `dataset` is the workdir's
    description of the training set.
    """
    check_fields(config)
    if num_devices is not None:
        _check_training(config)
        _check_devices(config, num_devices)
    with _as_config_errors():
        _trace(config, dataset)


def make_valid_model(
    config: ConfigDict, dataset: Mapping[str, Any] | None, dtype: str | None = None
) -> tuple[Model, Any]:
    """The model of an existing run and the shapes of its parameters, for a process that does not train.

    Raises UserError like `validate`, but does not check what only training needs, since tracing that takes longer.
    """
    check_fields(config)
    with _as_config_errors():
        _check_schedule_and_sampling(config)
        model = config_lib.make_model(config, dataset, dtype)
        check_guidance(model.condition, config_lib.guidance(config))
        return model, model.param_shapes()


@contextmanager
def _as_config_errors() -> Iterator[None]:
    """Turns errors of the parts that are built from a config into UserErrors."""
    try:
        yield
    except (ValueError, TypeError, MemoryError, OverflowError) as error:
        raise UserError(f"config: {first_line(error)}") from None


def check_fields(config: ConfigDict) -> None:
    """Raises UserError for an invalid field, or for fields that contradict each other; traces nothing."""
    check_types(config)
    check_values(config)
    _check_condition(config)
    if config.autoencoder.source:
        _check_latents(config)
    if config.prior.clip or config.embedding.clip:
        _check_embeddings(config)
    if config.train.objective == "clip":
        _check_clip(config)
    if config.model.masked_picture and not config.autoencoder.source:
        raise UserError(
            "config.model.masked_picture is True, but the run diffuses no latents; accepted: with an autoencoder.source"
        )
    if config.upscale.height or config.upscale.width:
        _check_upscale(config)
    _check_lora(config)
    _check_schedule(config)


def _check_condition(config: ConfigDict) -> None:
    """Checks classes and captions."""
    train = config.train
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


def _check_lora(config: ConfigDict) -> None:
    """Checks LoRA adapters."""
    train = config.train
    if config.lora.rank and (train.objective != "diffusion" or config.text.encoder == config_lib.TRAINED):
        trained = "an encoder of text that is trained along"
        what = {"autoencoder": "an autoencoder", "clip": "a CLIP"}.get(train.objective, trained)
        raise UserError(f"config.lora.rank is {config.lora.rank}; accepted for {what}: 0")
    if config.lora.text_encoder and not (config.lora.rank and config.text.encoder):
        found = f"config.lora.rank is {config.lora.rank} and config.text.encoder {config.text.encoder!r}"
        raise UserError(
            f"config.lora.text_encoder is True, but {found}; accepted: a rank above 0 and the folder of a text encoder"
        )


def _check_schedule(config: ConfigDict) -> None:
    """Checks the betas, and that no number of steps exceeds the timesteps."""
    diffusion = config.diffusion
    for name in () if diffusion.betas else BETAS_OF.get(diffusion.schedule, ()):
        if not 0.0 < diffusion[name] <= 1.0:
            raise UserError(f"config.diffusion.{name} is {diffusion[name]}; accepted: above 0 and at most 1")
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
    """Checks a run that diffuses latents."""
    if config.train.objective == "autoencoder":
        raise UserError(
            f"config.autoencoder.source is {config.autoencoder.source!r} and config.train.objective is 'autoencoder'; "
            "accepted: one of the two"
        )
    for name in ("clip", "dynamic_threshold"):
        if config.diffusion[name]:
            raise UserError(
                f"config.diffusion.{name} is {config.diffusion[name]}, but latents can also lie outside [-1, 1]; "
                f"accepted with an autoencoder.source: {type(config.diffusion[name])(0)}"
            )
    if config.evaluate.every_steps and config.evaluate.likelihood_images:
        raise UserError(
            f"config.evaluate.likelihood_images is {config.evaluate.likelihood_images}, but the likelihood of pictures "
            "cannot be computed for a run of latents; accepted with an autoencoder.source: 0"
        )


def _check_embeddings(config: ConfigDict) -> None:
    """Checks a run that draws embeddings or takes one as an input."""
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
            f"config.prior.mean has {len(config.prior.mean)} values and config.prior.std has {len(config.prior.std)}; "
            "accepted: equally many, with all standard deviations above 0"
        )
    diffusion = config.diffusion
    if config.prior.clip and ((diffusion.clip and diffusion.clip_range == 1) or diffusion.dynamic_threshold):
        raise UserError(
            "config.diffusion.clip or dynamic_threshold is set, but embeddings can also lie outside [-1, 1]; accepted "
            "with prior.clip: clip False or a clip_range above 1, and dynamic_threshold 0.0"
        )
    if config.evaluate.every_steps and (config.prior.clip or config.evaluate.likelihood_images):
        raise UserError(
            f"config.evaluate asks for what a run with {name} does not have; accepted: evaluate.every_steps=0"
            + ("" if config.prior.clip else " or evaluate.likelihood_images=0")
        )


def _check_clip(config: ConfigDict) -> None:
    """Checks a CLIP."""
    text, train = config.text, config.train
    if text.encoder != config_lib.TRAINED:
        raise UserError(
            f"config.text.encoder is {text.encoder!r}, but a CLIP trains its own text encoder; accepted with "
            "train.objective 'clip': 'trained'"
        )
    if not text.num_layers:
        raise UserError(
            "config.text.num_layers is 0, which leaves the state at the end of a text without information about the "
            "text; accepted with train.objective 'clip': 1 or more"
        )
    if train.batch_size < 2:
        raise UserError(
            "config.train.batch_size is 1, but a CLIP learns by telling the pictures of a batch apart; accepted: 2 or "
            "more"
        )
    if train.accumulation > 1:
        raise UserError(
            f"config.train.accumulation is {train.accumulation}, but a CLIP's loss is computed over the whole batch "
            "and is not the mean of the losses of its parts; accepted with train.objective 'clip': 1"
        )
    if config.evaluate.every_steps and not config.evaluate.num_images:
        raise UserError(
            "config.evaluate.num_images is 0, but a CLIP is evaluated on pictures; accepted with evaluate.every_steps "
            "and train.objective 'clip': 2 or more"
        )
    for name, value in (("autoencoder.source", config.autoencoder.source), ("upscale.height", config.upscale.height)):
        if value:
            raise UserError(
                f"config.{name} is {value!r}, but a CLIP is trained on pictures themselves; accepted with "
                f"train.objective 'clip': {type(value)()!r}"
            )


def _check_upscale(config: ConfigDict) -> None:
    """Checks a super-resolution run."""
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
        raise UserError(f"config.upscale is {small}; accepted with an autoencoder, whose latents are not pictures: 0x0")
    if upscale.max_augmentation and upscale.augmentation > upscale.max_augmentation:
        raise UserError(
            f"config.upscale.augmentation is {upscale.augmentation}; accepted: at most upscale.max_augmentation, "
            f"{upscale.max_augmentation}, which the network knows"
        )
    if config.evaluate.every_steps and config.evaluate.likelihood_images:
        raise UserError(
            f"config.evaluate.likelihood_images is {config.evaluate.likelihood_images}, but the likelihood of pictures "
            "cannot be computed for a run that enlarges them; accepted with upscale: 0"
        )


def _check_training(config: ConfigDict) -> None:
    """Checks what only training needs."""
    diffusion, evaluate, data, train = config.diffusion, config.evaluate, config.data, config.train
    if config.model.masked_picture:
        raise UserError(
            "config.model.masked_picture is True, but networks that take a masked picture cannot be trained here; "
            "accepted: False"
        )
    if config.lora.rank and not train.init_from:
        raise UserError(
            f"config.lora.rank is {config.lora.rank}, but adapters need a trained network; give its workdir with "
            "--init_from"
        )
    if config.train.objective == "autoencoder" and evaluate.every_steps:
        raise UserError(
            f"config.evaluate.every_steps is {evaluate.every_steps}, but an autoencoder makes no samples to judge; "
            "accepted with train.objective 'autoencoder': 0"
        )
    if diffusion.loss == "vlb" and diffusion.weighting != "none":
        raise UserError(
            f"config.diffusion.weighting is {diffusion.weighting!r}, which weights the squared error, but loss 'vlb' "
            "has no squared error; accepted with it: none"
        )
    if not (evaluate.every_steps and evaluate.num_images):
        return
    name = evaluate.features
    if name == "digits" and not digits.side_by_side((data.height, data.width, data.channels)):
        raise UserError(
            "config.evaluate.features is 'digits', which judges 8x8x1 images, or several side by side, but these are "
            f"{data.height}x{data.width}x{data.channels}; accepted: inception, or the file of its weights"
        )
    if name not in ("", "digits", "inception") and not Path(name).expanduser().is_file():
        raise UserError(
            f"config.evaluate.features is {name!r}; accepted: digits, inception, or the file of its weights"
        )


def _check_devices(config: ConfigDict, num_devices: int) -> None:
    mesh_shape(num_devices, **config.mesh)
    batch_size, parts = config.train.batch_size, config.train.accumulation
    if batch_size % (num_devices * parts):
        times = f" times the {parts} parts of config.train.accumulation" if parts > 1 else ""
        raise UserError(
            f"config.train.batch_size is {batch_size}; it must be divisible by the {num_devices} devices{times}"
        )


def _check_schedule_and_sampling(config: ConfigDict) -> Schedule:
    """The schedule; ValueError if its last timestep or the sampling steps cannot be used."""
    schedule = config_lib.make_schedule_from(config)
    if config.diffusion.prediction == "eps" and schedule.alphas_cumprod[-1] == 0:
        raise ValueError(
            "diffusion.prediction 'eps' does not determine the image at the last timestep, which is pure noise; "
            "accepted there: x_0, v"
        )
    config_lib.sampling_calls(config, schedule)
    return schedule


def _trace(config: ConfigDict, dataset: Mapping[str, Any] | None) -> None:
    """Traces the first step of training, or only the initialisation of an autoencoder or a CLIP."""
    schedule = _check_schedule_and_sampling(config)
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
        out, _ = model.initialize(key)
        x, t, _ = model.example()
        loss = losses.training_loss(schedule, lambda x_t, t: out, key, x, t=t, **config_lib.loss_options(config))
        # Two arrays stand in for the network's parameters, whose update would take as long to trace as the network.
        params = {"kernel": jnp.zeros((3, 3, 8, 8)), "bias": jnp.zeros(8)}
        return loss, optimizer.update(params, optimizer.init(params), params)

    jax.eval_shape(lambda: start(jax.random.key(0)))
