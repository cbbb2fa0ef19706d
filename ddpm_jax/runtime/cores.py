"""The cores of a CPU as devices of JAX, for networks whose operations are too small for several cores.

XLA divides a large operation over all cores, but computes a small one on a single core. A network of few channels has
only small ones. If the cores are devices instead, each with its part of the batch, all of them work: on two cores a
training step takes 0.67 to 0.86 times as long (`benchmarks/cores.py`). A network of 64 channels or more gains nothing,
and each device would hold its parameters once more.
"""

import os

import jax
from ml_collections import ConfigDict

_MANY_CHANNELS = 64  # from here on XLA divides each convolution
_LEAST_IMAGES = 16  # of a training batch on each device


def use(config: ConfigDict) -> None:
    """Divides the CPU into as many devices as suit the run of this config, which this process is about to open.

    An accelerator's devices are not changed. Nothing happens if JAX has devices already, in multi-host jobs, or if the
    user chose a number of CPU devices (JAX_NUM_CPU_DEVICES, or --xla_force_host_platform_device_count in XLA_FLAGS).
    """
    count = suitable(config)
    is_chosen = getattr(jax.config, "jax_num_cpu_devices", -1) != -1
    is_chosen |= "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if count > 1 and not (is_chosen or jax.distributed.is_initialized()):
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError:  # JAX has devices already, in a notebook for example
            return


def suitable(config: ConfigDict, cores: int | None = None) -> int:
    """The number of devices for a run: a power of two of at most the cores, which divides its batch.

    Args:
      config: of the run.
      cores: of the CPU; None: those that this process may use.

    Returns:
      1 for networks of many channels or without convolutions, and where `config.mesh` is not the default.
    """
    few = config.train.objective in _CHANNELS and _CHANNELS[config.train.objective](config) < _MANY_CHANNELS
    if not few or config.prior.clip or (config.mesh.data, config.mesh.fsdp) != (-1, 1):
        return 1
    cores = _cores() if cores is None else cores
    part = config.train.batch_size // max(config.train.accumulation, 1)
    count = 1
    while 2 * count <= cores and part % (2 * count) == 0 and part // (2 * count) >= _LEAST_IMAGES:
        count *= 2
    return count


_CHANNELS = {
    "diffusion": lambda config: config.model.channels,
    "autoencoder": lambda config: min(config.autoencoder.level_channels, default=_MANY_CHANNELS),
}


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # of Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
