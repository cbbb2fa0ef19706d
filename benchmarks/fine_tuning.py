"""A step of fine-tuning a narrow Stable Diffusion against PyTorch: the same weights, batch and machine.

    pip install -e '.[peers]' && python benchmarks/fine_tuning.py
    python benchmarks/fine_tuning.py --rank 0       # the whole network instead of LoRA adapters

diffusers writes a folder with the UNet of Stable Diffusion 1.5 at a fifth of its width (random weights), and ours is
imported from it. A step reads the latents' posteriors and the texts' states, as ours keeps them; draws latents, noise
and timesteps; and ends with clipping, AdamW and the moving average. PyTorch trains PEFT's adapters, eager and with
torch.compile.
"""

import argparse
import sys
import tempfile
from functools import partial

from common import alternate, planned, report

WIDTHS, STATES = (64, 128, 256, 256), 192
STEPS = 5  # of each call
ADAPTED = ["to_q", "to_k", "to_v", "to_out.0"]
LEARNING_RATE, EMA_DECAY, CLIP = 1e-4, 0.999, 1.0


def write_folder(folder):
    """Stable Diffusion 1.5's UNet at a fifth of its width, with a small autoencoder and text encoder."""
    import stable_diffusion
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    stable_diffusion.write_folder(
        folder,
        unet=UNet2DConditionModel(sample_size=32, block_out_channels=WIDTHS, cross_attention_dim=STATES),
        vae=AutoencoderKL(
            block_out_channels=(32,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            sample_size=256,
        ),
        text=CLIPTextModel(
            CLIPTextConfig(
                hidden_size=STATES,
                intermediate_size=4 * STATES,
                num_hidden_layers=2,
                num_attention_heads=4,
                eos_token_id=49407,
                bos_token_id=49406,
            )
        ),
    )


def ours(workdir, rank, batch_size):
    import dataclasses

    import jax
    import numpy as np

    import ddpm_jax
    from ddpm_jax import config as config_lib
    from ddpm_jax.commands import cores
    from ddpm_jax.runtime import parallel
    from ddpm_jax.runtime import workdir as workdir_lib
    from ddpm_jax.training.objectives import Diffusion
    from ddpm_jax.training.state import create_state
    from ddpm_jax.training.step import Metrics, make_train_step

    config = workdir_lib.read_config(workdir)
    config.lora.rank = rank
    config.train.batch_size = batch_size
    config.optimizer.update(name="adamw", learning_rate=LEARNING_RATE, warmup_steps=0, grad_clip=CLIP, options={})
    cores.use(config)
    run, mesh = ddpm_jax.load(workdir), parallel.make_mesh()
    adapted = {"lora_rank": rank, "lora_scale": 1.0} if rank else {}
    objective = Diffusion(run.model, "uniform", config_lib.loss_options(config), **adapted)
    optimizer, frozen = config_lib.make_optimizer(config), run.params if rank else None
    state = create_state(objective.init_params(0) if rank else run.params, optimizer, (EMA_DECAY,))
    state = dataclasses.replace(state, frozen=frozen)
    metrics = Metrics.zero()
    carry = list(jax.device_put((state, metrics), parallel.replicated(mesh)))
    rng = np.random.default_rng(0)
    batch = {
        name: np.ones((batch_size, *of.shape), bool)
        if of.dtype == bool
        else rng.random((batch_size, *of.shape)).astype(of.dtype)
        for name, of in objective.reads.items()
    }
    batch = jax.device_put(batch, parallel.batch_sharding(mesh))
    step = make_train_step(objective, optimizer, mesh, **config_lib.step_options(config))
    compiled = step.lower(*carry, batch).compile()

    def call():
        for _ in range(STEPS):
            carry[:] = compiled(*carry, batch)
        jax.block_until_ready(carry)

    call.facts = planned(compiled, carry[0].params)
    return call


def theirs(folder, rank, batch_size, compiled=False):
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as in JAX
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    if rank:
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=ADAPTED))
    unet.to(device).train()
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    average = [parameter.detach().clone() for parameter in trained]
    mean, deviation = torch.rand(2, batch_size, 4, 32, 32, device=device)
    states = torch.rand(batch_size, 77, STATES, device=device)
    model = torch.compile(unet) if compiled else unet

    def step():
        x_0 = 0.18215 * (mean + deviation * torch.randn_like(mean))
        t, noise = torch.randint(0, 1000, (batch_size,), device=device), torch.randn_like(x_0)
        found = model(scheduler.add_noise(x_0, noise, t), t, states).sample
        loss = torch.nn.functional.mse_loss(found, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, trained, 1 - EMA_DECAY)
        return loss

    def call():
        for _ in range(STEPS):
            loss = step()
        loss.item()

    call.facts = {"parameters": sum(parameter.numel() for parameter in trained)}
    return call


def main(options):
    from ddpm_jax.interop.workdirs import import_weights

    facts, what = {}, {"rank": options.rank, "batch_size": options.batch}
    with tempfile.TemporaryDirectory() as work:
        folder, workdir = f"{work}/narrow", f"{work}/run"
        write_folder(folder)
        import_weights(folder, workdir)
        candidates = {
            "ddpm_jax": partial(ours, workdir, **what),
            "PyTorch": partial(theirs, folder, **what),
        }
        if not options.only_eager:  # torch.compile takes ten minutes
            candidates["PyTorch, compiled"] = partial(theirs, folder, **what, compiled=True)
        seconds = alternate(candidates, options.rounds, facts, STEPS)
    counts = {told["parameters"] for told in facts.values()}
    assert len(counts) == 1, counts
    kind = f"LoRA of rank {options.rank}" if options.rank else "the whole network"
    report(f"fine_tuning {kind} batch {options.batch}", seconds, "PyTorch", **facts)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rank", type=int, default=16, help="of the adapters; 0: the whole network is trained")
    arguments.add_argument("--batch", type=int, default=4)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--only-eager", action="store_true", help="without torch.compile")
    sys.exit(main(arguments.parse_args()))
