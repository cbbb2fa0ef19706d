"""The modes of the command line: functions of `ddpm_jax.commands`, whose parameters are the flags of these names."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from ddpm_jax.commands import (
    closing,
    compose,
    cores,
    doctor,
    editing,
    evaluation,
    plan,
    prepare,
    sampling,
    serve,
    train,
    weights,
)
from ddpm_jax.commands.job import Job, parse_loras, parse_numbers, read_lines
from ddpm_jax.pipeline import load
from ddpm_jax.runtime import workdir
from ddpm_jax.runtime.errors import UserError

FLAGS = flags.FLAGS
Function = Callable[..., Any]

# The options of `Run.sample` whose flags have their names; for the others see `job.FLAG_OF`.
_OPTIONS = (
    *("sampler", "num_steps", "spacing", "eta", "clip", "dynamic_threshold", "order"),
    *("guidance_scale", "guidance_rescale"),
)
# The flags of a job: which weights, how to sample with them, and where to write.
_OF_SAMPLING = {
    *("seed", "height", "width", "classes", "prompt", "prompts", "negative_prompt", "guidance_interval", "timesteps"),
    *_OPTIONS,
}
_OF_A_JOB = {"step", "ema_decay", "raw", "dtype", "lora", "out", *_OF_SAMPLING}
# Flags that a file's name shows elsewhere, or that do not change the pictures.
_NOT_IN_NAMES = {"step", "seed", "out", "output", "batch_size", "images", "shard_size", "part"}

# The functions of each mode, and the words that a message adds to the mode's name for each.
FUNCTIONS: dict[str, dict[str, Function]] = {
    "train": {"": train.train},
    "sample": {"": sampling.sample, " --images": sampling.sample_shards},
    "interpolate": {
        "": editing.interpolate,
        " --latents": editing.interpolate_latents,
        " without --input": editing.interpolate_words,
    },
    "vary": {"": editing.vary},
    "denoise": {"": editing.denoise},
    "upscale": {"": editing.upscale},
    "variations": {"": editing.variations},
    "blend": {"": editing.blend},
    "text_difference": {"": editing.text_difference},
    "inpaint": {"": editing.inpaint},
    "progressive": {"": sampling.progressive},
    "coarse_to_fine": {"": editing.coarse_to_fine},
    "neighbours": {"": sampling.neighbours},
    "evaluate": {
        "": evaluation.evaluate,
        " of two sets of images": evaluation.compare_paths,
        " of a CLIP": evaluation.evaluate_clip,
    },
    "prepare": {"": prepare.prepare},
    "compose": {"": compose.compose},
    "report": {"": train.report},
    "import": {"": weights.import_weights},
    "export": {
        "": weights.export_weights,
        " of an autoencoder": weights.export_autoencoder,
        " of a CLIP": weights.export_clip,
    },
    "doctor": {"": doctor.doctor},
    "plan": {"": plan.plan},
    "serve": {"": serve.serve},
}
_CHOOSE = {"interpolate": {"latents"}}  # flags that only choose among the functions of a mode
_FROM_PICTURES = (
    *(editing.interpolate, editing.vary, editing.denoise, editing.inpaint, editing.coarse_to_fine),
    *(editing.upscale, editing.variations, editing.blend, editing.text_difference),
)
# The flags of a job that a function does not use.
_WITHOUT: dict[Function, set[str]] = {
    **{edit: {"timesteps"} for edit in _FROM_PICTURES},
    editing.interpolate_latents: _OF_SAMPLING - {"height", "width", "num_steps", "spacing"},
    evaluation.evaluate: {"out"},
    weights.export_weights: {"dtype", *_OF_SAMPLING},
    serve.serve: {"out", *_OF_SAMPLING} - {"height", "width"},
}


def run(mode: str) -> None:
    """Calls the function of the mode with its flags; UserError for a flag that would do nothing."""
    function, given = chosen(mode)
    told = {name: _as_text(name) for name in sorted(given.keys() - _NOT_IN_NAMES)}
    parameters = inspect.signature(function).parameters
    arguments = {name: _job(told) if name == "job" else _value(name) for name in parameters}
    result = function(**arguments)
    weights_used = arguments["job"].run.weights if "job" in arguments else ""
    closing.tell(mode, _value("workdir"), result, given | {"config": _config_flags()}, weights_used)


def chosen(mode: str) -> tuple[Function, dict[str, Any]]:
    """The function of the mode that the flags ask for, and those of its flags that are given, by name; UserError for
    a flag that would do nothing."""
    variant = _variant(mode)
    function = FUNCTIONS[mode][variant]
    accepted = flags_of(function) | _CHOOSE.get(mode, set())
    known = set().union(*(flags_of_mode(other) for other in FUNCTIONS))
    for name in sorted(known - accepted):
        if FLAGS[name].present:
            raise UserError(f"--{name} does nothing with --mode={mode}{variant}")
    return function, {name: _value(name) for name in sorted(accepted) if FLAGS[name].present}


def flags_of(function: Function) -> set[str]:
    """The names of the flags that a function of FUNCTIONS takes, except --workdir."""
    names = set(inspect.signature(function).parameters)
    return (names | (_OF_A_JOB if "job" in names else set())) - {"job", "workdir"} - _WITHOUT.get(function, set())


def flags_of_mode(mode: str) -> set[str]:
    """The names of the flags that any of the mode's functions takes, except --workdir."""
    return _CHOOSE.get(mode, set()).union(*(flags_of(function) for function in FUNCTIONS[mode].values()))


