"""LoRA changes added to tensors, as diffusers' `fuse_lora` does it."""

import numpy as np


def merged(tensors, changes, weight):
    """Only the changed tensors, W + weight * alpha / r * up @ down, in W's precision."""
    result = {}
    for module, update in changes.items():
        value = tensors[f"{module}.weight"]
        changed = value.astype(np.float32) + update.delta(weight).reshape(value.shape)
        result[f"{module}.weight"] = changed.astype(value.dtype)
    return result
