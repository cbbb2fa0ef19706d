"""A training step of a CIFAR-10-size network against other projects in JAX: forward, backward, clipping, Adam, EMA.

    python benchmarks/peers.py

Batch 16, float32, each project's own UNet with 128 channels, multipliers 1, 2, 2, 2, two blocks per level and attention
at 16x16. The networks are not the same (their parameters and arithmetic are printed), so the time is also given per
GFLOP by XLA's count; ours has fewer than the same network with plain convolutions, since some use Winograd's algorithm.
Memory traffic is XLA's estimate for this machine's processor: all operands and results of all fusions.
"""

import argparse
import importlib.metadata
import importlib.util
import statistics
import sys
from functools import partial

from common import alternate, planned, report
from train_step import ours

BATCH = 16

NEEDS = {
    "flaxdiff": ("flaxdiff", "pip install einops && pip install --no-deps flaxdiff==0.2.11"),
    "hackable-diffusion": (
        "hackable_diffusion",
        "pip install --no-deps hackable_diffusion==1.0.1 kauldron chex jaxtyping typeguard immutabledict toolz "
        "wadler_lindig importlib_resources mock nest-asyncio lark einops, on Python 3.12 or newer",
    ),
}


def flaxdiff():
    from flaxdiff.models.simple_unet import Unet

    attention = {"heads": 1, "use_self_and_cross": False}
    net = Unet(
        emb_features=512,
        feature_depths=(128, 256, 256, 256),
        attention_configs=(None, attention, None, attention),  # its middle takes the last one's
        num_res_blocks=2,
        norm_groups=32,
    )
    return _train(net, lambda x, t: (x, t, _zeros(x.shape[0], 1, 512)))


def hackable_diffusion():
    from hackable_diffusion.lib.architecture import normalization, sequence_embedders, unet, unet_blocks

    net = unet.Unet(
        base_channels=128,
        channels_multiplier=(1, 2, 2, 2),
        num_residual_blocks=(2, 2, 2, 2),
        downsample_fn=unet_blocks.AvgPoolDownsample(),
        upsample_fn=unet_blocks.ImageResizeUpsample("nearest"),
        dropout_rate=(0.1,) * 4,
        bottleneck_dropout_rate=0.1,
        self_attention_bool=(False, True, False, False),
        cross_attention_bool=(False,) * 4,
        attention_num_heads=1,
        attention_head_dim=-1,
        attention_normalize_qk=False,
        attention_use_rope=False,
        attention_rope_positions_fn=sequence_embedders.SquareRoPEPositions(),
        normalization_type=normalization.NormalizationType.GROUP_NORM,
        normalization_num_groups=32,
        activation="silu",
        skip_connection_fn=unet_blocks.UnnormalizedAddSkip(),
    )
    return _train(net, lambda x, t: (x, {"adaptive_norm": _sinusoids(t, 512)}), is_training=True)


def _zeros(*shape):
    import jax.numpy as jnp

    return jnp.zeros(shape)


def _sinusoids(t, width):
    """[B, width]: a time embedding for a network that takes one; computing it in layers would cost almost nothing."""
    import jax.numpy as jnp

    angles = t[:, None] * jnp.exp(-jnp.arange(width // 2) * (jnp.log(10000.0) / (width // 2 - 1)))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def _train(net, inputs, **options):
    """The same training step with a peer's network; `inputs` makes its arguments from x_t and t."""
    from ddpm_jax.runtime import memory, parallel

    memory.keep_freed_memory()
    import jax
    import jax.numpy as jnp
    import optax

    alphas_cumprod = jnp.cumprod(1 - jnp.linspace(1e-4, 0.02, 1000))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-4))
    x_0 = jax.random.uniform(jax.random.key(0), (BATCH, 32, 32, 3), minval=-1.0)

    def loss(params, key, x_0):
        keys = jax.random.split(key, 3)
        t, noise = jax.random.randint(keys[0], (BATCH,), 0, 1000), jax.random.normal(keys[1], x_0.shape)
        a = alphas_cumprod[t][:, None, None, None]
        x_t = jnp.sqrt(a) * x_0 + jnp.sqrt(1 - a) * noise
        eps = net.apply({"params": params}, *inputs(x_t, t.astype(jnp.float32)), **options, rngs={"dropout": keys[2]})
        return jnp.mean((eps - noise) ** 2)

    def step(state, key, x_0):
        params, average, moments = state
        updates, moments = optimizer.update(jax.grad(loss)(params, key, x_0), moments, params)
        params = optax.apply_updates(params, updates)
        return params, optax.incremental_update(params, average, 1e-4), moments

    def create(key):
        rngs = {"params": key, "dropout": key}
        params = net.init(rngs, *inputs(x_0, jnp.zeros(BATCH)), **options)["params"]
        return params, jax.tree.map(jnp.copy, params), optimizer.init(params)

    state = [jax.jit(create, compiler_options=parallel.run_once_options())(jax.random.key(0))]
    key = jax.random.key(1)
    compiled = jax.jit(step, donate_argnums=0).lower(state[0], key, x_0).compile()

    def run():
        state[0] = jax.block_until_ready(compiled(state[0], key, x_0))

    run.facts = planned(compiled, state[0][0])
    return run


CANDIDATES = {
    "ddpm_jax": partial(ours, "cifar10", BATCH, "float32", steps=1),
    "flaxdiff": flaxdiff,
    "hackable-diffusion": hackable_diffusion,
}


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=7)
    rounds = arguments.parse_args().rounds
    for name, (module, command) in NEEDS.items():
        if importlib.util.find_spec(module) is None:
            sys.exit(f"{name} is not installed: {command}")
    facts = {}
    seconds = alternate(CANDIDATES, rounds, facts)
    for name, told in facts.items():
        told["ms_per_gflop"] = round(1e3 * statistics.median(seconds[name]) / told["gflop"], 2)
        print(f"{name}: {told['parameters']:,} parameters", end=", ")
        print(f"{told['gflop']} GFLOP, {told['traffic_gb']} GB, {told['ms_per_gflop']} ms a GFLOP")
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "flaxdiff", "hackable-diffusion")}
    report("peers cifar10-size step, batch 16 float32", seconds, "ddpm_jax", planned=facts, versions=versions)
