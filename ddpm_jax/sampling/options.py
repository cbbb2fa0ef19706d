"""Turns keywords, as in `Run.sample(num_steps=20, prompts=[...])`, into a `Request`."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ddpm_jax.diffusion.gaussian import Parameterization
from ddpm_jax.diffusion.guidance import Guidance
from ddpm_jax.diffusion.samplers import Steps
from ddpm_jax.diffusion.schedules import Schedule
from ddpm_jax.runtime.errors import UserError, as_user_errors, nearest
from ddpm_jax.sampling import condition as condition_lib
from ddpm_jax.sampling.condition import check_guidance
from ddpm_jax.sampling.generate import Request

_GUIDANCE = tuple(f"guidance_{field.name}" for field in dataclasses.fields(Guidance))
OPTIONS = (
    *(field.name for part in (Steps, Parameterization) for field in dataclasses.fields(part)),
    *sorted(_GUIDANCE),
    *condition_lib.KEYWORDS,
)


def with_options(request: Request, options: Mapping[str, Any], others: Iterable[str] = ()) -> Request:
    """A request with some of its options replaced.

    Args:
      request: the defaults, such as the config's.
      options: by their names in OPTIONS; None keeps the default.
      others: further names to suggest for a misspelt option.

    Raises:
      UserError: an option that does not exist or does not fit.
    """
    for name in options:
        if name not in OPTIONS:
            raise UserError(f"a run has no option {name!r}.{nearest(name, (*OPTIONS, *others))}")
    given = {name: value for name, value in options.items() if value is not None}
    for name in ("guidance_scale", "num_steps"):
        if isinstance(given.get(name), list):
            raise UserError(f"{name} has {len(given[name])} values; accepted for a single run: one")
    condition = request.condition.say(**{name: given[name] for name in condition_lib.KEYWORDS if name in given})
    of_guidance = {name.removeprefix("guidance_"): given[name] for name in _GUIDANCE if name in given}
    guidance = _replaced(request.guidance, of_guidance)
    check_guidance(condition, guidance)
    steps, output = _steps(request.steps, given), _output(request.output, given)
    return dataclasses.replace(request, condition=condition, steps=steps, output=output, guidance=guidance)


def _steps(steps: Steps, given: Mapping[str, Any]) -> Steps:
    """The steps with the given fields; a new sampler or spacing drops the options of the old one."""
    if given.get("sampler", steps.sampler) != steps.sampler:
        steps = dataclasses.replace(steps, eta=None, order=None, skip_lowest=False)
    if given.get("spacing", steps.spacing) != steps.spacing:
        steps = dataclasses.replace(
            steps, spacing_offset=0, skip_lowest=False, levels=None, fractional=False, scaled_start=False
        )
    if "timesteps" in given:
        steps = dataclasses.replace(steps, num_steps=None, levels=None, fractional=False)
    steps = _replaced(steps, given)
    return dataclasses.replace(steps, order=steps.order or None)  # 0 is off, as in a config


def _output(output: Parameterization, given: Mapping[str, Any]) -> Parameterization:
    """The parameterization with the given fields."""
    if "clip" in given:
        output = dataclasses.replace(output, dynamic_threshold=None)
    output = _replaced(output, given)
    return dataclasses.replace(
        output,
        dynamic_threshold=output.dynamic_threshold or None,
        threshold_limit=output.threshold_limit or None,
    )


def _replaced(part: Any, given: Mapping[str, Any]) -> Any:
    """The dataclass with the given fields."""
    return dataclasses.replace(part, **{f.name: given[f.name] for f in dataclasses.fields(part) if f.name in given})


def last_timesteps(steps: Steps, schedule: Schedule, strength: float) -> np.ndarray:
    """The lowest of the timesteps that sampling takes, a share of `strength` of all.

    Raises:
      UserError: a strength that is not above 0 and at most 1, or leaves no timestep; steps that do not fit.
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength is {strength}; accepted: above 0 and at most 1")
    with as_user_errors():
        # The result is timesteps, so noise levels between them are ignored.
        timesteps = dataclasses.replace(steps, levels=None, fractional=False).levels_of(schedule).t[:-1]
    count = int(len(timesteps) * strength)
    if not count:
        raise UserError(f"strength is {strength}, which leaves none of {len(timesteps)} steps")
    return timesteps[-count:]


def deterministic(num_steps: int | None = None, spacing: str | None = None) -> dict[str, Any]:
    """The options of `Run.sample` for deterministic DDIM, between pictures and noises."""
    return {"sampler": "ddim", "eta": 0.0, "clip": False, "num_steps": num_steps, "spacing": spacing}
