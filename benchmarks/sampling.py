"""Sampling from the paper's CIFAR-10 network against diffusers' pipeline: same weights, same batch, same CPU.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --process --batch 1       # from the command to the first picture

diffusers writes its folder with random weights, and ours are imported from it. The timed steps are the first ten of
1000-step DDPM, 50-step DDIM and 20-step DPM-Solver++. A whole process starts Python, loads the weights, samples a batch
in 20 steps of DPM-Solver++ and exits; ours uses compiled programs cached by a previous run.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from common import alternate, report

METHODS = {"ddpm": 1000, "ddim": 50, "dpmpp_2m": 20}
TIMED = 10


def write_folder(folder):
    """google/ddpm-cifar10-32's configuration, with random weights."""
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        attention_head_dim=None,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)


def ours(folder, method, batch, calls=None):
    """A function that samples a batch, or does its first calls."""
    from ddpm_jax.runtime import memory, parallel

    memory.keep_freed_memory()
    parallel.keep_compiled_programs(f"{folder}-compiled")
    import jax

    import ddpm_jax

    run = ddpm_jax.load(f"{folder}-run")
    schedule, options = run.schedule, {"sampler": method, "num_steps": METHODS[method]}
    if calls is not None:
        from ddpm_jax.diffusion.samplers import plan
        from ddpm_jax.diffusion.tables import DEFAULT_SPACING

        t = plan(schedule, num_steps=METHODS[method], spacing=DEFAULT_SPACING[method]).t.tolist()
        options = {"sampler": method, "timesteps": t[:calls], "t_end": t[calls]}
    shape = (batch, 32, 32, 3)
    model_fn = run.model_fn
    return lambda: jax.block_until_ready(ddpm_jax.sample(schedule, model_fn, jax.random.key(0), shape, **options))


def diffusers(folder, method, batch, calls=None):
    import torch
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DPMSolverMultistepScheduler

    pipeline = DDPMPipeline.from_pretrained(folder)
    if method == "ddim":
        pipeline = DDIMPipeline(pipeline.unet, DDIMScheduler.from_config(pipeline.scheduler.config))
    elif method == "dpmpp_2m":
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    scheduler, whole = pipeline.scheduler, pipeline.scheduler.set_timesteps

    def first_timesteps(*arguments, **options):
        whole(*arguments, **options)
        scheduler.timesteps = scheduler.timesteps[:calls]

    scheduler.set_timesteps = first_timesteps
    generator = torch.Generator().manual_seed(0)
    return lambda: pipeline(batch, generator, num_inference_steps=METHODS[method], output_type="np")


CANDIDATES = {"ddpm_jax": ours, "diffusers": diffusers}


def process_seconds(folder, batch, rounds):
    """Seconds of whole processes, which take turns, after an uncounted one of each."""
    seconds = {name: [] for name in CANDIDATES}
    for _ in range(rounds + 1):
        for name, values in seconds.items():
            began = time.perf_counter()
            command = [sys.executable, __file__, "--once", name, "--folder", folder, "--batch", str(batch)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            values.append(time.perf_counter() - began)
    return {name: values[1:] for name, values in seconds.items()}


def main(options):
    folder = str(Path(tempfile.mkdtemp()) / "weights")
    write_folder(folder)
    from ddpm_jax.interop.workdirs import import_weights

    import_weights(folder, f"{folder}-run")
    for method, steps in () if options.process else METHODS.items():
        candidates = {name: partial(setup, folder, method, options.batch, TIMED) for name, setup in CANDIDATES.items()}
        found = alternate(candidates, options.rounds)
        per_step = {name: [s / TIMED for s in values] for name, values in found.items()}
        report(f"sampling {method}, {TIMED} of {steps} steps, a step", per_step, "diffusers", batch=options.batch)
    found = process_seconds(folder, options.batch, min(options.rounds, 3))
    report("sampling dpmpp_2m, 20 steps, whole process", found, "diffusers", batch=options.batch)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--process", action="store_true", help="time only the whole processes")
    arguments.add_argument("--once", choices=list(CANDIDATES), help=argparse.SUPPRESS)
    arguments.add_argument("--folder", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.once:
        CANDIDATES[options.once](options.folder, "dpmpp_2m", options.batch)()
    else:
        main(options)
