"""One step of scan sampling against the bare jit-compiled forward pass of the network on the same batch.

python benchmarks/sampling_step.py --network=digits
python benchmarks/sampling_step.py --network=cifar10
"""

import argparse
from functools import partial

from common import alternate, report

BATCH = {"digits": 64, "cifar10": 16}


def _setup(network):
    from ddpm_jax.runtime import memory

    memory.keep_freed_memory()
    import sys
    from pathlib import Path

    import jax
    import jax.numpy as jnp

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import importlib

    from ddpm_jax import config as config_lib

    config = importlib.import_module(f"configs.{network}").get_config()
    net = config_lib.make_network(config)
    shape = (BATCH[network], config.data.height, config.data.width, config.data.channels)
    variables = jax.jit(net.init)(jax.random.key(0), jnp.zeros(shape), jnp.zeros(shape[0], jnp.int32))
    return config, net, variables, shape


def sampling(network, num_steps, progress=None):
    import jax

    from ddpm_jax import config as config_lib
    from ddpm_jax.diffusion.samplers import sample

    config, net, variables, shape = _setup(network)
    schedule = config_lib.make_schedule_from(config)
    options = config_lib.sampling_request(config, config_lib.make_condition(config)).keywords()
    options["num_steps"] = num_steps
    model_fn = jax.tree_util.Partial(net.apply, variables)

    def run():
        result = sample(schedule, model_fn, jax.random.key(0), shape, **options, progress=progress)
        jax.block_until_ready(result)

    return run


def ignore(done, calls):
    pass


def forward(network, num_steps):
    import jax
    import jax.numpy as jnp

    _, net, variables, shape = _setup(network)
    apply = jax.jit(net.apply)
    x, t = jax.random.normal(jax.random.key(0), shape), jnp.arange(shape[0])

    def run():
        for _ in range(num_steps):
            apply(variables, x, t).block_until_ready()

    return run


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--network", choices=list(BATCH), default="digits")
    arguments.add_argument("--num_steps", type=int, help="network calls a timing; default 50 (digits) or 4 (cifar10)")
    arguments.add_argument("--rounds", type=int, default=9)
    options = arguments.parse_args()
    num_steps = options.num_steps or {"digits": 50, "cifar10": 4}[options.network]
    candidates = {
        "scan sampling": partial(sampling, options.network, num_steps),
        "with progress": partial(sampling, options.network, num_steps, ignore),
        "bare forward": partial(forward, options.network, num_steps),
    }
    seconds = {name: [s / num_steps for s in values] for name, values in alternate(candidates, options.rounds).items()}
    report(f"sampling_step {options.network}", seconds, against="bare forward", batch=BATCH[options.network])
