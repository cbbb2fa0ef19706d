import os
import subprocess
import sys

import pytest

from configs import cifar10, digits, numbers_autoencoder, numbers_clip, numbers_prior
from ddpm_jax.commands import cores


def config_of(name="digits", **fields):
    config = {
        "digits": digits,
        "cifar10": cifar10,
        "autoencoder": numbers_autoencoder,
        "clip": numbers_clip,
        "prior": numbers_prior,
    }[name].get_config()
    config.update_from_flattened_dict(fields)
    return config


@pytest.mark.parametrize(
    ("name", "fields", "number_of_cores", "devices"),
    [
        ("digits", {}, 1, 1),
        ("digits", {}, 2, 2),
        ("digits", {}, 3, 2),  # a power of two
        ("digits", {}, 64, 4),  # 16 of its 64 images on each
        ("digits", {"train.batch_size": 48}, 64, 2),  # 12 images would be too few
        ("digits", {"train.batch_size": 63}, 64, 1),
        ("digits", {"train.accumulation": 2}, 64, 2),
        ("digits", {"model.channels": 64}, 64, 1),
        ("digits", {"mesh.data": 1}, 64, 1),
        ("autoencoder", {}, 2, 2),
        ("autoencoder", {"autoencoder.level_channels": (64, 32)}, 2, 2),
        ("autoencoder", {"autoencoder.level_channels": (64, 64)}, 2, 1),
        ("cifar10", {}, 64, 1),
        ("clip", {}, 64, 1),
        ("prior", {}, 64, 1),
    ],
)
def test_devices_that_suit_a_run(name, fields, number_of_cores, devices):
    assert cores.suitable(config_of(name, **fields), number_of_cores) == devices


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({}, 2),
        ({"JAX_NUM_CPU_DEVICES": "1"}, 1),
        ({"JAX_NUM_CPU_DEVICES": "3"}, 3),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}, 5),
    ],
)
def test_the_user_s_number_counts(environment, devices):
    code = (
        "from configs import digits; from ddpm_jax.commands import cores; cores.available = lambda: 2;"
        "cores.memory.keep_freed_memory = lambda devices: print(devices, end=' ');"
        "cores.use(digits.get_config()); import jax; print(len(jax.devices()))"
    )
    unset = {name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    process = subprocess.run(
        [sys.executable, "-c", code], env=unset | environment, capture_output=True, text=True, check=True
    )
    assert process.stdout == f"{devices} {devices}\n"  # the memory is divided like the cores


def test_devices_that_are_there_stay():
    import jax

    before = jax.devices()
    cores.use(config_of())
    assert jax.devices() == before
