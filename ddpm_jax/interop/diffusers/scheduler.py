"""Converts diffusers' schedulers to a run's diffusion and sampling settings, and back.

A scheduler defines three things: the noise schedule, what the network predicts, and how images are sampled. The first
two are converted exactly. For the third, the closest of this project's samplers becomes the run's default; a note says
where it is a different method or deviates from a field's setting.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax.diffusion.tables import DEFAULT_SPACING
from ddpm_jax.interop.diffusers.fields import check_accepted, choose, refusal, with_defaults
from ddpm_jax.runtime.errors import UserError

_PREDICTIONS = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
_VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned",
}
_SCHEDULES = {"linear": "linear", "scaled_linear": "quadratic", "squaredcos_cap_v2": "cosine"}
_SPACINGS = {"linspace": "linspace", "leading": "leading", "trailing": "trailing"}
_UNBOUNDED = 1e9  # replaces diffusers' upper bound of a dynamic threshold, since the paper has none

# All fields of each scheduler, with diffusers' defaults for those missing from a file.
_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
}
_SNR: dict[str, Any] = {"rescale_betas_zero_snr": False}
_THRESHOLD: dict[str, Any] = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_CLIP: dict[str, Any] = {"clip_sample": True, "clip_sample_range": 1.0, **_THRESHOLD}
_SIGMAS: dict[str, Any] = {
    "timestep_spacing": "linspace",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "final_sigmas_type": "zero",
}
_FLOW: dict[str, Any] = {
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}
_RANGE: dict[str, Any] = {"sigma_min": None, "sigma_max": None}
_SOLVER: dict[str, Any] = {**_SCHEDULE, **_SNR, **_THRESHOLD, **_SIGMAS, **_FLOW}
_SOLVER |= {"solver_order": 2, "lower_order_final": True}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {**_SCHEDULE, **_SNR, **_CLIP, "variance_type": "fixed_small"},
    "DDIMScheduler": {**_SCHEDULE, **_SNR, **_CLIP, "set_alpha_to_one": True},
    "PNDMScheduler": {**_SCHEDULE, "skip_prk_steps": False, "set_alpha_to_one": False},
    "DPMSolverMultistepScheduler": {
        **_SOLVER,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
    },
    "UniPCMultistepScheduler": {
        **_SOLVER,
        **_RANGE,
        "predict_x0": True,
        "solver_type": "bh2",
        "disable_corrector": (),
        "solver_p": None,
        "shift_terminal": None,
    },
    "EulerDiscreteScheduler": {
        **_SCHEDULE,
        **_SNR,
        **_SIGMAS,
        **_RANGE,
        "interpolation_type": "linear",
        "timestep_type": "discrete",
    },
    "EulerAncestralDiscreteScheduler": {**_SCHEDULE, **_SNR, "timestep_spacing": "linspace"},
    "UnCLIPScheduler": {
        "num_train_timesteps": 1000,
        "variance_type": "fixed_small_log",
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "prediction_type": "epsilon",
        "beta_schedule": "squaredcos_cap_v2",
    },
    "HeunDiscreteScheduler": {
        **_SCHEDULE,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "timestep_spacing": "linspace",
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "clip_sample": False,
        "clip_sample_range": 1.0,
    },
}
# The samplers for the schedulers that sample x / a at exact noise levels, with fractional timesteps.
_SIGMA_KINDS = {
    "EulerDiscreteScheduler": "ddim",
    "EulerAncestralDiscreteScheduler": "ddpm",
    "HeunDiscreteScheduler": "heun",
}
_LEVELS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "logsnr", "use_lu_lambdas": "logsnr"}
# Fields of former releases, without effect in diffusers as well.
_FORMER: dict[str, tuple[Any, ...]] = {"tensor_format": (None, "pt", "np"), "timestep_values": (None,)}
# diffusers ignores another scheduler's fields, which converted files still have.
_ANY = {field for defaults in _DEFAULTS.values() for field in defaults}
# If a scheduler has one of these fields, only these values are supported.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "use_beta_sigmas": (False,),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "shift_terminal": (None,),
    "solver_p": (None,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "final_sigmas_type": ("zero", "sigma_min"),
}
# For UnCLIPScheduler, which has no such field. For 138 of the 999 possible numbers of steps, none of them Karlo's, a
# timestep falls exactly halfway between two integers, so rounding errors may send it one way in diffusers and the
# other way here.
_LINSPACE = {"timestep_spacing": "linspace"}
# `UnCLIPScheduler`'s values for fields that have more values in other schedulers.
_UNCLIP: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("squaredcos_cap_v2",),
    "prediction_type": ("epsilon", "sample"),
    "variance_type": ("fixed_small_log", "learned_range"),
}
_PIPELINE_STEPS = 50  # the default of diffusers' DDIM and PNDM pipelines
_SOLVER_STEPS = 20


# From diffusers.


def read(config: ConfigDict, found: Mapping[str, Any], where: str) -> list[str]:
    """Sets the fields of a run's config from a scheduler's config.

    Args:
      config: of a run.
      found: the fields of the file.
      where: its name.

    Returns:
      Sentences about differences from diffusers in sampling.

    Raises:
      UserError: a value without a counterpart here, with the name of its field.
    """
    kind = found.get("_class_name", "DDPMScheduler")
    if kind not in _DEFAULTS:
        raise refusal(where, "_class_name", kind, _DEFAULTS)
    check_accepted(where, {"tensor_format": None, "timestep_values": None, **found}, _FORMER)
    ignored = {*_FORMER, *_ANY} - _DEFAULTS[kind].keys()
    fields = with_defaults(where, found, _DEFAULTS[kind], ignored)
    check_accepted(where, fields, {field: values for field, values in _ACCEPTED.items() if field in fields})
    if kind == "UnCLIPScheduler":
        check_accepted(where, fields, _UNCLIP)
    _read_schedule(config.diffusion, fields, where)
    _read_clipping(config.diffusion, fields, where)
    config.diffusion.prediction = choose(where, fields, "prediction_type", _PREDICTIONS)
    if kind == "DPMSolverMultistepScheduler" and fields["variance_type"] is None:
        fields["variance_type"] = "fixed_small"  # the solver has none, and this is DDPMScheduler's default
    config.diffusion.variance = choose(where, {"variance_type": "fixed_small", **fields}, "variance_type", _VARIANCES)
    if config.diffusion.variance == "learned":
        config.diffusion.loss = "hybrid"
    return _read_sampling(config, kind, fields, where)


def _read_schedule(diffusion: ConfigDict, fields: Mapping[str, Any], where: str) -> None:
    T, betas = fields["num_train_timesteps"], fields.get("trained_betas")
    start, end = (float(fields.get(name, _SCHEDULE[name])) for name in ("beta_start", "beta_end"))
    if betas is not None:
        if not betas or len(betas) != T:
            raise UserError(
                f"trained_betas has {len(betas)} values in {where!r}; accepted: num_train_timesteps of them"
            )
        diffusion.betas = tuple(map(float, betas))
    elif fields["beta_schedule"] == "sigmoid":  # of the betas themselves, whereas ours is of abar
        logistic = 1 / (1 + np.exp(-np.linspace(-6, 6, T)))
        diffusion.betas = tuple((logistic * (end - start) + start).tolist())
    else:
        diffusion.schedule = choose(where, fields, "beta_schedule", _SCHEDULES)
        diffusion.update(num_timesteps=T, beta_start=start, beta_end=end)
    diffusion.zero_terminal_snr = fields.get("rescale_betas_zero_snr", False)


def _read_clipping(diffusion: ConfigDict, fields: Mapping[str, Any], where: str) -> None:
    diffusion.clip = fields.get("clip_sample", False)
    if fields.get("thresholding", False):
        bound, ratio = fields["sample_max_value"], float(fields["dynamic_thresholding_ratio"])
        if bound == 1.0:  # the threshold lies between 1 and this bound
            diffusion.clip = True
        elif not bound > 1.0:
            raise refusal(where, "sample_max_value", bound, ("1 or more",))
        elif not ratio:
            raise refusal(where, "dynamic_thresholding_ratio", ratio, ("above 0, at most 1",))
        else:
            diffusion.update(dynamic_threshold=ratio, threshold_limit=0.0 if bound >= _UNBOUNDED else float(bound))
    elif diffusion.clip:
        bound = fields["clip_sample_range"]
        if not isinstance(bound, int | float) or not bound > 0:
            raise UserError(f"clip_sample_range is {bound!r} in {where!r}; accepted: a number above 0")
        diffusion.clip_range = float(bound)


def _read_sampling(config: ConfigDict, kind: str, fields: Mapping[str, Any], where: str) -> list[str]:
    """Sets the run's default sampler; returns the notes about it."""
    sample, diffusion, notes = config.sample, config.diffusion, []
    T = len(diffusion.betas) or diffusion.num_timesteps
    spacing, offset = (
        choose(where, {**_LINSPACE, **fields}, "timestep_spacing", _SPACINGS),
        fields.get("steps_offset", 0),
    )
    stops = fields.get("set_alpha_to_one") is False or fields.get("final_sigmas_type") == "sigma_min"
    if kind in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        sample.skip_lowest = spacing != "trailing"
        sample.num_steps = min(_SOLVER_STEPS, T)
        notes += _read_dpm(config, fields, where) if kind.startswith("DPM") else _read_unipc(sample, fields)
        if stops and fields["lower_order_final"] and sample.sampler not in ("ddim", "ddpm"):
            notes.append(
                "final_sigmas_type 'sigma_min': the last steps keep their order here, while diffusers lowers it in "
                "UniPC and with fewer than 15 steps"
            )
    elif kind in ("DDPMScheduler", "UnCLIPScheduler"):
        sample.sampler = "ddpm"
        if spacing == "trailing" or (spacing == "leading" and offset):
            notes.append("the last step adds no noise here, while diffusers adds some if it ends above timestep 0")
    else:
        sample.num_steps = min(_PIPELINE_STEPS, T)
        notes += _read_one_step(config, kind, fields)
    for field in _LEVELS.keys() & {field for field, value in fields.items() if value}:
        sample.levels, sample.skip_lowest = _LEVELS[field], False
        if kind not in _SIGMA_KINDS:  # over all timesteps, whatever the spacing
            spacing = "linspace"
            if field == "use_exponential_sigmas" or (
                fields["beta_schedule"] == "squaredcos_cap_v2" and kind.startswith("DPM")
            ):
                notes.append(
                    f"{field}: the network is called at the nearest timestep here; in diffusers at the one below"
                )
    if kind in ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler") and spacing == "linspace":
        notes.append(
            "timestep_spacing 'linspace': here each step leads to the next timestep; in diffusers it goes down by "
            "num_train_timesteps // num_inference_steps"
        )
    if kind in ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler") and spacing == "trailing":
        notes.append(
            "timestep_spacing 'trailing': here each step leads to the next timestep; in diffusers it leads to a "
            "neighbouring one if the number of steps does not divide num_train_timesteps"
        )
    if diffusion.zero_terminal_snr and not sample.levels and kind not in ("DDPMScheduler", "DDIMScheduler"):
        notes.append("rescale_betas_zero_snr: the last timestep is pure noise here; in diffusers it has abar = 2^-24")
    sample.spacing = "" if spacing == DEFAULT_SPACING[sample.sampler] and not sample.skip_lowest else spacing
    sample.spacing_offset = offset if spacing == "leading" else 0
    sample.stop_at_first = stops
    config.log.sample_steps = min(config.log.sample_steps, T)
    return [f"{kind}: {note}" for note in notes]


