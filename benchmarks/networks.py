"""The networks that the benchmarks compare with PyTorch: a config of ours, and diffusers' network of equal size.

diffusers' `UNet2DModel` is the peer of an unconditional config, `captioned_unet.CaptionedUNet` that of a captioned one.
PyTorch is imported only where a peer is made.
"""

import dataclasses
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for configs
TOLD = 9  # tokens of a caption, the others are padding


@dataclasses.dataclass(frozen=True)
class Network:
    """A config with changes; and the number of parameters that both networks must have, or None: there is no peer."""

    config: str
    parameters: int | None = None
    changes: dict = dataclasses.field(default_factory=dict)

    def make_config(self):
        config = import_module(f"configs.{self.config}").get_config()
        config.update_from_flattened_dict(self.changes)
        return config


SMALL = {
    "data.height": 28,
    "data.width": 28,
    "model.channel_multipliers": (1, 2, 2),
    "model.attention_resolutions": (14,),
}
NETWORKS = {
    "cifar10": Network("cifar10", 35_746_307, {"train.batch_size": 16}),
    "cifar10_64": Network("cifar10", 8_952_067, {"train.batch_size": 16, "model.channels": 64}),
    "small": Network("digits", 1_112_801, SMALL),
    "digits": Network("digits", 701_345),
    "numbers": Network("numbers", 864_065),
    "folder_small": Network("folder_small", 1_744_259),
    "captions_small": Network("captions_small", 2_166_467),
    "numbers_autoencoder": Network("numbers_autoencoder"),
    "numbers_sr": Network("numbers_sr"),
}
WITH_PEER = tuple(name for name, network in NETWORKS.items() if network.parameters)


def random_batch(objective, batch_size, vocab_size):
    """A batch of what an objective reads: random pictures, and captions of TOLD random tokens."""
    import numpy as np

    rng = np.random.default_rng(0)
    batch = {}
    for name, array in objective.reads.items():
        shape = (batch_size, *array.shape)
        if array.dtype == bool:
            batch[name] = np.broadcast_to(np.arange(array.shape[0]) < TOLD, shape)
        else:
            batch[name] = rng.integers(0, 256 if array.dtype == np.uint8 else vocab_size, shape, array.dtype)
    return batch


def make_peer(config):
    """diffusers' network for a config, and a function (batch size, device) -> its inputs beside x_t and t."""
    model, size = config.model, max(config.data.height, config.data.width)
    levels = range(len(model.channel_multipliers))
    attends = [size >> level in model.attention_resolutions for level in levels]
    options = {
        "sample_size": (config.data.height, config.data.width),
        "in_channels": config.data.channels,
        "out_channels": config.data.channels,
        "block_out_channels": [model.channels * multiplier for multiplier in model.channel_multipliers],
        "layers_per_block": model.num_res_blocks,
        "dropout": model.dropout,
        "norm_eps": 1e-6,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    }
    attention = "CrossAttn" if config.text.encoder else "Attn"
    blocks = [attention if has_attention else "" for has_attention in attends]
    options["down_block_types"] = [f"{block}DownBlock2D" for block in blocks]
    options["up_block_types"] = [f"{block}UpBlock2D" for block in reversed(blocks)]
    if config.text.encoder:
        from captioned_unet import CaptionedUNet, captions

        return CaptionedUNet(config.text, options), partial(captions, config.text, TOLD)
    from diffusers import UNet2DModel

    return UNet2DModel(attention_head_dim=None, **options), lambda batch_size, device: ()
