"""Checks the fields of diffusers' config files, and refuses unsupported values."""

from collections.abc import Collection, Mapping
from typing import Any

from ddpm_jax.runtime.errors import UserError

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")  # of a component's folder


def refusal(where: str, field: str, value: Any, accepted: Collection[Any]) -> UserError:
    """The error for a field of the file `where` whose value is not supported."""
    return UserError(f"{field} is {value!r} in {where!r}; accepted: {', '.join(map(repr, accepted))}")


def check_accepted(where: str, found: Mapping[str, Any], accepted: Mapping[str, Collection[Any]]) -> None:
    """UserError for the first of the `accepted` fields whose value is not among these."""
    for field, values in accepted.items():
        if found[field] not in values:
            raise refusal(where, field, found[field], values)


def choose(where: str, found: Mapping[str, Any], field: str, ours: Mapping[Any, Any]) -> Any:
    """This project's name for a field's value; UserError if it is not among `ours`."""
    if found[field] not in ours:
        raise refusal(where, field, found[field], ours)
    return ours[found[field]]


def check_counts(where: str, found: Mapping[str, Any], *names: str) -> None:
    """UserError for the first of these fields that is not a positive integer."""
    for name in names:
        if type(found[name]) is not int or found[name] < 1:
            raise UserError(f"{name} is {found[name]!r} in {where!r}; accepted: whole numbers above 0")


def with_defaults(
    where: str, found: Mapping[str, Any], defaults: Mapping[str, Any], ignored: Collection[str] = ()
) -> dict[str, Any]:
    """A component's fields, with missing ones taken from `defaults`.

    Args:
      where: the file.
      found: its fields; those that begin with "_" are metadata.
      defaults: all fields of the component, with diffusers' default values.
      ignored: fields that diffusers ignores in a file of this component.

    Raises:
      UserError: a field that is neither in `defaults` nor ignored.
    """
    fields = {name: value for name, value in found.items() if not name.startswith("_") and name not in ignored}
    for field, value in fields.items():
        if field not in defaults:
            raise UserError(f"{field} is {value!r} in {where!r}, but this project does not support this field")
    return {**defaults, **fields}