def _read_one_step(config: ConfigDict, kind: str, fields: Mapping[str, Any]) -> list[str]:
    """DDIM, PNDM, and the schedulers of x / a: Euler's step is DDIM's, and its ancestral step is DDPM's."""
    sample, diffusion = config.sample, config.diffusion
    sample.sampler = _SIGMA_KINDS.get(kind, "ddim")
    if kind in _SIGMA_KINDS:
        sample.levels = "linspace" if fields["timestep_spacing"] == "linspace" else ""
        sample.fractional = bool(sample.levels) or any(fields.get(field, False) for field in _LEVELS)
        sample.scaled_start = fields["timestep_spacing"] != "leading"
        if fields.get("final_sigmas_type") == "sigma_min":
            return ["final_sigmas_type 'sigma_min': the result is x here; in diffusers it is x / a"]
    elif kind == "PNDMScheduler" and fields["skip_prk_steps"]:
        sample.sampler = "plms"
    elif kind == "PNDMScheduler":
        return [
            "skip_prk_steps False, which starts with Runge-Kutta steps, is not supported; the run uses ddim, of first "
            "order, with the same timesteps and the same end"
        ]
    elif diffusion.clip or diffusion.dynamic_threshold:
        return ["eps is computed from the clipped x_0, like diffusers' use_clipped_model_output"]
    return []


