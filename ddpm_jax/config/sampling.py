"""The sampling of a config."""

import dataclasses

from ml_collections import ConfigDict

from ddpm_jax.config.diffusion import parameterization
from ddpm_jax.diffusion.guidance import Guidance
from ddpm_jax.diffusion.samplers import Steps
from ddpm_jax.diffusion.schedules import Schedule
from ddpm_jax.sampling.condition import Condition
from ddpm_jax.sampling.generate import Request


def sampling_steps(config: ConfigDict) -> Steps:
    """The steps that the run samples by."""
    sample = config.sample
    return Steps(
        sampler=sample.sampler,
        num_steps=sample.num_steps or None,
        spacing=sample.spacing or None,
        spacing_offset=sample.spacing_offset,
        skip_lowest=sample.skip_lowest,
        stop_at_first=sample.stop_at_first,
        eta=sample.eta or None,
        order=sample.order or None,
        levels=sample.levels or None,
        fractional=sample.fractional,
        scaled_start=sample.scaled_start,
    )


def sampling_calls(config: ConfigDict, schedule: Schedule) -> int:
    """How often sampling calls the network; ValueError for sampler options that contradict each other."""
    return len(sampling_steps(config).table(schedule, config.diffusion.variance).t)


def guidance(config: ConfigDict) -> Guidance:
    """The guidance that the run samples with."""
    return Guidance(*(config.sample[f"guidance_{name}"] for name in ("scale", "rescale", "interval")))


def sampling_request(config: ConfigDict, condition: Condition) -> Request:
    """How the run samples by default."""
    candidates = config.prior.candidates if config.prior.clip else 1
    return Request(condition, sampling_steps(config), parameterization(config), guidance(config), candidates=candidates)


def evaluation_request(config: ConfigDict, condition: Condition) -> Request:
    """How the evaluation during training samples."""
    evaluate, stop = config.evaluate, config.sample.stop_at_first
    steps = Steps(evaluate.sampler, evaluate.num_steps, stop_at_first=stop)
    return dataclasses.replace(sampling_request(config, condition), steps=steps)
