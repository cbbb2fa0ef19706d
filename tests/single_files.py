"""Narrow Stable Diffusions with random weights: tensors with diffusers', transformers' and CompVis' names."""

import re

import numpy as np
from clips import VOCAB_SIZE

RES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
OPEN_CLIP_OUTER = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


class Builder:
    """Collects the shapes of layers by name."""

    def __init__(self):
        self.shapes = {}

    def norm(self, name, width):
        self.shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    def linear(self, name, width, out, bias=True):
        self.shapes |= {f"{name}.weight": (out, width)} | ({f"{name}.bias": (out,)} if bias else {})

    def conv(self, name, width, out, side=3):
        self.shapes |= {f"{name}.weight": (out, width, side, side), f"{name}.bias": (out,)}

    def res(self, name, width, out, time=None):
        self.norm(f"{name}.norm1", width)
        self.conv(f"{name}.conv1", width, out)
        if time:
            self.linear(f"{name}.time_emb_proj", time, out)
        self.norm(f"{name}.norm2", out)
        self.conv(f"{name}.conv2", out, out)
        if width != out:
            self.conv(f"{name}.conv_shortcut", width, out, 1)

    def spatial(self, name, width, context, linear):
        self.norm(f"{name}.norm", width)
        for end in ("proj_in", "proj_out"):
            self.linear(f"{name}.{end}", width, width) if linear else self.conv(f"{name}.{end}", width, width, 1)
        block = f"{name}.transformer_blocks.0"
        for attention, source in (("attn1", width), ("attn2", context)):
            self.linear(f"{block}.{attention}.to_q", width, width, bias=False)
            self.linear(f"{block}.{attention}.to_k", source, width, bias=False)
            self.linear(f"{block}.{attention}.to_v", source, width, bias=False)
            self.linear(f"{block}.{attention}.to_out.0", width, width)
        for i in (1, 2, 3):
            self.norm(f"{block}.norm{i}", width)
        self.linear(f"{block}.ff.net.0.proj", width, 8 * width)
        self.linear(f"{block}.ff.net.2", 4 * width, width)


def unet_shapes(widths=(32, 64), layers=1, context=64, in_channels=4, linear=False):
    """The shapes of a `UNet2DConditionModel` with attention at all levels but the last."""
    net, time, last = Builder(), 4 * widths[0], len(widths) - 1
    net.linear("time_embedding.linear_1", widths[0], time)
    net.linear("time_embedding.linear_2", time, time)
    net.conv("conv_in", in_channels, widths[0])
    width, skips = widths[0], [widths[0]]
    for level, out in enumerate(widths):
        for i in range(layers):
            net.res(f"down_blocks.{level}.resnets.{i}", width, out, time)
            if level < last:
                net.spatial(f"down_blocks.{level}.attentions.{i}", out, context, linear)
            width = out
            skips.append(width)
        if level < last:
            net.conv(f"down_blocks.{level}.downsamplers.0.conv", width, width)
            skips.append(width)
    net.res("mid_block.resnets.0", width, width, time)
    net.spatial("mid_block.attentions.0", width, context, linear)
    net.res("mid_block.resnets.1", width, width, time)
    for block, out in enumerate(reversed(widths)):
        for i in range(layers + 1):
            net.res(f"up_blocks.{block}.resnets.{i}", width + skips.pop(), out, time)
            if block > 0:
                net.spatial(f"up_blocks.{block}.attentions.{i}", out, context, linear)
            width = out
        if block < last:
            net.conv(f"up_blocks.{block}.upsamplers.0.conv", width, width)
    net.norm("conv_norm_out", width)
    net.conv("conv_out", width, 4)
    return net.shapes


def autoencoder_shapes(widths=(32, 64), layers=1):
    """The shapes of an `AutoencoderKL`."""
    net, last = Builder(), len(widths) - 1

    def middle(half, width):
        for i in range(2):
            net.res(f"{half}.mid_block.resnets.{i}", width, width)
        net.norm(f"{half}.mid_block.attentions.0.group_norm", width)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            net.linear(f"{half}.mid_block.attentions.0.{part}", width, width)

    net.conv("encoder.conv_in", 3, widths[0])
    width = widths[0]
    for level, out in enumerate(widths):
        for i in range(layers):
            net.res(f"encoder.down_blocks.{level}.resnets.{i}", width, out)
            width = out
        if level < last:
            net.conv(f"encoder.down_blocks.{level}.downsamplers.0.conv", width, width)
    middle("encoder", width)
    net.norm("encoder.conv_norm_out", width)
    net.conv("encoder.conv_out", width, 8)
    net.conv("quant_conv", 8, 8, 1)
    net.conv("post_quant_conv", 4, 4, 1)
    net.conv("decoder.conv_in", 4, width)
    middle("decoder", width)
    for block, out in enumerate(reversed(widths)):
        for i in range(layers + 1):
            net.res(f"decoder.up_blocks.{block}.resnets.{i}", width, out)
            width = out
        if block < last:
            net.conv(f"decoder.up_blocks.{block}.upsamplers.0.conv", width, width)
    net.norm("decoder.conv_norm_out", width)
    net.conv("decoder.conv_out", width, 3)
    return net.shapes