def _read_dpm(config: ConfigDict, fields: Mapping[str, Any], where: str) -> list[str]:
    sample, algorithm, order, notes = config.sample, fields["algorithm_type"], fields["solver_order"], []
    stochastic = choose(
        where,
        fields,
        "algorithm_type",
        {"dpmsolver++": False, "sde-dpmsolver++": True, "dpmsolver": False, "sde-dpmsolver": True},
    )
    own_variance = stochastic and (algorithm == "sde-dpmsolver" or config.diffusion.variance == "learned")
    if order == 1 and not own_variance:  # the first-order step is the same whichever is integrated
        sample.sampler = "ddpm" if stochastic else "ddim"
    else:
        sample.sampler = "dpmpp_2m_sde" if stochastic else "dpmpp_2m"
        for field, accepted in (
            ("algorithm_type", ("dpmsolver++", "sde-dpmsolver++")),
            ("solver_order", (2,)),
            ("solver_type", ("midpoint",)),
        ):
            if fields[field] not in accepted:
                name = f"{field} {fields[field]!r}"
                notes.append(f"{name} is not supported; the run uses {sample.sampler}")
    if math.isfinite(float(fields["lambda_min_clipped"])):
        notes.append(
            f"lambda_min_clipped {fields['lambda_min_clipped']}: ignored, sampling starts at the last timestep"
        )
    return notes


