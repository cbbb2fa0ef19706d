"""The total cost of a run, from the time of its programs."""

import math
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax.runtime import parallel

_ENOUGH_IMAGES = 50_000  # number of images in reported FIDs


def header(config: ConfigDict, dataset: Mapping[str, Any] | None, chips: int) -> dict[str, Any]:
    """A plan's facts about the run and its network."""
    count = sum(math.prod(p.shape) for p in jax.tree.leaves(config_lib.make_model(config, dataset).param_shapes()))
    data, fsdp = parallel.mesh_shape(chips, **config.mesh)
    return {
        "parameters": count,
        "dtype": config.model.dtype,
        "remat": config.model.remat,
        "batch": config.train.batch_size,
        "steps": config.train.num_steps,
        "chips": chips,
        "mesh": {"data": data, "fsdp": fsdp},
    }


def of_run(config: ConfigDict, result: dict[str, Any]) -> dict[str, Any]:
    """The total cost of the run, and of drawing, decoding and evaluating 50,000 samples, each listed separately."""
    found: dict[str, Any] = {}
    programs, chips = result["programs"], result["chips"]
    if "train" in programs:
        found["train"] = speed(config, programs["train"]["seconds"], config.train.batch_size, chips)
    calls = config_lib.sampling_calls(config, config_lib.make_schedule_from(config))
    for name, times in (("sample", calls), ("decode", 1), ("evaluate", 1)):
        if name in programs:
            images, seconds = programs[name]["images"], times * programs[name]["seconds"]
            hours = -(-_ENOUGH_IMAGES // images) * seconds / 3600
            found[name] = {"images": _ENOUGH_IMAGES, "hours": hours, "chip_hours": hours * chips}
            found[name]["images_per_second_and_chip"] = images / seconds / chips
    return found


def speed(config: ConfigDict, seconds: float, batch: int, chips: int) -> dict[str, float]:
    """The speed and total time of training at `seconds` per step, for as many images as the config's run."""
    steps = config.train.num_steps * config.train.batch_size / batch
    return {
        "step_seconds": seconds,
        "steps_per_second": 1 / seconds,
        "images_per_second": batch / seconds,
        "days": steps * seconds / 86400,
        "chip_hours": steps * seconds / 3600 * chips,
    }
