"""Regroups portions of rows into batches of equal size, and applies a network to them on all devices."""

import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial

from ddpm_jax.runtime import parallel

Output = dict[str, jax.Array]


def regroup(portions: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Yields the same rows in portions of `size`; the last one may be smaller."""
    left: list[np.ndarray] = []
    for portion in portions:
        while sum(map(len, left)) + len(portion) >= size:
            taken = size - sum(map(len, left))
            yield np.concatenate([*left, portion[:taken]])
            left, portion = [], portion[taken:]
        if len(portion):
            left.append(portion)
    if left:
        yield np.concatenate(left)


def in_batches(
    apply: Partial, portions: Iterable[np.ndarray], mesh: Mesh, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Applies a network to rows, in batches of equal size sharded over the mesh.

    Args:
      apply: ([B, ...]) -> arrays [B, ...] by name; its weights are put on every device.
      portions: of any size, [N, ...] each, the same on all processes of the mesh.
      mesh: from `parallel.make_mesh`, or this process's own.
      batch_size: rows at a time, rounded up to a multiple of the number of devices.

    Yields:
      float32 [n, ...] by name, for all rows in order.
    """
    size, rows = parallel.rounded(batch_size, mesh), parallel.batch_sharding(mesh)
    apply = jax.tree.map(functools.partial(parallel.place, sharding=parallel.replicated(mesh)), apply)
    waiting: tuple[Output, int] | None = None
    for portion in regroup(portions, size):
        padded = np.resize(portion, (size, *portion.shape[1:])) if len(portion) < size else portion
        # The devices work on this batch while the previous one is fetched and used.
        started = run_batch(apply, parallel.place(padded, rows), mesh)
        if waiting:
            yield _fetched(*waiting)
        waiting = started, len(portion)
    if waiting:
        yield _fetched(*waiting)


def _fetched(output: Output, count: int) -> dict[str, np.ndarray]:
    return {name: np.asarray(value)[:count] for name, value in output.items()}


@functools.partial(jax.jit, static_argnames="mesh")
def run_batch(apply: Partial, batch: jax.Array, mesh: Mesh) -> Output:
    """The compiled program: the output for a batch that is sharded over the mesh, replicated on every device."""
    output = {name: value.astype(jnp.float32) for name, value in apply(batch).items()}
    return jax.lax.with_sharding_constraint(output, parallel.replicated(mesh))