def _read_unipc(sample: ConfigDict, fields: Mapping[str, Any]) -> list[str]:
    order = min(fields["solver_order"], 3)
    sample.sampler, sample.order, notes = "unipc", 0 if order == 2 else order, []
    for field, value in (
        ("solver_order", order),
        ("solver_type", "bh2"),
        ("predict_x0", True),
        ("disable_corrector", ()),
        ("lower_order_final", True),
    ):
        given = tuple(fields[field]) if field == "disable_corrector" else fields[field]
        if given != value:
            notes.append(f"{field} {given!r} is not supported; the run's unipc uses {value!r}")
    return notes


# To diffusers.

# The scheduler of each sampler, and its order.
_KINDS: dict[str, tuple[str, int | None]] = {
    "ddpm": ("DDPMScheduler", None),
    "ddim": ("DDIMScheduler", None),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", 2),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", 2),
    "heun": ("HeunDiscreteScheduler", None),
    "unipc": ("UniPCMultistepScheduler", 2),
    "plms": ("PNDMScheduler", None),
}
_SMALL = ("ddpm", "fixed_small")  # equals the stochastic solver's first order, and Euler's ancestral step


def _kind_of(config: ConfigDict, notes: list[str]) -> tuple[str, int | None]:
    """The class of the scheduler and its order."""
    sample, diffusion = config.sample, config.diffusion
    kind, order = _KINDS.get(sample.sampler, ("DDPMScheduler", None))
    one_step = sample.sampler == "ddim" or (sample.sampler, diffusion.variance) == _SMALL
    if one_step and sample.skip_lowest:
        kind, order = "DPMSolverMultistepScheduler", 1  # the same step, with a solver's timesteps
    elif one_step and (sample.fractional or sample.scaled_start):
        kind = "EulerDiscreteScheduler" if sample.sampler == "ddim" else "EulerAncestralDiscreteScheduler"
    if sample.sampler not in _KINDS:
        notes.append(f"sampler {sample.sampler!r} has no counterpart with these options; DDPMScheduler is written")
    lacking = {
        "a learned variance": diffusion.variance == "learned" and kind != "DDPMScheduler" and kind[:3] != "DPM",
        "prediction of x_0": diffusion.prediction == "x_0" and (kind == "PNDMScheduler" or kind.startswith("Euler")),
        "pure noise at the last timestep": diffusion.zero_terminal_snr and not _SNR.keys() <= _DEFAULTS[kind].keys(),
    }
    if any(lacking.values()):
        what = " and ".join(what for what, applies in lacking.items() if applies)
        notes.append(f"{kind} does not support {what}; DDPMScheduler is written")
        kind = "DDPMScheduler"
    return kind, order