def _variant(mode: str) -> str:
    """Which of the mode's functions the flags and the run in the workdir call for."""
    if mode == "sample":
        return "" if _value("images") is None else " --images"
    if mode == "interpolate" and _value("latents"):
        return " --latents"
    if mode == "interpolate" and not _value("input"):
        return " without --input" if any(_value(name) for name in ("prompt", "prompts", "classes")) else ""
    is_run = (Path(_value("workdir")).expanduser() / workdir.CONFIG).exists()
    if mode == "evaluate" and FLAGS["against"].present and FLAGS["generated"].present and not is_run:
        return " of two sets of images"
    if mode in ("evaluate", "export"):
        objective = workdir.read_config(_value("workdir")).train.objective
        found = {"autoencoder": " of an autoencoder", "clip": " of a CLIP"}.get(objective, "")
        return found if found in FUNCTIONS[mode] else ""
    return ""


def _value(name: str) -> Any:
    return FLAGS[name].value


def _config_flags() -> list[str]:
    """--config and the fields that were set, as flags."""
    flag = FLAGS["config"]
    if flag.value is None:
        return []
    fields = config_flags.get_override_values(flag)
    file = config_flags.get_config_filename(flag)
    return [f"--config={file}", *(f"--config.{name}={value}" for name, value in fields.items())]


def _as_text(name: str) -> str:
    value = _value(name)
    if not isinstance(value, list):
        return str(value)
    separator = "\n" if name in ("prompt", "negative_prompt") else ","  # a prompt may have commas
    return separator.join(map(str, value))


def _job(told: dict[str, str]) -> Job:
    """The job that the flags describe; `told` as in `Job`."""
    value = {name: _value(name) for name in ("workdir", "prompt", "prompts", "negative_prompt", *_OF_A_JOB)}
    options: dict[str, Any] = {name: value[name] for name in _OPTIONS if value[name] is not None}
    for option, name in (("timesteps", "timesteps"), ("guidance_interval", "guidance_interval"), ("labels", "classes")):
        if value[name]:
            options[option] = parse_numbers(name, value[name])
    prompts = [*value["prompt"], *(read_lines("prompts", value["prompts"]) if value["prompts"] else ())]
    options |= {"prompts": prompts} if prompts else {}
    options |= {"negative_prompts": value["negative_prompt"]} if value["negative_prompt"] else {}
    which = {name: value[name] for name in ("step", "ema_decay", "raw", "dtype")}
    cores.use(workdir.read_config(value["workdir"]))
    opened = load(value["workdir"], **which, loras=parse_loras(value["lora"])).at(value["height"], value["width"])
    return Job(opened, Path(value["workdir"]).expanduser(), value["seed"], value["out"], options, told)
