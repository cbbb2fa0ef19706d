"""Low-rank adaptation (LoRA: Hu et al. 2021, arXiv:2106.09685): small factors that change the kernels of a network.

An adapted kernel is W + scale * down @ up, with down [C, r] and up [r, D]. The networks are unaware of it: they receive
the merged kernels. Adapters are a tree like the network's parameters, with {"down", "up"} in place of each adapted
kernel, so averages, optimisers, checkpoints and shardings treat them like any parameters.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

# Attention's projections, the ones that diffusers' training scripts adapt.
_PROJECTIONS = ("query", "key", "value", "out")


def init(params: Any, rank: int, key: jax.Array) -> dict[str, Any]:
    """Initial adapters of all attention projections, which change nothing: `up` is zero, `down` normal with a standard
    deviation of 1 / rank.

    Args:
      params: of the network, or their shapes.
      rank: r.
      key: typed key.

    Raises:
      ValueError: a network without attention.
    """
    adapters: dict[tuple[str, ...], jax.Array] = {}
    for number, (path, kernel) in enumerate(sorted(flatten_dict(params).items())):
        if _is_adapted(path):
            inputs, outputs = kernel.shape
            down = jax.random.normal(jax.random.fold_in(key, number), (inputs, rank)) / rank
            adapters |= {(*path[:-1], "down"): down, (*path[:-1], "up"): jnp.zeros((rank, outputs))}
    if not adapters:
        raise ValueError("lora.rank needs a network with attention, but this one has none")
    tree: dict[str, Any] = unflatten_dict(adapters)
    return tree


def _is_adapted(path: tuple[str, ...]) -> bool:
    return path[-1] == "kernel" and path[-2].removeprefix("cross_") in _PROJECTIONS


def merge(params: Mapping[str, Any], adapters: Mapping[str, Any], scale: float | jax.Array = 1.0) -> dict[str, Any]:
    """The parameters with the adapters added to their kernels, in the parameters' dtype.

    Args:
      params: of the network.
      adapters: as returned by `init`.
      scale: factor of the change; alpha / rank in the paper.
    """
    merged, flat = dict(flatten_dict(params)), flatten_dict(adapters)
    for path in {path[:-1] for path in flat}:
        kernel = merged[*path, "kernel"]
        change = scale * (flat[*path, "down"] @ flat[*path, "up"])
        merged[*path, "kernel"] = (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
    tree: dict[str, Any] = unflatten_dict(merged)
    return tree