def to_fields(config: ConfigDict) -> tuple[dict[str, Any], list[str]]:
    """The config of the scheduler that samples like the run's default.

    Returns:
      The fields, and sentences about differences in diffusers.
    """
    sample, diffusion = config.sample, config.diffusion
    notes: list[str] = []
    kind, order = _kind_of(config, notes)
    learned, is_solver = diffusion.variance == "learned", "Multistep" in kind
    fields: dict[str, Any] = {
        "num_train_timesteps": len(diffusion.betas) or diffusion.num_timesteps,
        "prediction_type": {ours: theirs for theirs, ours in _PREDICTIONS.items()}[diffusion.prediction],
        "steps_offset": sample.spacing_offset,
        **_clipping(diffusion, is_solver),
        **_schedule(config),
        **_spacing(config, kind, notes),
    }
    if kind == "DDPMScheduler":
        fields["variance_type"] = {ours: theirs for theirs, ours in reversed(_VARIANCES.items())}[diffusion.variance]
    if sample.skip_lowest and not is_solver:
        notes.append(f"{kind} does not leave out the lowest timestep, unlike skip_lowest")
    if sample.eta and sample.sampler == "ddim":
        notes.append(
            f"eta {sample.eta} is an argument of {kind}'s steps" if kind == "DDIMScheduler" else f"{kind} has no eta"
        )
    if "set_alpha_to_one" in _DEFAULTS[kind]:
        fields["set_alpha_to_one"] = not sample.stop_at_first
    elif "final_sigmas_type" in _DEFAULTS[kind]:
        fields["final_sigmas_type"] = "sigma_min" if sample.stop_at_first else "zero"
        if sample.stop_at_first and kind in _SIGMA_KINDS:
            notes.append("final_sigmas_type 'sigma_min': the result is x / a in diffusers; here it is x")
    elif sample.stop_at_first:
        notes.append(f"{kind} ends at the clean image, this run at the first timestep's noise level")
    if kind.startswith("DPM"):
        fields["algorithm_type"] = "sde-dpmsolver++" if sample.sampler in ("dpmpp_2m_sde", "ddpm") else "dpmsolver++"
        fields |= {"solver_order": order, "variance_type": "learned_range" if learned else None}
    elif kind.startswith("UniPC"):
        fields["solver_order"] = sample.order or order
    elif kind == "PNDMScheduler":
        fields["skip_prk_steps"] = True
    if diffusion.dynamic_threshold and not _THRESHOLD.keys() <= _DEFAULTS[kind].keys():
        notes.append(f"{kind} has no dynamic threshold, unlike this run")
    elif diffusion.clip and not {"clip_sample", "thresholding"} & _DEFAULTS[kind].keys():
        notes.append(f"{kind} does not clip the predicted x_0, unlike this run")
    elif diffusion.clip and diffusion.clip_range != 1 and is_solver:
        notes.append(f"{kind} does not clip the predicted x_0 to {diffusion.clip_range}, unlike this run")
    known = {name: value for name, value in fields.items() if name in _DEFAULTS[kind]}
    return {"_class_name": kind, **known}, notes


def to_unclip_fields(config: ConfigDict) -> dict[str, Any]:
    """The config of the `UnCLIPScheduler` that samples like the run, which diffusers' unCLIP pipelines need.

    Raises:
      UserError: an option of the run that the scheduler does not support; it is named.
    """
    diffusion = config.diffusion
    variances = {ours: theirs for theirs, ours in _VARIANCES.items() if theirs in _UNCLIP["variance_type"]}
    predictions = {ours: theirs for theirs, ours in _PREDICTIONS.items() if theirs in _UNCLIP["prediction_type"]}
    for part, field, accepted in (
        ("diffusion", "betas", ((),)),
        ("diffusion", "schedule", ("cosine",)),
        ("diffusion", "schedule_options", ({},)),
        ("diffusion", "zero_terminal_snr", (False,)),
        ("diffusion", "prediction", predictions),
        ("diffusion", "variance", variances),
        ("diffusion", "dynamic_threshold", (0.0,)),
        ("sample", "sampler", ("ddpm",)),
        ("sample", "spacing", ("", "linspace")),
        ("sample", "levels", ("",)),
        ("sample", "skip_lowest", (False,)),
        ("sample", "stop_at_first", (False,)),
        ("sample", "scaled_start", (False,)),
    ):
        value = config[part][field]
        value = value.to_dict() if isinstance(value, ConfigDict) else value
        if value not in accepted:
            raise UserError(
                f"config.{part}.{field} is {value!r}; accepted by diffusers' UnCLIPScheduler: "
                f"{' or '.join(map(repr, accepted))}"
            )
    return {
        "_class_name": "UnCLIPScheduler",
        "num_train_timesteps": diffusion.num_timesteps,
        "variance_type": variances[diffusion.variance],
        "clip_sample": diffusion.clip,
        "clip_sample_range": diffusion.clip_range,
        "prediction_type": predictions[diffusion.prediction],
        "beta_schedule": "squaredcos_cap_v2",
    }


