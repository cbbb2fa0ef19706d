"""Devices: the mesh, and the sharding of arrays over it."""

import math
import os
import platform
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jax.typing import ArrayLike

from ddpm_jax.runtime import files
from ddpm_jax.runtime.errors import UserError

IN_FLIGHT = 2  # calls of a program that are queued on the devices while the host continues


def keep_compiled_programs(folder: str | Path | None = None) -> Path | None:
    """Caches XLA's compiled programs on disk, so that the next start of the same program need not compile it again.

    Args:
      folder: where to cache; None: JAX_COMPILATION_CACHE_DIR, or else ddpm_jax's folder in the user's cache; "off": no
        cache.

    Returns:
      The folder, which keeps the 4 GiB used most recently; None if there is no cache.

    Raises:
      UserError: the chosen folder cannot be created.
    """
    if folder == "off":
        return None
    chosen = folder or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    path = Path(chosen or files.user_cache() / f"compiled-{_processor()}").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if not chosen:
            return None
        raise UserError(f"--compilation_cache {str(path)!r} cannot be written to: {error.strerror}") from None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_compilation_cache_max_size", 4 << 30)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # by default a second
    return path


def _processor() -> str:
    """Identifies the kind of CPU: compiled programs use its instructions, and machines may share a home directory."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        flags = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = platform.processor()
    return f"{platform.machine()}-{zlib.crc32(flags.encode()):08x}"


def run_once_options() -> dict[str, Any]:
    """jit's compiler_options for a program that runs once: on CPUs, optimising it takes longer than running it."""
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}


def mesh_shape(num_devices: int, data: int = -1, fsdp: int = 1) -> tuple[int, int]:
    """The sizes of the axes "data" and "fsdp" for this number of devices; -1 means all that the other axis leaves.

    Raises:
      UserError: sizes that do not multiply to the number of devices.
    """
    sizes = {"data": data, "fsdp": fsdp}
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(f"config.mesh.{name} is {size}; accepted: 1 or more, or -1 for what the other axis leaves")
    given = [size for size in sizes.values() if size != -1]
    if not given:
        raise UserError("config.mesh.data and config.mesh.fsdp are both -1; accepted: at most one of them")
    if len(given) == 1 and num_devices % given[0] == 0:
        sizes = {name: num_devices // given[0] if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != num_devices:
        raise UserError(f"config.mesh has data {data} and fsdp {fsdp}, which do not make up {num_devices} devices")
    return sizes["data"], sizes["fsdp"]


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of devices with two axes.

    A batch is sharded over both. Parameters, their averages and the optimiser's state are replicated along "data" and
    sharded along "fsdp" (fully sharded data parallelism; ZeRO-3, Rajbhandari et al. 2020).

    Args:
      data, fsdp: number of devices along each axis; -1: all that the other leaves.
      devices: devices, possibly of a machine that is not available, kept in order; None: all devices of the job.

    Raises:
      UserError: sizes that do not multiply to the number of devices.
    """
    axes: Any = {"axis_names": ("data", "fsdp"), "axis_types": (AxisType.Auto,) * 2}
    if devices is None:
        shape = mesh_shape(jax.device_count(), data, fsdp)
        try:
            return jax.make_mesh(shape, **axes)
        except NotImplementedError:  # the slice's torus does not support these sizes
            return Mesh(mesh_utils.create_device_mesh(shape, allow_split_physical_axes=True), **axes)
    # jax.make_mesh would look for a better order, which it cannot find for every unavailable slice.
    return Mesh(np.array(devices).reshape(mesh_shape(len(devices), data, fsdp)), **axes)


def rounded(size: int, mesh: Mesh) -> int:
    """A batch size rounded up to a multiple of the number of devices."""
    return -(-size // mesh.devices.size) * mesh.devices.size


def cacheable_chunk(size: int) -> int:
    """The batch size with which a frozen network computes results that are cached: `size`, but 1 on CPUs.

    A cached result must not depend on the batch in which it was first needed, because a resumed run first needs it in
    a different one. XLA's CPU backend rounds an example's results differently depending on the size of the batch and
    on the example's row.
    """
    return 1 if jax.default_backend() == "cpu" else size


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The sharding of an array whose example axis is split over all devices."""
    names = tuple(name for name in mesh.axis_names if mesh.shape[name] > 1) or mesh.axis_names[:1]
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, names if len(names) > 1 else names[0]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(mesh: Mesh, tree: Any) -> Any:
    """The shardings of parameters, or arrays like them.

    Each array is sharded over "fsdp" along its longest axis that divides evenly, the last one if there are several.
    Small arrays (fewer than 2 ** 14 elements) are replicated, since communication would cost more than their memory.

    Args:
      mesh: from `make_mesh`.
      tree: of arrays, or of anything with a shape.

    Returns:
      A `NamedSharding` in place of each array.
    """
    devices = mesh.shape.get("fsdp", 1)

    def one(x: Any) -> NamedSharding:
        fitting = [(size, axis) for axis, size in enumerate(x.shape) if size % devices == 0]
        if devices == 1 or math.prod(x.shape) < 2**14 or not fitting:
            return replicated(mesh)
        _, axis = max(fitting)
        return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "fsdp"))

    return jax.tree.map(one, tree)


def laid(shapes: Any, shardings: Any) -> Any:
    """`jax.ShapeDtypeStruct`s with these shapes and shardings."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
    )


def place(value: ArrayLike, sharding: Sharding) -> jax.Array:
    """Puts an array that every process has onto the devices."""
    array = np.asarray(value)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def to_host(x: Any) -> np.ndarray:
    """Gathers the whole array on every process."""
    if jax.process_count() == 1:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(jnp.asarray(x), tiled=True))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a batch that are on this process's devices, int64, ascending."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def from_local_rows(mesh: Mesh, values: np.ndarray, rows: np.ndarray, batch_size: int, axis: int = 0) -> jax.Array:
    """The global array of a batch, from the rows that each process has.

    Args:
      mesh: from `make_mesh`.
      values: the rows of this process along `axis`.
      rows: their indices, from `local_rows`.
      batch_size: of the whole batch.
      axis: the axis of examples.
    """

    def of(index: Any) -> np.ndarray:
        first, last, _ = index[axis].indices(batch_size)
        begin = int(np.searchsorted(rows, first))
        return values[(slice(None),) * axis + (slice(begin, begin + last - first),)]

    shape = (*values.shape[:axis], batch_size, *values.shape[axis + 1 :])
    return jax.make_array_from_callback(shape, batch_sharding(mesh, axis), of)
