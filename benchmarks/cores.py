"""A training step on a CPU as one device, and with its cores as devices (`ddpm_jax.commands.cores`), in turn.

    python benchmarks/cores.py
    python benchmarks/cores.py --network numbers --devices 1 2

By default of the networks of few channels that the configs have, and of the CIFAR-10 network of 64 channels, for which
`cores.suitable` says one device. The peak of each process's memory stands beside the times. The networks are those of
networks.py.
"""

import argparse
import os
from functools import partial

import train_step
from common import alternate, report
from networks import NETWORKS

NAMES = ("digits", "numbers", "numbers_autoencoder", "numbers_sr", "folder_small", "captions_small", "cifar10_64")
STEPS = 5  # of each call


def setup(network, devices):
    os.environ["JAX_NUM_CPU_DEVICES"] = str(devices)
    return train_step.ours(network, None, "float32", STEPS)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--network", nargs="+", choices=list(NETWORKS), default=NAMES)
    arguments.add_argument("--devices", nargs="+", type=int, default=[1, 2])
    arguments.add_argument("--rounds", type=int, default=7)
    options = arguments.parse_args()
    for name in options.network:
        facts = {}
        candidates = {f"{devices} device(s)": partial(setup, name, devices) for devices in options.devices}
        seconds = alternate(candidates, options.rounds, facts, STEPS)
        report(f"cores {name}", seconds, next(iter(candidates)), facts=facts)
