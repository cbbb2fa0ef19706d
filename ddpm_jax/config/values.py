"""Functions of whole configs: their fields, JSON, and the differences that a resumed run may have."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from ddpm_jax.config.defaults import default_config

# Fields that may change when a run is resumed: they do not affect what is learned.
MAY_CHANGE = (
    "train.num_steps",
    "train.steps_per_dispatch",
    "model.remat",
    "mesh",
    "log",
    "evaluate",
    "checkpoint",
    "sample",
    "data.cache_gib",
    "data.num_workers",
    "data.data_dir",
    "data.path",
)
# Fields that hold options of any name.
FREE_FORM = ("diffusion.schedule_options", "optimizer.options")


def fields(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("section.field", value) of every leaf."""
    for name, value in config.items():
        if isinstance(value, Mapping | ConfigDict) and prefix + name not in FREE_FORM:
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, dict(value) if isinstance(value, Mapping | ConfigDict) else value


def to_json(config: ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote; ValueError for any other text.

    A field that was added after the run had started gets its default, which must not change the run.
    """

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: tuples(item) for name, item in value.items()}
        return tuple(tuples(item) for item in value) if isinstance(value, list) else value

    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    config = default_config()
    with config.ignore_type():
        config.update(tuples(value))
    return config


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """The differences in fields that a resumed run may not change, as "field: old -> new"."""
    old_fields, new_fields = dict(fields(old)), dict(fields(new))
    return [
        f"{name}: {old_fields.get(name)!r} -> {new_fields.get(name)!r}"
        for name in sorted(old_fields.keys() | new_fields.keys())
        if old_fields.get(name) != new_fields.get(name)
        and not any(name == allowed or name.startswith(allowed + ".") for allowed in MAY_CHANGE)
    ]
