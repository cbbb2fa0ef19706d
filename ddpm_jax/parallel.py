"""Devices and processes: the mesh, how arrays lie on it, and starting a job of several hosts."""

import ctypes
import os
import platform
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddpm_jax import files
from ddpm_jax.errors import UserError


def initialize(coordinator: str = "", num_processes: int = 0, process_id: int = -1, automatic: bool = False) -> None:
    """Joins the processes of a multi-host job; does nothing for a job of one.

    Args:
      coordinator: "host:port" of process 0.
      num_processes, process_id: how many processes there are and which one this is.
      automatic: take all three from the environment (TPU pod, Slurm, Open MPI).
    """
    if automatic:
        jax.distributed.initialize()
    elif coordinator:
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise UserError(
                f"--coordinator needs --num_processes of 1 or more and --process_id below it, "
                f"not {num_processes} and {process_id}"
            )
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif num_processes or process_id >= 0:
        raise UserError("--num_processes and --process_id need --coordinator=host:port too")


def keep_freed_memory() -> None:
    """Lets the C allocator keep what a step frees, on Linux.

    XLA's CPU backend asks for the temporary arrays of a program anew at every call, gigabytes for a training step. By
    default each request of that size comes from the kernel and goes back to it, and the page faults cost up to a sixth
    of the step.
    """
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
        except OSError:  # another C library, such as musl
            return
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
        libc.mallopt(M_ARENA_MAX, 1)  # the arenas of single threads give large blocks back
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_TOP_PAD, 64 << 20)


def keep_compiled_programs(folder: str | Path | None = None) -> Path | None:
    """Keeps what XLA compiles on disk, so that the next start of the same program need not compile it again.

    Args:
      folder: where; None: JAX_COMPILATION_CACHE_DIR, or else a folder of ddpm_jax in the user's cache; "off": nowhere.

    Returns:
      The folder, in which at most the 4 GiB used last stay; None if there is none.

    Raises:
      UserError: the folder that was chosen cannot be made.
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
    return path


def _processor() -> str:
    """Names this kind of processor: programs for a CPU use its instructions, and a home may be on several machines."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        flags = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = platform.processor()
    return f"{platform.machine()}-{zlib.crc32(flags.encode()):08x}"


def run_once_options() -> dict[str, Any]:
    """jit's compiler_options for a program that runs once: on CPU, optimising it would take longer than running it."""
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}


def make_mesh() -> Mesh:
    """All devices of the job along one axis, "data"."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """An array's first axis divided over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())
