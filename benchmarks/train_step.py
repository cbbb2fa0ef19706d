"""A whole training step: forward, backward, clipping, Adam, EMA.

    pip install -e '.[peers]' && python benchmarks/train_step.py [--network digits]
    python benchmarks/train_step.py --batch 128 --dtype bfloat16 --steps 20      # on a GPU

Ours against diffusers' network of equal size in PyTorch (networks.py), eager and with torch.compile, on the same
device: the paper's CIFAR-10 network at batch 16, the same with 64 channels, or a network of configs/ at its own batch.
`small` is the digits' network for 28x28 pictures. PyTorch computes bfloat16 with autocast; on a GPU it uses
channels-last images, cuDNN's fastest algorithms, and TF32 for float32 as JAX does.
"""

import argparse
import os
from functools import partial

from common import alternate, planned, report
from networks import NETWORKS, WITH_PEER, make_peer, random_batch


def ours(network, batch_size, dtype, steps):
    import jax

    config = NETWORKS[network].make_config()
    from ddpm_jax import config as config_lib
    from ddpm_jax.commands import cores
    from ddpm_jax.runtime import parallel
    from ddpm_jax.training.objectives import make_objective
    from ddpm_jax.training.state import create_state
    from ddpm_jax.training.step import Metrics, make_train_step

    config.model.dtype = dtype
    cores.use(config)
    objective, mesh = make_objective(config), parallel.make_mesh()
    optimizer = config_lib.make_optimizer(config)

    def start():
        return create_state(objective.init_params(0), optimizer, (0.9999,)), Metrics.zero()

    step = make_train_step(objective, optimizer, mesh, **config_lib.step_options(config))
    batch = random_batch(objective, batch_size or config.train.batch_size, config.text.vocab_size)
    batch = jax.device_put(batch, parallel.batch_sharding(mesh))
    create = jax.jit(start, out_shardings=parallel.replicated(mesh), compiler_options=parallel.run_once_options())
    carry = list(create())
    if (parameters := NETWORKS[network].parameters) is not None:
        assert sum(p.size for p in jax.tree.leaves(carry[0].params)) == parameters
    compiled = step.lower(*carry, batch).compile()

    def run():
        for _ in range(steps):
            carry[:] = compiled(*carry, batch)
        jax.block_until_ready(carry)

    run.facts = planned(compiled, carry[0].params)
    return run


def diffusers(network, batch_size, dtype, steps, compiled=False):
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    config = NETWORKS[network].make_config()
    batch_size = batch_size or config.train.batch_size
    net, make_cond = make_peer(config)
    cond, parameters = make_cond(batch_size, device), list(net.parameters())
    assert sum(p.numel() for p in parameters) == NETWORKS[network].parameters
    layout = torch.channels_last if device == "cuda" else torch.contiguous_format
    net.to(device, memory_format=layout).train()
    optimizer = torch.optim.Adam(parameters, lr=2e-4)
    average = [p.detach().clone() for p in parameters]
    shape = (batch_size, config.data.channels, config.data.height, config.data.width)
    x_0 = (torch.rand(shape, device=device) * 2 - 1).to(memory_format=layout)
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
    arguments.add_argument("--network", choices=WITH_PEER, default="cifar10")
    arguments.add_argument("--batch", type=int, help="images per step; by default those of networks.py")
    arguments.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="to compute in")
    arguments.add_argument("--steps", type=int, default=5, help="of each call, one after another as in training")
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--only-ours", action="store_true", help="without the peer, where PyTorch is not installed")
    options = arguments.parse_args()
    steps, network = options.steps, NETWORKS[options.network]
    batch = options.batch or network.make_config().train.batch_size
    what = {"network": options.network, "batch_size": batch, "dtype": options.dtype, "steps": steps}
    candidates = {"ddpm_jax": partial(ours, **what)}
    if not options.only_ours:
        candidates["diffusers, compiled"] = partial(diffusers, **what, compiled=True)
        candidates["diffusers"] = partial(diffusers, **what)
    # Each has its own process, and on a GPU they share its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    seconds = alternate(candidates, options.rounds, steps=steps)
    title = f"train_step {options.network} batch {batch} {options.dtype}"
    report(title, seconds, against=list(candidates)[-1], batch=batch)
