"""The optimised layers of `ddpm_jax.models.layers` against plain implementations, forward and backward.

    python benchmarks/layers.py

On shapes of the CIFAR-10 network at batch 16, and on one of 2x2 pixels.
"""

import argparse
from functools import partial

from common import alternate, report

CONV = [(32, 128, 128), (32, 256, 128), (16, 256, 256), (8, 256, 256), (4, 256, 256), (2, 256, 256)]


def _inputs(size, channels, features):
    from ddpm_jax.runtime import parallel

    parallel.keep_freed_memory()
    import jax

    keys = jax.random.split(jax.random.key(0), 2)
    return jax.random.normal(keys[0], (16, size, size, channels)), jax.random.normal(
        keys[1], (3, 3, channels, features)
    )


def _timed(function, *arguments):
    import jax

    gradient = jax.jit(jax.grad(lambda *a: (function(*a) ** 2).sum(), argnums=tuple(range(len(arguments)))))
    return lambda: jax.block_until_ready(gradient(*arguments))


def conv(ours, size, channels, features):
    x, kernel = _inputs(size, channels, features)
    from jax import lax

    from ddpm_jax.models import layers

    padding = ((1, 1), (1, 1))
    if ours:
        return _timed(lambda x, k: layers.conv(x, k, padding), x, kernel)
    plain = partial(
        lax.conv_general_dilated, window_strides=(1, 1), padding=padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return _timed(plain, x, kernel)


def upsample(ours, size, channels):
    x, kernel = _inputs(size, channels, channels)
    import jax.numpy as jnp
    from jax import lax

    from ddpm_jax.models import layers

    if ours:
        return _timed(lambda x, k: layers.upsample_conv(x, layers.upsampling_kernel(k)), x, kernel)

    def plain(x, kernel):
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    return _timed(plain, x, kernel)


def norm(ours, size, channels):
    x, _ = _inputs(size, channels, channels)
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
    cases = {f"conv {s}x{s} {c}->{d}": partial(conv, size=s, channels=c, features=d) for s, c, d in CONV}
    cases["upsample 16x16 256"] = partial(upsample, size=16, channels=256)
    cases["norm and swish 32x32 128"] = partial(norm, size=32, channels=128)
    for name, case in cases.items():
        report(name, alternate({"ours": partial(case, True), "plain": partial(case, False)}, rounds), against="plain")
