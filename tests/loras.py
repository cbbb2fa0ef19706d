"""Random LoRA changes of a narrow Stable Diffusion, and changes added to tensors as diffusers' `fuse_lora` does it."""

import numpy as np
import single_files

from ddpm_jax.interop import lora


def make_lora(seed, text=True):
    rng = np.random.default_rng(seed)

    def update(shape):
        out, *inner = shape
        down, up = ((2, *inner), (out, 2, *[1] * (len(inner) - 1)))
        return lora.Update(*(0.1 * rng.standard_normal(size).astype(np.float32) for size in (down, up)), 3.0)

    block = "down_blocks.0.attentions.0"
    in_unet = ("conv_in", f"{block}.proj_in", f"{block}.transformer_blocks.0.attn2.to_k", "time_embedding.linear_1")
    in_text = ("text_model.encoder.layers.1.self_attn.q_proj", "text_model.encoder.layers.0.mlp.fc2")
    return lora.Lora(
        {module: update(single_files.UNET[f"{module}.weight"]) for module in in_unet},
        {module: update(single_files.TEXT[f"{module}.weight"]) for module in (in_text if text else ())},
    )


def merged(tensors, changes, weight):
    """Only the changed tensors, W + weight * alpha / r * up @ down, in W's precision."""
    result = {}
    for module, update in changes.items():
        value = tensors[f"{module}.weight"]
        changed = value.astype(np.float32) + update.delta(weight).reshape(value.shape)
        result[f"{module}.weight"] = changed.astype(value.dtype)
    return result
