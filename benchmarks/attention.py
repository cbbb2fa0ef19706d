"""Attention: HBM traffic compiled for one TPU chip, against jax's Pallas kernels, or time on a CPU, against PyTorch.

    pip install -e '.[tpu]' && python benchmarks/attention.py
    python benchmarks/attention.py --topology v6e:2x2
    pip install -e '.[peers]' && python benchmarks/attention.py --cpu

No TPU is needed. The shapes are the self-attentions of Stable Diffusion 1.5 at 512x512 with more than 16 MiB of logits,
of two inputs in bfloat16. The kernels take heads of 128 channels, so narrower ones are padded. On a CPU the inputs are
float32, and a narrow network's attention is among them.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from common import alternate, print_json, report
from jax.sharding import NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).parents[1]))
from configs import digits
from ddpm_jax.models.attention import attend, observed
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


def jax_on_cpu(attention, shape, with_gradient):
    x = [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 3)]
    call = jax.jit(partial(gradient, attention) if with_gradient else attention)
    return lambda: jax.block_until_ready(call(*x))


def torch_on_cpu(shape, with_gradient):
    import torch

    batch, length, heads, width = shape
    x = [torch.randn(batch, heads, length, width, requires_grad=with_gradient) for _ in range(3)]

    def run():
        attended = torch.nn.functional.scaled_dot_product_attention(*x)
        if with_gradient:
            attended.sum().backward()

    return run


def on_cpu(rounds):
    for shape in (*SHAPES, (4, 1024, 8, 8)):
        for what in ("forward", "gradient"):
            candidates = {
                "ddpm_jax": partial(jax_on_cpu, attend, shape, what == "gradient"),
                "jax.nn": partial(jax_on_cpu, jax.nn.dot_product_attention, shape, what == "gradient"),
                "PyTorch": partial(torch_on_cpu, shape, what == "gradient"),
            }
            report(f"attention {'x'.join(map(str, shape))} {what}", alternate(candidates, rounds), "PyTorch")


def main(options):
    if options.cpu:
        return on_cpu(options.rounds)
    _, mesh = open_topology(options.topology, digits.get_config())
    one = NamedSharding(jax.make_mesh((1,), ("data",), devices=mesh.devices.flat[:1]), PartitionSpec())
    ways = {"attend": attend, "flash": partial(padded, flash), "splash": partial(padded, splash)}
    rows = []
    for shape in SHAPES:
        x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=one)
        for name, way in ways.items():
            for what, function in (("forward", way), ("gradient", partial(gradient, way))):
                with observed(mesh.devices.flat[0]):
                    lowered = jax.jit(function, out_shardings=one).lower(x, x, x)
                program = hlo.analyse(lowered.compile(), 0, 1)
                hbm, peak = program.traffic / 1e6, program.peak_memory / 1e6
                rows.append({"shape": shape, "attention": name, "pass": what, "hbm_mb": hbm, "peak_mb": peak})
                print(f"{shape} {name:7} {what:9} {hbm:7.1f} MB through HBM, {peak:7.1f} MB at its peak")
    print_json("attention", topology=options.topology, rows=rows)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--topology", default="v5e:2x2")
    arguments.add_argument("--cpu", action="store_true", help="measure times on this machine's CPU instead")
    arguments.add_argument("--rounds", type=int, default=7, help="with --cpu")
    main(arguments.parse_args())
