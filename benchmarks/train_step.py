"""A whole training step: forward, backward, clipping, Adam, EMA.

    pip install -e '.[peers]' && python benchmarks/train_step.py [--network cifar10|cifar10_64|small|digits|numbers]
    python benchmarks/train_step.py --batch 128 --dtype bfloat16 --steps 20      # on a GPU

Ours against diffusers' UNet2DModel of equal size in PyTorch, eager and with torch.compile, on the same device:
the paper's CIFAR-10 network at batch 16 with dropout 0.1, the same with 64 channels, or the network of
configs/digits.py at batch 64. For `numbers`, the text-to-image network of configs/numbers.py with its trained text
encoder, the peer is diffusers' UNet2DConditionModel with other attention blocks (captioned_unet.py). PyTorch computes
bfloat16 with autocast; on a GPU it uses channels-last images, cuDNN's fastest algorithms, and TF32 for float32 as JAX
does.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from common import alternate, planned, report

NETWORKS = {
    "cifar10": {"parameters": 35_746_307, "batch": 16, "shape": (32, 32, 3)},
    "cifar10_64": {"parameters": 8_952_067, "batch": 16, "shape": (32, 32, 3)},
    "small": {"parameters": 1_112_801, "batch": 64, "shape": (28, 28, 1)},
    "digits": {"parameters": 701_345, "batch": 64, "shape": (8, 8, 1)},
    "numbers": {"parameters": 864_065, "batch": 64, "shape": (8, 16, 1)},
}


def ours(network, batch_size, dtype, steps):
    import jax
    import numpy as np

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from configs import cifar10, digits, numbers
    from ddpm_jax import config as config_lib
    from ddpm_jax.commands import cores
    from ddpm_jax.runtime import parallel
    from ddpm_jax.training.objectives import make_objective
    from ddpm_jax.training.state import create_state
    from ddpm_jax.training.step import Metrics, make_train_step

    config = {"digits": digits, "small": digits, "numbers": numbers}.get(network, cifar10).get_config()
    if network == "small":
        config.data.update(height=28, width=28)
        config.model.update(channel_multipliers=(1, 2, 2), attention_resolutions=(14,))
    if network == "cifar10_64":
        config.model.channels = 64
    config.model.dtype = dtype
    cores.use(config)
    shape, count = (NETWORKS[network][name] for name in ("shape", "parameters"))
    objective, mesh = make_objective(config), parallel.make_mesh()
    optimizer = config_lib.make_optimizer(config)

    def start():
        return create_state(objective.init_params(0), optimizer, (0.9999,)), Metrics.zero()

    step = make_train_step(objective, optimizer, mesh, **config_lib.step_options(config))
    images = np.random.default_rng(0).integers(0, 256, (batch_size, *shape), np.uint8)
    batch = {"image": images}
    if network == "numbers":
        length, told = config.text.max_length, 9  # tokens of a caption, with and without padding
        batch["ids"] = np.random.default_rng(1).integers(0, config.text.vocab_size, (batch_size, length), np.int32)
        batch["ids_mask"] = np.broadcast_to(np.arange(length) < told, (batch_size, length))
    batch = jax.device_put(batch, parallel.batch_sharding(mesh))
    create = jax.jit(start, out_shardings=parallel.replicated(mesh), compiler_options=parallel.run_once_options())
    carry = list(create())
    assert sum(p.size for p in jax.tree.leaves(carry[0].params)) == count

    compiled = step.lower(*carry, batch).compile()

    def run():
        for _ in range(steps):
            carry[:] = compiled(*carry, batch)
        jax.block_until_ready(carry)

    run.facts = planned(compiled, carry[0].params)
    return run


def diffusers_unet(network):
    """diffusers' UNet2DModel of equal size."""
    from diffusers import UNet2DModel

    height, _, channels = NETWORKS[network]["shape"]
    if network == "digits":
        options = {
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        }
    elif network == "small":
        options = {
            "block_out_channels": (32, 64, 64),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        }
    else:
        base = 64 if network == "cifar10_64" else 128
        options = {
            "block_out_channels": (base, 2 * base, 2 * base, 2 * base),
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "dropout": 0.1,
        }
    return UNet2DModel(
        sample_size=height,
        in_channels=channels,
        out_channels=channels,
        attention_head_dim=None,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        **options,
    )


def diffusers(network, batch_size, dtype, steps, compiled=False):
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    (height, width, channels), count = (NETWORKS[network][name] for name in ("shape", "parameters"))
    if network == "numbers":
        from captioned_unet import CaptionedUNet, captions

        net, cond = CaptionedUNet(), captions(batch_size, device)
    else:
        net, cond = diffusers_unet(network), ()
    parameters = list(net.parameters())
    assert sum(p.numel() for p in parameters) == count
    layout = torch.channels_last if device == "cuda" else torch.contiguous_format
    net.to(device, memory_format=layout).train()
    optimizer = torch.optim.Adam(parameters, lr=2e-4)
    average = [p.detach().clone() for p in parameters]
    x_0 = (torch.rand(batch_size, channels, height, width, device=device) * 2 - 1).to(memory_format=layout)
    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, device=device), 0)
    model = torch.compile(net) if compiled else net

    def step():
        t, noise = torch.randint(0, 1000, (batch_size,), device=device), torch.randn_like(x_0)
        a = alphas_cumprod[t].reshape(-1, 1, 1, 1)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            predicted = model(a.sqrt() * x_0 + (1 - a).sqrt() * noise, t, *cond).sample
        loss = torch.mean((predicted.float() - noise) ** 2)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1e-4)
        return loss

    def run():
        for _ in range(steps):
            loss = step()
        loss.item()

    return run


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--network", choices=list(NETWORKS), default="cifar10")
    arguments.add_argument("--batch", type=int, help="images per step; by default 16, for digits and numbers 64")
    arguments.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="to compute in")
    arguments.add_argument(
        "--steps", type=int, default=1, help="of each call; several on a GPU, where one is too short"
    )
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--only-ours", action="store_true", help="without the peer, where PyTorch is not installed")
    options = arguments.parse_args()
    batch, steps = options.batch or NETWORKS[options.network]["batch"], options.steps
    what = {"network": options.network, "batch_size": batch, "dtype": options.dtype, "steps": steps}
    candidates = {"ddpm_jax": partial(ours, **what)}
    if not options.only_ours:
        candidates["diffusers, compiled"] = partial(diffusers, **what, compiled=True)
        candidates["diffusers"] = partial(diffusers, **what)
    # Each has its own process, and on a GPU they share its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    seconds = {
        name: [value / steps for value in values] for name, values in alternate(candidates, options.rounds).items()
    }
    report(
        f"train_step {options.network} batch {batch} {options.dtype}",
        seconds,
        against=list(candidates)[-1],
        batch=batch,
    )