def _spacing(config: ConfigDict, kind: str, notes: list[str]) -> dict[str, Any]:
    """The fields of the timesteps and the noise levels."""
    sample, defaults = config.sample, _DEFAULTS[kind]
    spacing, is_solver = sample.spacing or DEFAULT_SPACING[sample.sampler], "Multistep" in kind
    fields: dict[str, Any] = {"timestep_spacing": spacing if spacing in _SPACINGS else "linspace"}
    exponential = "use_lu_lambdas" if kind.startswith("DPM") else "use_exponential_sigmas"
    by_level = {"karras": "use_karras_sigmas", "logsnr": exponential}
    if is_solver and spacing in by_level and not sample.levels:
        fields[by_level[spacing]] = True
        notes.append(f"{kind} uses the noise levels of spacing {spacing!r} even between timesteps")
    elif spacing not in _SPACINGS:
        notes.append(f"{kind} has no spacing {spacing!r}; linspace is written")
    elif is_solver and spacing != "trailing" and not sample.skip_lowest and not sample.levels:
        notes.append(f"{kind} takes num_steps + 1 timesteps and leaves out the lowest")
    field = by_level.get(sample.levels)
    between = bool(sample.levels)
    if field in defaults:
        fields[field] = True
        if kind.startswith("UniPC") and sample.levels == "logsnr":
            notes.append(f"{field}: {kind} calls the network at the timestep below, this run at the nearest")
    elif between and (sample.levels, fields["timestep_spacing"], kind in _SIGMA_KINDS) != (
        "linspace",
        "linspace",
        True,
    ):
        notes.append(f"{kind} does not support the noise levels {sample.levels!r}; those of its timesteps are written")
        between = False
    if kind in _SIGMA_KINDS:
        starts_scaled = fields["timestep_spacing"] != "leading"
        if starts_scaled != sample.scaled_start:
            notes.append(f"{kind} starts from noise of {'the first level' if starts_scaled else 'variance 1'}")
        if not sample.fractional and (between or fields["timestep_spacing"] == "linspace"):
            notes.append(f"{kind} calls the network at fractional timesteps")
    elif sample.scaled_start or sample.fractional:
        notes.append(f"{kind} starts from noise of variance 1 and calls the network at whole timesteps")
    return fields


def _clipping(diffusion: ConfigDict, is_solver: bool) -> dict[str, Any]:
    if diffusion.dynamic_threshold:
        ratio = {
            "dynamic_thresholding_ratio": diffusion.dynamic_threshold,
            "sample_max_value": diffusion.threshold_limit or _UNBOUNDED,
        }
        clipping = {"thresholding": True, **ratio}
    elif is_solver:  # a threshold of at most 1 is a clip to 1
        return {"thresholding": diffusion.clip and diffusion.clip_range == 1, "sample_max_value": 1.0}
    else:
        clipping = {}
    if is_solver:
        return clipping
    return {"clip_sample": diffusion.clip, "clip_sample_range": diffusion.clip_range, **clipping}


def _schedule(config: ConfigDict) -> dict[str, Any]:
    """The noise schedule, by name if diffusers has it, else by its betas."""
    diffusion = config.diffusion
    names: Mapping[str, str] = {ours: theirs for theirs, ours in _SCHEDULES.items()}
    flag = {"rescale_betas_zero_snr": diffusion.zero_terminal_snr}
    if diffusion.schedule in names and not diffusion.betas and not diffusion.schedule_options:
        ends = {"beta_start": diffusion.beta_start, "beta_end": diffusion.beta_end}
        return {"beta_schedule": names[diffusion.schedule], **ends, **flag}
    plain = config.copy_and_resolve_references()
    plain.diffusion.zero_terminal_snr = False
    betas: Sequence[float] = config_lib.make_betas_from(plain).tolist()
    return {"trained_betas": betas, **flag}
