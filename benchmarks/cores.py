"""A training step on a CPU as one device, and with its cores as devices (`ddpm_jax.commands.cores`), in turn.

    python benchmarks/cores.py
    python benchmarks/cores.py --config numbers --devices 1 2

By default of the networks of few channels that the configs have, and of the CIFAR-10 network of 64 channels, for which
`cores.suitable` says one device. The peak of each process's memory stands beside the times.
"""

import argparse
import os
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

from common import alternate, report

CONFIGS = ("digits", "numbers", "numbers_autoencoder", "numbers_sr", "folder_small", "captions_small", "cifar10_64")
STEPS = 5  # of each call


def setup(name, devices):
    os.environ["JAX_NUM_CPU_DEVICES"] = str(devices)
    from ddpm_jax.runtime import memory, parallel

    memory.keep_freed_memory(devices)
    import jax
    import numpy as np

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from ddpm_jax import config as config_lib
    from ddpm_jax.training.objectives import make_objective
    from ddpm_jax.training.state import create_state
    from ddpm_jax.training.step import Metrics, make_train_step

    config = import_module(f"configs.{name.removesuffix('_64')}").get_config()
    if name == "cifar10_64":
        config.model.channels = 64
        config.train.batch_size = 16
    objective, mesh = make_objective(config), parallel.make_mesh()
    optimizer = config_lib.make_optimizer(config)
    rng = np.random.default_rng(0)
    batch = {}
    for key, array in objective.reads.items():
        shape = (config.train.batch_size, *array.shape)
        batch[key] = rng.integers(0, 256, shape, np.uint8) if array.dtype == np.uint8 else np.ones(shape, array.dtype)
    batch = jax.device_put(batch, parallel.batch_sharding(mesh))

    def start():
        return create_state(objective.init_params(0), optimizer, (0.9999,)), Metrics.zero()

    create = jax.jit(start, out_shardings=parallel.replicated(mesh), compiler_options=parallel.run_once_options())
    carry = list(create())
    compiled = make_train_step(objective, optimizer, mesh, **config_lib.step_options(config)).lower(*carry, batch)
    compiled = compiled.compile()

    def run():
        for _ in range(STEPS):
            carry[:] = compiled(*carry, batch)
        jax.block_until_ready(carry)

    return run


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--config", nargs="+", choices=CONFIGS, default=CONFIGS)
    arguments.add_argument("--devices", nargs="+", type=int, default=[1, 2])
    arguments.add_argument("--rounds", type=int, default=7)
    options = arguments.parse_args()
    for name in options.config:
        facts = {}
        candidates = {f"{devices} device(s)": partial(setup, name, devices) for devices in options.devices}
        seconds = alternate(candidates, options.rounds, facts)
        seconds = {how: [value / STEPS for value in values] for how, values in seconds.items()}
        report(f"cores {name}", seconds, next(iter(candidates)), facts=facts)
