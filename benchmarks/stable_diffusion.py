"""Stable Diffusion 1.5 part by part against diffusers: the same weights and dtype, the same machine.

    pip install -e '.[peers]' && python benchmarks/stable_diffusion.py
    python benchmarks/stable_diffusion.py --source stable-diffusion-v1-5/stable-diffusion-v1-5     # published weights
    python benchmarks/stable_diffusion.py --parts unet_32 unet_64
    python benchmarks/stable_diffusion.py --parts whole --batch 8 --dtype bfloat16 --rounds 5 --compiled     # on a GPU

Without `--source`, diffusers writes a folder of SD 1.5's configuration with random weights (4.3 GB), and both open
it. The parts are the text encoder on two texts (five calls in a row), the UNet on two inputs at 32x32 and at 64x64
latents (pictures of 256x256 and 512x512), the decoding of two pictures of 512x512, and a whole picture of 512x512 by
20 steps of `dpmpp_2m` with guidance. `--batch` changes these numbers. The peak of each process's memory stands beside
its time. diffusers uses the GPU if there is one.
"""

import argparse
import itertools
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

from common import alternate, report

PROMPT = "a red bicycle by the sea"
PARTS = ("text", "unet_32", "unet_64", "decode", "whole")
TEXT_CALLS = 5  # of the text encoder, one after another


def write_sd15(folder):
    """Stable Diffusion 1.5's configuration, with random weights."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            projection_dim=768,
            eos_token_id=49407,
            bos_token_id=49406,
        )
    )
    write_folder(folder, unet, vae, text)


def write_folder(folder, unet, vae, text):
    """A pipeline of these networks, with Stable Diffusion's schedule and a tokenizer of letters and bytes."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    letters = [chr(i) for i in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    letters += [chr(256 + i) for i in range(68)]
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {word: i for i, word in enumerate(words)} | {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    files = Path(tempfile.mkdtemp())
    (files / "vocab.json").write_text(json.dumps(vocabulary))
    (files / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(files / "vocab.json"), str(files / "merges.txt"), model_max_length=77)
    StableDiffusionPipeline(
        vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    ).save_pretrained(folder)


def picture(sample):
    """sample(20 steps), warmed up by two steps."""

    def run():
        sample(20)

    run.warm_up = partial(sample, 2)
    return run


def ours(workdir, part, batch, dtype):
    from ddpm_jax.runtime import memory, parallel

    memory.keep_freed_memory()
    parallel.keep_compiled_programs(f"{workdir}-compiled")
    import jax
    import numpy as np

    import ddpm_jax

    run = ddpm_jax.load(workdir, dtype=dtype)
    if part == "whole":
        options = {"prompts": [PROMPT], "guidance_scale": 7.5, "sampler": "dpmpp_2m", "batch_size": batch}
        return picture(lambda num_steps: run.sample(batch, num_steps=num_steps, **options))
    if part == "decode":
        latents = np.random.default_rng(0).standard_normal((batch, 64, 64, 4), np.float32)
        return lambda: run.model.decoder.decode(latents)
    if part == "text":
        number = itertools.count()  # the states of a text are cached

        def encode():
            for _ in range(TEXT_CALLS):
                run.condition.texts.arrays([f"{PROMPT} {next(number)}" for _ in range(batch)])

        return encode
    size = int(part.removeprefix("unet_"))
    x = jax.random.normal(jax.random.key(0), (batch, size, size, 4))
    states = jax.random.normal(jax.random.key(1), (batch, 77, 768))
    t = jax.numpy.full(batch, 500)
    call = jax.jit(lambda params, x, t, states: run.net.apply({"params": params}, x, t, {"tokens": states}))
    return lambda: jax.block_until_ready(call(run.params, x, t, states))


def diffusers(folder, part, batch, dtype, compiled=False):
    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, dtype)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=dtype)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    unused = {"text": ("unet", "vae"), "decode": ("unet", "text_encoder"), "whole": ()}
    for name in unused.get(part, ("vae", "text_encoder")):  # ours reads a part when it is first needed
        setattr(pipeline, name, None)
    pipeline.to(device)
    if compiled:
        for name in ("unet", "vae", "text_encoder"):
            if getattr(pipeline, name) is not None:
                getattr(pipeline, name).compile()
        if pipeline.vae is not None:  # its decoding does not go through `forward`
            pipeline.vae.decoder.compile()
    if part == "whole":
        options = {"height": 512, "width": 512, "num_images_per_prompt": batch}
        options["generator"] = torch.Generator(device).manual_seed(0)
        return picture(lambda num_steps: pipeline(PROMPT, num_inference_steps=num_steps, **options))
    size = 64 if part == "decode" else int(part.removeprefix("unet_")) if part.startswith("unet") else 0
    x, states = (torch.randn(batch, *shape, device=device, dtype=dtype) for shape in ((4, size, size), (77, 768)))
    calls = {
        "text": lambda: [pipeline.text_encoder(ids) for _ in range(TEXT_CALLS)],
        "decode": lambda: pipeline.vae.decode(x),
    }
    if part == "text":
        texts = [PROMPT] * batch
        ids = pipeline.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids.to(device)
    call = calls.get(part, lambda: pipeline.unet(x, 500, states))

    def run():
        with torch.inference_mode():
            call()
            if device == "cuda":
                torch.cuda.synchronize()

    return run


def main(options):
    from ddpm_jax.interop.workdirs import import_weights

    with tempfile.TemporaryDirectory() as work:
        folder, workdir = options.source, f"{work}/run"
        if folder is None:
            folder = f"{work}/sd15"
            write_sd15(folder)
        import_weights(folder, workdir)
        for part in options.parts:
            is_whole, facts = part == "whole", {}
            batch = options.batch or (1 if is_whole else 2)
            what = {"part": part, "batch": batch, "dtype": options.dtype}
            candidates = {
                "ddpm_jax": partial(ours, workdir, **what),
                "diffusers": partial(diffusers, folder, **what),
            }
            if options.compiled:
                candidates["diffusers, compiled"] = partial(diffusers, folder, **what, compiled=True)
            steps = TEXT_CALLS if part == "text" else 1
            seconds = alternate(candidates, options.rounds or (1 if is_whole else 3), facts, steps)
            report(f"stable_diffusion {part} batch {batch} {options.dtype}", seconds, "diffusers", **facts)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--source", help="a diffusers folder or a repository's name; by default random weights")
    arguments.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    arguments.add_argument("--batch", type=int, help="inputs at a time; by default 2, and 1 whole picture")
    arguments.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights and arithmetic"
    )
    arguments.add_argument("--rounds", type=int, help="by default 3, and 1 of whole pictures")
    arguments.add_argument("--compiled", action="store_true", help="diffusers with torch.compile, too")
    sys.exit(main(arguments.parse_args()))
