"""HBM traffic of attention compiled for one TPU chip: `models/attention.py` against jax's Pallas kernels.

    pip install -e '.[tpu]' && python benchmarks/attention.py
    python benchmarks/attention.py --topology v6e:2x2

No TPU is needed. The shapes are the self-attentions of Stable Diffusion 1.5 at 512x512 with more than 16 MiB of logits,
of two inputs in bfloat16. The kernels take heads of 128 channels, so narrower ones are padded.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from common import print_json
from jax.sharding import NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).parents[1]))
from configs import digits
from ddpm_jax.models.attention import attend
from ddpm_jax.planning import hlo
from ddpm_jax.planning.compiled import open_topology

SHAPES = [(2, 4096, 8, 40), (2, 1024, 8, 80)]


def padded(kernel, query, key, value):
    """`kernel` of arrays [B, heads, L, 128]."""
    width = query.shape[-1]
    wide = (jnp.pad(x, ((0, 0),) * 3 + ((0, -width % 128),)).swapaxes(1, 2) for x in (query, key, value))
    return kernel(*wide, width**-0.5).swapaxes(1, 2)[..., :width]


def flash(query, key, value, scale):
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    return flash_attention(query, key, value, sm_scale=scale)


def splash(query, key, value, scale):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    _, heads, length, _ = query.shape
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((length, key.shape[2]))] * heads)
    kernel = splash_attention_kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1)
    return jax.vmap(kernel)(query * scale, key, value)


def gradient(attention, *arguments):
    return jax.grad(lambda *a: attention(*a).astype(jnp.float32).sum(), (0, 1, 2))(*arguments)


def main(options):
    _, mesh = open_topology(options.topology, digits.get_config())
    one = NamedSharding(jax.make_mesh((1,), ("data",), devices=mesh.devices.flat[:1]), PartitionSpec())
    ways = {"attend": attend, "flash": partial(padded, flash), "splash": partial(padded, splash)}
    rows = []
    for shape in SHAPES:
        x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=one)
        for name, way in ways.items():
            for what, function in (("forward", way), ("gradient", partial(gradient, way))):
                program = hlo.analyse(jax.jit(function, out_shardings=one).lower(x, x, x).compile(), 0, 1)
                hbm, peak = program.traffic / 1e6, program.peak_memory / 1e6
                rows.append({"shape": shape, "attention": name, "pass": what, "hbm_mb": hbm, "peak_mb": peak})
                print(f"{shape} {name:7} {what:9} {hbm:7.1f} MB through HBM, {peak:7.1f} MB at its peak")
    print_json("attention", topology=options.topology, rows=rows)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--topology", default="v5e:2x2")
    main(arguments.parse_args())
