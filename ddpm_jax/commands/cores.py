"""Uses the cores of a CPU as devices of JAX, for networks whose operations are too small for several cores.

XLA divides a large operation over all cores but computes a small one on a single core, and a network with few channels
has only small ones. With the cores as devices, each of which takes a part of the batch, all cores work: on two cores a
training step takes 0.67 to 0.86 times as long (`benchmarks/cores.py`). A network with 64 channels or more gains
nothing, and every device would hold another copy of its parameters.
"""

import os
import re
from contextlib import suppress

import jax
from ml_collections import ConfigDict

from ddpm_jax.runtime import memory
from ddpm_jax.validation import check_fields

_MANY_CHANNELS = 64  # from here on XLA divides each convolution
_LEAST_IMAGES = 16  # of a training batch on each device


def use(config: ConfigDict) -> None:
    """Divides the CPU into as many devices as suit a run, and sets up its memory allocator for them.

    To be called before this process opens the run. The devices of an accelerator stay as they are. So do the CPU's if
    JAX has opened them, in multi-host jobs, or if the user has chosen their number (JAX_NUM_CPU_DEVICES, or
    --xla_force_host_platform_device_count in XLA_FLAGS).

    Args:
      config: of the run.

    Raises:
      UserError: a field with a value that is not accepted.
    """
    check_fields(config)
    count = suitable(config)
    chosen = _chosen()
    if count > 1 and not (chosen or jax.distributed.is_initialized()):
        with suppress(RuntimeError):  # the devices are open, as in a notebook
            jax.config.update("jax_num_cpu_devices", count)
    memory.keep_freed_memory(_chosen() or 1)


def _chosen() -> int:
    """The number of CPU devices that the user or `use` has chosen; 0: none was."""
    flag = re.search(r"host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return max(int(flag[1]) if flag else 0, getattr(jax.config, "jax_num_cpu_devices", -1), 0)


def suitable(config: ConfigDict, cores: int | None = None) -> int:
    """The number of CPU devices for a run: a power of two, at most the number of cores, that divides the batch.

    Args:
      config: of the run.
      cores: how many the CPU has; None: those that this process may use.

    Returns:
      1 for networks with many channels or without convolutions, and if `config.mesh` is not the default.
    """
    few = config.train.objective in _CHANNELS and _CHANNELS[config.train.objective](config) < _MANY_CHANNELS
    if not few or config.prior.clip or (config.mesh.data, config.mesh.fsdp) != (-1, 1):
        return 1
    cores = available() if cores is None else cores
    part = config.train.batch_size // config.train.accumulation
    count = 1
    while 2 * count <= cores and part % (2 * count) == 0 and part // (2 * count) >= _LEAST_IMAGES:
        count *= 2
    return count


_CHANNELS = {
    "diffusion": lambda config: config.model.channels,
    "autoencoder": lambda config: min(config.autoencoder.level_channels, default=_MANY_CHANNELS),
}


def available() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # on Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
