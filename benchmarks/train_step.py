"""A whole CIFAR-10 training step: forward, backward, clipping, Adam, EMA. Batch 16, float32, dropout 0.1.

    pip install -e '.[peers]' && python benchmarks/train_step.py

Ours against diffusers' UNet2DModel with the same 35,746,307 parameters in PyTorch (eager), on the same CPU.
"""

import argparse

from common import alternate, report

BATCH = 16


def ours():
    from ddpm_jax import parallel

    parallel.keep_freed_memory()
    import jax
    import numpy as np

    from ddpm_jax import config as config_lib
    from ddpm_jax.training.state import create_state, init_params
    from ddpm_jax.training.step import Metrics, make_train_step

    config = config_lib.default_config()
    net, mesh = config_lib.make_model(config, 10), parallel.make_mesh()
    optimizer = config_lib.make_optimizer(config)
    whole = parallel.replicated(mesh)

    def create():
        return create_state(init_params(net, (32, 32, 3), 0), optimizer, (0.9999,)), Metrics.zero()

    step = make_train_step(
        net,
        config_lib.make_schedule_from(config),
        optimizer,
        mesh,
        seed=0,
        flip=True,
        **config_lib.loss_options(config),
    )
    images = np.random.default_rng(0).integers(0, 256, (BATCH, 32, 32, 3), np.uint8)
    batch = {"image": images, "label": np.zeros(BATCH, np.int32)}
    batch = jax.device_put(batch, parallel.batch_sharding(mesh))
    carry = list(jax.jit(create, out_shardings=whole)())
    assert sum(p.size for p in jax.tree.leaves(carry[0].params)) == 35_746_307

    def run():
        carry[:] = jax.block_until_ready(step(*carry, batch))

    return run


def diffusers():
    import torch
    from diffusers import UNet2DModel

    net = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        dropout=0.1,
    )
    parameters = list(net.parameters())
    assert sum(p.numel() for p in parameters) == 35_746_307
    net.train()
    optimizer = torch.optim.Adam(parameters, lr=2e-4)
    average = [p.detach().clone() for p in parameters]
    x_0 = torch.rand(BATCH, 3, 32, 32) * 2 - 1
    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)

    def run():
        t, noise = torch.randint(0, 1000, (BATCH,)), torch.randn_like(x_0)
        a = alphas_cumprod[t].reshape(-1, 1, 1, 1)
        loss = torch.mean((net(a.sqrt() * x_0 + (1 - a).sqrt() * noise, t).sample - noise) ** 2)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1e-4)
        loss.item()

    return run


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--only-ours", action="store_true", help="without the peer, where PyTorch is not installed")
    options = arguments.parse_args()
    candidates = {"ddpm_jax": ours} if options.only_ours else {"ddpm_jax": ours, "diffusers": diffusers}
    seconds = alternate(candidates, options.rounds)
    report("train_step cifar10 batch 16 float32", seconds, against=list(candidates)[-1], batch=BATCH)
