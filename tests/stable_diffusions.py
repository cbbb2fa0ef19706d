"""A narrow Stable Diffusion with random weights, as a diffusers folder."""

import json
import tempfile
from pathlib import Path

import numpy as np
import single_files
from clips import VOCAB_SIZE, write_tokenizer
from safetensors.numpy import save_file

import ddpm_jax
from configs import finetune
from ddpm_jax.interop import workdirs
from ddpm_jax.pipeline import load

UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
AUTOENCODER = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
}
TEXT_ENCODER = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 20,
    "bos_token_id": 512,
    "eos_token_id": 513,
    "pad_token_id": 513,
}
# As the files of Stable Diffusion 1.x have it.
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULER = {**SCHEDULE, "skip_prk_steps": True, "set_alpha_to_one": False}


def write_narrow(folder, file, in_channels=4):
    """Writes a narrow Stable Diffusion with random weights, without PyTorch: as a diffusers folder, for 64x64 pictures,
    and as a single file; with 9 in_channels, an inpainting network."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        parts = (
            single_files.unet_shapes(in_channels=in_channels),
            single_files.autoencoder_shapes(),
            single_files.text_shapes(tokens=VOCAB_SIZE, length=20),
        )
        random = [
            {name: 0.1 * value for name, value in single_files.random(shapes, seed).items()}
            for seed, shapes in enumerate(parts)
        ]
        save_file(single_files.checkpoint(*random, version="1.x"), file)
        tokenizer = write_tokenizer(place / "tokenizer", max_length=20)
        run = load(workdirs.import_weights(str(file), place / "run", tokenizer=tokenizer))
        workdirs.export_weights(run, folder)
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": 8}))


def save(folder, scheduler="PNDMScheduler", fields=SCHEDULER, seed=0, text_encoder=None, **unet):
    """Writes the pipeline with diffusers and returns it. Needs PyTorch, diffusers and transformers.

    Args:
      folder: to write.
      scheduler, fields: its class and its config.
      seed: of the weights.
      text_encoder, unet: changes to the configs `TEXT_ENCODER` and `UNET`.
    """
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    tokens = write_tokenizer(folder.with_name(f"{folder.name}_tokens"), max_length=20)
    (tokens / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|endoftext|>"}))
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**AUTOENCODER),
        text_encoder=CLIPTextModel(CLIPTextConfig(**{**TEXT_ENCODER, **(text_encoder or {})})).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(tokens),
        unet=diffusers.UNet2DConditionModel(**{**UNET, **unet}),
        scheduler=getattr(diffusers, scheduler)(**fields),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


def fine_tune(path, start, pictures, **adapters):
    """Four steps from the workdir `start`, with a checkpoint after two; adapters: fields of config.lora.

    Args:
      path: of the new workdir.
      start: of an imported pipeline, for pictures of 16x16.
      pictures: the .npz file to write them to, with captions.
    """
    images = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), np.uint8)
    np.savez(pictures, image=images, caption=np.array([f"picture {number}" for number in range(16)]))
    config = finetune.get_config(str(start))
    config.data.update(source="array", path=str(pictures), height=16, width=16)
    config.optimizer.update(learning_rate=1e-2, warmup_steps=0)
    config.train.update(batch_size=8, num_steps=4, ema_decays=(0.99,))
    config.lora.update(adapters)
    config.log.update(every_steps=2, sample_every_steps=0, tensorboard=False)
    config.checkpoint.every_steps = 2
    config.sample.update(num_images=2, num_steps=2)
    ddpm_jax.train(config, path)
    return config
