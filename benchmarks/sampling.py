"""A step of sampling against diffusers' UNet and schedulers in PyTorch: networks of equal size, same batch, same CPU.

    pip install -e '.[peers]' && python benchmarks/sampling.py [--network digits] [--methods ddpm ddim dpmpp_2m]
    python benchmarks/sampling.py --process --batch 1       # from the command to the first picture

The networks are those of networks.py with random weights; each run makes 20 steps without guidance. "Network alone" is
our network's jit-compiled forward pass, called as often. A whole process starts Python, loads the weights that
diffusers has written and ours are imported from, samples a batch in 20 steps of DPM-Solver++ and exits; ours uses
compiled programs cached by a previous run.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from common import alternate, report
from networks import NETWORKS, WITH_PEER, make_peer, random_batch

METHODS = ("ddpm", "ddim", "dpmpp_2m")
STEPS = 20


def ours(network, method, batch_size, alone=False):
    import jax
    import jax.numpy as jnp
    import numpy as np

    config = NETWORKS[network].make_config()
    from ddpm_jax import config as config_lib
    from ddpm_jax.commands import cores
    from ddpm_jax.diffusion.samplers import Steps, run_table
    from ddpm_jax.runtime import parallel
    from ddpm_jax.sampling.generate import image_keys
    from ddpm_jax.training.objectives import make_objective

    config.train.batch_size = batch_size
    cores.use(config)
    mesh, model, output = parallel.make_mesh(), config_lib.make_model(config), config_lib.parameterization(config)
    params = jax.jit(lambda: model.init_params(0), out_shardings=parallel.replicated(mesh))()
    cond = random_batch(make_objective(config), batch_size, config.text.vocab_size)
    cond = {name: value for name, value in cond.items() if name != "image"} or None
    shape, sharding = (batch_size, *model.decoder.shape), parallel.batch_sharding(mesh)
    model_fn = model.model_fn(params, jax.device_put(cond, sharding))
    if alone:
        x_t, t = jax.device_put((jnp.zeros(shape), jnp.zeros(batch_size, jnp.int32)), sharding)
        compiled = jax.jit(lambda model_fn, x_t, t: model_fn(x_t, t)).lower(model_fn, x_t, t).compile()
        return lambda: [compiled(model_fn, x_t, t).block_until_ready() for _ in range(STEPS)]
    table = Steps(sampler=method, num_steps=STEPS).table(model.schedule, output.variance, output.prediction)
    keys = image_keys(mesh, 0, "image", np.arange(batch_size))
    return lambda: jax.block_until_ready(run_table(table, model_fn, keys, shape, output=output))


def diffusers(network, method, batch_size, compiled=False):
    import torch
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

    config = NETWORKS[network].make_config()
    net, make_cond = make_peer(config)
    net.eval()
    schedulers = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}
    scheduler, cond = schedulers[method](), make_cond(batch_size, "cpu")
    shape = (batch_size, config.data.channels, config.data.height, config.data.width)
    denoise = net
    with torch.no_grad():
        if cond:
            denoise, cond = net.denoise, net.encode(*cond)
    denoise = torch.compile(denoise) if compiled else denoise

    @torch.no_grad()
    def run():
        x = torch.randn(shape)
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            x = scheduler.step(denoise(x, t, *cond).sample, t, x).prev_sample

    return run


def write_folder(folder):
    """The CIFAR-10 network as diffusers writes it, with random weights."""
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler

    torch.manual_seed(0)
    DDPMPipeline(make_peer(NETWORKS["cifar10"].make_config())[0], DDPMScheduler()).save_pretrained(folder)


def sample_ours(folder, batch_size):
    from ddpm_jax.runtime import memory, parallel

    memory.keep_freed_memory()
    parallel.keep_compiled_programs(f"{folder}-compiled")
    import ddpm_jax

    run = ddpm_jax.load(f"{folder}-run")
    run.sample(batch_size, batch_size=batch_size, sampler="dpmpp_2m", num_steps=STEPS)


def sample_diffusers(folder, batch_size):
    from diffusers import DDPMPipeline, DPMSolverMultistepScheduler

    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline(batch_size, num_inference_steps=STEPS, output_type="np")


PROCESSES = {"ddpm_jax": sample_ours, "diffusers": sample_diffusers}


def compare_processes(batch_size, rounds):
    """Whole processes take turns, after an uncounted one of each."""
    from ddpm_jax.interop.workdirs import import_weights

    with tempfile.TemporaryDirectory() as temporary:
        folder = str(Path(temporary, "weights"))
        write_folder(folder)
        import_weights(folder, f"{folder}-run")
        seconds = {name: [] for name in PROCESSES}
        for _ in range(rounds + 1):
            for name, values in seconds.items():
                began = time.perf_counter()
                command = [sys.executable, __file__, "--once", name, "--folder", folder, "--batch", str(batch_size)]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                values.append(time.perf_counter() - began)
    seconds = {name: values[1:] for name, values in seconds.items()}
    report(f"sampling dpmpp_2m, {STEPS} steps, whole process", seconds, "diffusers", batch=batch_size)


def compare_steps(network, method, batch_size, rounds):
    what = (network, method, batch_size)
    candidates = {
        "ddpm_jax": partial(ours, *what),
        "ddpm_jax, network alone": partial(ours, *what, alone=True),
        "diffusers": partial(diffusers, *what),
        "diffusers, compiled": partial(diffusers, *what, compiled=True),
    }
    seconds = alternate(candidates, rounds, steps=STEPS)
    report(f"sampling {network} {method}, a step", seconds, "diffusers", batch=batch_size)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--network", choices=WITH_PEER, default="cifar10")
    arguments.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--batch", type=int, help="images; by default those of networks.py")
    arguments.add_argument("--process", action="store_true", help="whole processes of the CIFAR-10 network")
    arguments.add_argument("--once", choices=list(PROCESSES), help=argparse.SUPPRESS)
    arguments.add_argument("--folder", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    batch_size = options.batch or NETWORKS[options.network].make_config().train.batch_size
    if options.once:
        PROCESSES[options.once](options.folder, batch_size)
    elif options.process:
        compare_processes(batch_size, options.rounds)
    else:
        for method in options.methods:
            compare_steps(options.network, method, batch_size, options.rounds)