def text_shapes(width=64, layers=2, tokens=50, length=77):
    """The shapes of a `CLIPTextModel`."""
    net = Builder()
    net.shapes["text_model.embeddings.token_embedding.weight"] = (tokens, width)
    net.shapes["text_model.embeddings.position_embedding.weight"] = (length, width)
    for i in range(layers):
        block = f"text_model.encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            net.linear(f"{block}.self_attn.{part}", width, width)
        net.norm(f"{block}.layer_norm1", width)
        net.linear(f"{block}.mlp.fc1", width, 4 * width)
        net.linear(f"{block}.mlp.fc2", 4 * width, width)
        net.norm(f"{block}.layer_norm2", width)
    net.norm("text_model.final_layer_norm", width)
    return net.shapes


def random(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def unet_module(name, layers):
    """CompVis' name of a module of a network with attention at all levels but the last."""
    if name in OUTER:
        return OUTER[name]
    side, *rest = name.split(".", 1)
    if side == "mid_block":
        kind, place, part = rest[0].split(".", 2)
        if kind == "attentions":
            return f"middle_block.1.{part}"
        return f"middle_block.{2 * int(place)}.{RES[part]}"
    level, kind, i, part = rest[0].split(".", 3)
    index = int(level) * (layers + 1) + int(i)
    if side == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{(int(level) + 1) * (layers + 1)}.0.op"
        block = f"input_blocks.{index + 1}"
    else:
        if kind == "upsamplers":
            return f"output_blocks.{index + layers}.{1 if level == '0' else 2}.conv"
        block = f"output_blocks.{index}"
    return f"{block}.0.{RES[part]}" if kind == "resnets" else f"{block}.1.{part}"


def autoencoder_module(name, levels):
    """CompVis' name of a module of the autoencoder."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    if match := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)", name):
        return f"{match[1]}.mid.attn_1.{ATTENTION[match[2]]}"
    if match := re.fullmatch(r"(\w+)\.mid_block\.resnets\.(\d)\.(.+)", name):
        return f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}"
    if match := re.fullmatch(r"(\w+)\.(up|down)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name):
        half, side, level, kind, i, part = match.groups()
        level = levels - 1 - int(level) if side == "up" else level
        tail = f"block.{i}.{part}" if kind == "resnets" else f"{side}sample.conv"
        return f"{half}.{side}.{level}.{tail}"
    return name


def open_clip(tensors):
    """OpenCLIP's tensors of a `CLIPTextModel`'s."""
    result = {}
    for name, value in tensors.items():
        name = name.removeprefix("text_model.")
        if name in OPEN_CLIP_OUTER:
            result[OPEN_CLIP_OUTER[name]] = value
            continue
        layer, part, leaf = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(\w+)", name).groups()
        block = f"transformer.resblocks.{layer}"
        if part in OPEN_CLIP:
            result[f"{block}.{OPEN_CLIP[part]}.{leaf}"] = value
        elif part == "self_attn.out_proj":
            result[f"{block}.attn.out_proj.{leaf}"] = value
        elif part == "self_attn.q_proj":
            parts = [tensors[f"text_model.encoder.layers.{layer}.self_attn.{p}_proj.{leaf}"] for p in "qkv"]
            result[f"{block}.attn.in_proj_{leaf}"] = np.concatenate(parts)
    return result


def checkpoint(unet, autoencoder, text, *, version="1.x", old_attention=False):
    """A single file's tensors of three parts' tensors; with old_attention, the autoencoder's are convolutions."""

    def renamed(prefix, tensors, module):
        for name, value in tensors.items():
            stem, _, leaf = name.rpartition(".")
            yield f"{prefix}{module(stem)}.{leaf}", value

    layers = len({name.split(".")[3] for name in unet if name.startswith("down_blocks.0.resnets.")})
    levels = len({name.split(".")[2] for name in autoencoder if name.startswith("encoder.down_blocks.")})
    result = dict(renamed("model.diffusion_model.", unet, lambda name: unet_module(name, layers)))
    first = dict(renamed("first_stage_model.", autoencoder, lambda name: autoencoder_module(name, levels)))
    if old_attention:
        first |= {k: v[..., None, None] for k, v in first.items() if ".attn_1." in k and v.ndim == 2}
    if version == "1.x":
        text = {f"cond_stage_model.transformer.{name}": value for name, value in text.items()}
    else:
        text = {f"cond_stage_model.model.{name}": value for name, value in open_clip(text).items()}
    return result | first | text


UNET = unet_shapes()
TEXT = text_shapes(tokens=VOCAB_SIZE, length=20)


def small(shapes, seed):
    return {name: 0.1 * value for name, value in random(shapes, seed).items()}


def tensors(version="1.x"):
    """Those of a file with a narrow Stable Diffusion."""
    parts = small(UNET, 0), small(autoencoder_shapes(), 1), small(TEXT, 2)
    if version == "2.x":
        parts = small(unet_shapes(widths=(64, 128), linear=True), 0), *parts[1:]
    return checkpoint(*parts, version=version)
