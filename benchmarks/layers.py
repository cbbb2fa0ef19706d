"""The optimised layers of `ddpm_jax.models.layers` against plain implementations, forward and backward.

    python benchmarks/layers.py

On shapes of the CIFAR-10 network at batch 16, on one of 2x2 pixels, on those of small networks at batch 64, and on
those of Stable Diffusion's UNet at batch 2.
"""

import argparse
from functools import partial

from common import alternate, report

CONV = [  # batch, height and width, channels, features
    *[(16, 32, 128, 128), (16, 32, 256, 128), (16, 16, 256, 256), (16, 8, 256, 256), (16, 4, 256, 256)],
    *[(16, 2, 256, 256), (64, 28, 32, 32), (64, 28, 96, 32), (64, 8, 32, 32)],
    *[(2, 32, 320, 320), (2, 16, 640, 640), (2, 8, 1280, 1280), (2, 4, 1280, 1280)],
]


def _inputs(batch, size, channels, features):
    from ddpm_jax.runtime import memory

    memory.keep_freed_memory()
    import jax

    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (batch, size, size, channels))
    return x, jax.random.normal(keys[1], (3, 3, channels, features))


def _timed(function, *arguments):
    import jax

    gradient = jax.jit(jax.grad(lambda *a: (function(*a) ** 2).sum(), argnums=tuple(range(len(arguments)))))
    return lambda: jax.block_until_ready(gradient(*arguments))


def conv(ours, batch, size, channels, features):
    x, kernel = _inputs(batch, size, channels, features)
    from jax import lax

    from ddpm_jax.models import layers

    padding = ((1, 1), (1, 1))
    if ours:
        return _timed(lambda x, k: layers.conv(x, k, padding), x, kernel)
    plain = partial(
        lax.conv_general_dilated, window_strides=(1, 1), padding=padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return _timed(plain, x, kernel)


def upsample(ours, batch, size, channels):
    x, kernel = _inputs(batch, size, channels, channels)
    import jax.numpy as jnp
    from jax import lax

    from ddpm_jax.models import layers

    if ours:
        return _timed(layers.upsample_conv, x, kernel)

    def plain(x, kernel):
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    return _timed(plain, x, kernel)


def norm(ours, batch, size, channels):
    x, _ = _inputs(batch, size, channels, channels)
    import flax.linen as nn
    import jax.numpy as jnp

    from ddpm_jax.models import layers

    scale, bias = jnp.ones(channels), jnp.zeros(channels)
    if ours:
        return _timed(lambda x: nn.swish(layers.group_norm(x, scale, bias, 32)), x)
    plain = nn.GroupNorm(32, epsilon=1e-6)
    return _timed(lambda x: nn.swish(plain.apply({"params": {"scale": scale, "bias": bias}}, x)), x)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=15)
    rounds = arguments.parse_args().rounds
    cases = {
        f"conv {batch} x {size}x{size} {channels}->{features}": partial(
            conv, batch=batch, size=size, channels=channels, features=features
        )
        for batch, size, channels, features in CONV
    }
    cases["upsample 16 x 16x16 256"] = partial(upsample, batch=16, size=16, channels=256)
    cases["upsample 2 x 8x8 1280"] = partial(upsample, batch=2, size=8, channels=1280)
    for batch, size, channels in ((16, 32, 128), (64, 8, 96)):
        cases[f"norm and swish {batch} x {size}x{size} {channels}"] = partial(
            norm, batch=batch, size=size, channels=channels
        )
    for name, case in cases.items():
        report(name, alternate({"ours": partial(case, True), "plain": partial(case, False)}, rounds), against="plain")
