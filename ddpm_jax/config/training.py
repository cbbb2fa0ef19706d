"""The training of a config: the optimiser and the options of a step."""

import inspect
from typing import Any

import optax
from ml_collections import ConfigDict

from ddpm_jax.config.diffusion import make_betas_from
from ddpm_jax.runtime.errors import UserError, nearest

_COMMON_OPTIMIZERS = ("adabelief", "adafactor", "adam", "adamax", "adamw", "lamb", "lion", "nadam", "radam", "sgd")


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """Step -> learning rate: linear warm-up from 0, then constant or falling to 0."""
    optimizer = config.optimizer
    steps = optimizer.decay_steps or config.train.num_steps
    rate, remaining = optimizer.learning_rate, max(steps - optimizer.warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(rate),
        "cosine": optax.cosine_decay_schedule(rate, remaining),
        "linear": optax.linear_schedule(rate, 0.0, remaining),
    }[optimizer.decay]
    if not optimizer.warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, rate, optimizer.warmup_steps)
    return optax.join_schedules([warmup, after], [optimizer.warmup_steps])


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Clipping by global norm, then the named optax optimiser."""
    name, options = config.optimizer.name, dict(config.optimizer.options)
    factory: Any = getattr(optax, name, None)
    parameters = list(inspect.signature(factory).parameters) if callable(factory) else []
    if "learning_rate" not in parameters or name.startswith("scale_by"):
        raise UserError(
            f"config.optimizer.name is {name!r}, which is not an optimiser of optax.{nearest(name, _COMMON_OPTIMIZERS)}"
        )
    unknown = [option for option in options if option not in parameters or option == "learning_rate"]
    if unknown:
        raise UserError(
            f"config.optimizer.options has {unknown[0]!r}, which optax.{name} does not take."
            f"{nearest(unknown[0], parameters)}"
        )
    optimizer = factory(learning_rate=learning_rate(config), **options)
    if config.optimizer.grad_clip:
        optimizer = optax.chain(optax.clip_by_global_norm(config.optimizer.grad_clip), optimizer)
    return optimizer


def step_options(config: ConfigDict) -> dict[str, Any]:
    """The keyword arguments of `make_train_step` from the config, except the steps per dispatch."""
    return {"seed": config.seed, "accumulation": config.train.accumulation}


def lora_scale(config: ConfigDict) -> float:
    """The factor of LoRA's adapters."""
    return (config.lora.alpha or config.lora.rank) / config.lora.rank


def history_timesteps(config: ConfigDict) -> int | None:
    """T if training keeps a history of losses by timestep, else None."""
    keeps = config.train.objective == "diffusion" and config.diffusion.timestep_sampler == "importance"
    return len(make_betas_from(config)) if keeps else None
