"""Numbers that other programs computed, for machines without them: PyTorch with diffusers, and exact fractions.

`tests/interop/test_peers.py` checks that PyTorch still gives the same.
"""

from functools import partial

import golden
import jax
import numpy as np
import pytest

from ddpm_jax import config as config_lib
from ddpm_jax.diffusion.samplers import sample
from ddpm_jax.diffusion.schedules import make_schedule
from ddpm_jax.interop.diffusers import unet
from ddpm_jax.runtime import parallel


def model_fn(name):
    config = golden.config(name)
    tensors = golden.tensors(unet.tensor_shapes(config))
    net = config_lib.make_network(config)
    return jax.tree_util.Partial(net.apply, {"params": unet.to_params(name, tensors, config)})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("cifar10", 32), ("small", 8)])
def test_network(measure, name, size):
    compiled = partial(jax.jit, compiler_options=parallel.run_once_options())
    found = compiled(model_fn(name))(*golden.inputs(size))
    errors = np.abs(np.array(golden.summary(found)) - golden.NUMBERS[f"{name} network"])
    measure(f"output of the {name} network", "numbers computed by PyTorch", errors.max(), 1e-5)


@pytest.mark.slow
def test_trajectory(measure):
    x, _ = golden.inputs(8)
    options = {"sampler": "ddim", "num_steps": 20, "spacing": "leading"}
    found = sample(make_schedule(), model_fn("small"), jax.random.key(0), x.shape, x_t=x, **options)
    errors = np.abs(np.array(golden.summary(found)) - golden.NUMBERS["ddim trajectory"])
    measure("20 steps of ddim with the small network", "numbers computed by PyTorch", errors.max(), 1e-4)


@pytest.mark.parametrize("name", golden.NUMBERS["schedule"])
def test_schedule(measure, name):
    found = np.asarray(getattr(make_schedule(), name), np.float64)[list(golden.TIMESTEPS)]
    expected = np.array(golden.NUMBERS["schedule"][name])
    errors = np.abs(found - expected) / np.maximum(np.abs(expected), 1e-30)
    measure(
        "betas, abar and posterior variance, linear", "numbers from exact fractions", errors.max(), 6e-8, "relative"
    )
