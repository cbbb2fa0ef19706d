"""Narrow DeepFloyd IF and Karlo pipelines with random weights, as diffusers folders."""

import dataclasses
import json
import zlib

import clips
import jax
import jax.numpy as jnp
import numpy as np
import single_files
import t5s
from safetensors.numpy import load_file, save_file
from their_configs import NARROW_SUPER_RESOLUTION, condition_network

from ddpm_jax import config as config_lib
from ddpm_jax.diffusion import samplers
from ddpm_jax.interop import transformers as transformers_lib
from ddpm_jax.interop.diffusers import embedding_condition, named, prior, unet, unet_condition
from ddpm_jax.interop.diffusers.fields import WEIGHTS
from ddpm_jax.interop.transformers import clip
from ddpm_jax.runtime import parallel
from ddpm_jax.runtime.rng import named_key
from ddpm_jax.sampling.condition import NoCondition
from ddpm_jax.sampling.decoder import Pixels
from ddpm_jax.sampling.generate import generate
from ddpm_jax.text.tokenizers import Tokenizer

# As the files of DeepFloyd IF's first stage have it; in those of the second sample_max_value is 1.
IF_SCHEDULER = {
    "variance_type": "learned_range",
    "beta_schedule": "squaredcos_cap_v2",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
    "sample_max_value": 1.5,
}


def randomize(*networks):
    """Replaces diffusers' initial weights, many of which are 0."""
    import torch

    generator = torch.Generator().manual_seed(1)
    for network in networks:
        for parameter in network.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        network.eval()


def save_if(folder, enlarges=False, **scheduler):
    """A stage of DeepFloyd IF; returns diffusers' pipeline of it.

    Args:
      folder: of the pipeline.
      enlarges: the second stage, from 8x8 to 32x32, in the place of the first, of 8x8.
      scheduler: fields of its scheduler.
    """
    import diffusers
    import torch
    from transformers import PreTrainedTokenizerFast, T5EncoderModel

    t5 = folder.with_name(f"{folder.name}_t5")
    t5s.write_t5(t5)
    (t5 / "tokenizer.json").write_text(Tokenizer.read(t5).to_json())  # transformers needs another package for spiece
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    torch.manual_seed(0)
    fields = condition_network("DeepFloyd IF's second stage" if enlarges else "DeepFloyd IF's first stage")
    fields |= {"encoder_hid_dim": t5s.NET.width, "sample_size": 32 if enlarges else 8}
    options = {} if not enlarges else {"sample_max_value": 1.0}
    noising = {"image_noising_scheduler": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")}
    kind = diffusers.IFSuperResolutionPipeline if enlarges else diffusers.IFPipeline
    pipeline = kind(
        tokenizer=PreTrainedTokenizerFast(tokenizer_file=str(t5 / "tokenizer.json"), **special),
        text_encoder=T5EncoderModel.from_pretrained(t5).eval(),
        unet=diffusers.UNet2DConditionModel(**fields),
        scheduler=diffusers.DDPMScheduler(**{**IF_SCHEDULER, **options, **scheduler}),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
        **(noising if enlarges else {}),
    )
    randomize(pipeline.unet)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


class Raw(Pixels):
    """Pictures as floating-point values, as they are diffused."""

    def decode(self, x_0):
        return parallel.to_host(x_0)


def drawn(run, count, given=None, purpose="image", **options):
    """The result of `run.sample` before rounding to 8 bits; for a prior, its embeddings."""
    model = run.model
    if isinstance(model.decoder, Pixels):
        model = dataclasses.replace(model, decoder=Raw(run.shape))
    places = {"indices": range(count), "seed": 0, "batch_size": count, "purpose": purpose}
    return generate(model, run.params, run.mesh, run.request(**options), given=given, **places)[0]


def noises(run, count, purpose="image"):
    """The noises of the images of a run, before the first network call and after each, with channels first."""
    import torch

    keys, number = jax.vmap(lambda number: named_key(0, purpose, number))(np.arange(count)), 0
    while True:
        noise = np.asarray(samplers._noise(keys, (count, *run.model.decoder.shape), number))
        yield torch.tensor(np.moveaxis(noise, -1, 1))
        number += 1


def feed(monkeypatch, noises, *modules):
    """Lets diffusers' modules draw these noises, in turn."""

    def draw(shape, **_):
        noise = next(noises)
        noise = noise[:, :, 0, 0] if len(shape) == 2 else noise
        assert tuple(noise.shape) == tuple(shape)
        return noise

    for module in modules:
        monkeypatch.setattr(module, "randn_tensor", draw)


def save_unclip(folder, of_pictures=False):
    """A narrow Karlo, from 8x8 to 16x16; returns diffusers' pipeline of it.

    Args:
      folder: of the pipeline.
      of_pictures: the pipeline of variations, with an image encoder in the place of the prior.
    """
    import diffusers
    import torch
    import transformers
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    torch.manual_seed(0)
    tokens = clips.write_tokenizer(folder.with_name(f"{folder.name}_tokens"), max_length=20)
    (tokens / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|endoftext|>"}))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"projection_dim": 16}
    ends = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    text = transformers.CLIPTextConfig(
        **{**sizes, **ends, "vocab_size": clips.VOCAB_SIZE, "max_position_embeddings": 20}
    )
    decoder = condition_network("Karlo's decoder")
    unclip = diffusers.UnCLIPScheduler
    learned = {"variance_type": "learned_range", "prediction_type": "epsilon"}
    parts = {
        "decoder": diffusers.UNet2DConditionModel(**decoder),
        "text_encoder": transformers.CLIPTextModelWithProjection(text),
        "tokenizer": transformers.CLIPTokenizer.from_pretrained(tokens),
        "text_proj": UnCLIPTextProjModel(
            clip_embeddings_dim=16,
            time_embed_dim=4 * decoder["block_out_channels"][0],
            cross_attention_dim=decoder["cross_attention_dim"],
        ),
        **{
            f"super_res_{name}": diffusers.UNet2DModel(**{**NARROW_SUPER_RESOLUTION, "sample_size": 16})
            for name in ("first", "last")
        },
        "decoder_scheduler": unclip(**learned),
        "super_res_scheduler": unclip(),
    }
    if of_pictures:
        image = transformers.CLIPVisionConfig(**sizes, image_size=12, patch_size=4)
        parts["image_encoder"] = transformers.CLIPVisionModelWithProjection(image)
        parts["feature_extractor"] = transformers.CLIPImageProcessor(
            size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}
        )
    else:
        parts["prior"] = diffusers.PriorTransformer(
            num_attention_heads=2, attention_head_dim=12, num_layers=2, embedding_dim=16, num_embeddings=20
        )
        parts["prior"].clip_mean.data = torch.randn(1, 16)
        parts["prior"].clip_std.data = torch.rand(1, 16) + 0.5
        parts["prior_scheduler"] = unclip(prediction_type="sample", clip_sample_range=5.0)
    statistics = {name: getattr(parts.get("prior"), name, None) for name in ("clip_mean", "clip_std")}
    kept = {name: value.data.clone() for name, value in statistics.items() if value is not None}
    randomize(*(part for part in parts.values() if isinstance(part, torch.nn.Module)))
    for name, value in kept.items():
        getattr(parts["prior"], name).data = value
    kind = diffusers.UnCLIPImageVariationPipeline if of_pictures else diffusers.UnCLIPPipeline
    pipeline = kind(**parts)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


def write_part(folder, config, tensors):
    """A part of diffusers: its config, and tensors of the shapes that are given."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    random = single_files.random(tensors, seed=zlib.crc32(folder.name.encode()))
    save_file({name: value / 5 for name, value in random.items()}, folder / WEIGHTS[0])


def write_scheduler(folder, kind, **fields):
    folder.mkdir(parents=True)
    (folder / "scheduler_config.json").write_text(json.dumps({"_class_name": kind, **fields}))


def write_unet(folder, fields):
    """A `UNet2DConditionModel` with a learned variance."""
    config = config_lib.default_config()
    config.diffusion.variance = "learned"
    layout = unet_condition.read(config, fields, "config.json")
    net = config_lib.make_network(config, NoCondition())
    write_part(folder, fields, unet_condition.tensor_shapes(net, layout))


def write_if(folder, enlarges=False):
    """What `save_if` saves, without PyTorch."""
    fields = condition_network("DeepFloyd IF's second stage" if enlarges else "DeepFloyd IF's first stage")
    fields |= {"encoder_hid_dim": t5s.NET.width, "sample_size": 32 if enlarges else 8}
    write_unet(folder / "unet", fields)
    write_scheduler(folder / "scheduler", "DDPMScheduler", **IF_SCHEDULER)
    if enlarges:
        write_scheduler(folder / "image_noising_scheduler", "DDPMScheduler", beta_schedule="squaredcos_cap_v2")
    t5s.write_t5(folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    (folder / "text_encoder" / "spiece.model").rename(folder / "tokenizer" / "spiece.model")
    index = {"_class_name": "IFSuperResolutionPipeline" if enlarges else "IFPipeline"}
    index |= {"safety_checker": ["deepfloyd_if", "IFSafetyChecker"], "watermarker": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_unclip(folder, of_pictures=False):
    """What `save_unclip` saves, without PyTorch."""
    decoder = condition_network("Karlo's decoder")
    learned = {"variance_type": "learned_range", "prediction_type": "epsilon"}
    write_unet(folder / "decoder", decoder)
    write_scheduler(folder / "decoder_scheduler", "UnCLIPScheduler", **learned)
    told = {"clip_embeddings_dim": 16, "time_embed_dim": 64, "cross_attention_dim": 12}
    shapes = named.tensor_shapes(
        embedding_condition.param_shapes(*embedding_condition.to_module(told)), embedding_condition._name
    )
    write_part(folder / "text_proj", told, shapes)
    larger = {**NARROW_SUPER_RESOLUTION, "sample_size": 16}
    config = config_lib.default_config()
    unet.read(config, larger, "config.json", image_channels=3)
    for name in ("first", "last"):
        write_part(folder / f"super_res_{name}", larger, unet.tensor_shapes(config, image_channels=3))
    write_scheduler(folder / "super_res_scheduler", "UnCLIPScheduler")
    net = dataclasses.replace(clips.TEXT, max_length=20, projection=16)
    transformers_lib.write(folder / "text_encoder", net, random_params(net, jnp.zeros((1, 2), jnp.int32)))
    clips.write_tokenizer(folder / "tokenizer", max_length=20)
    index = {"_class_name": "UnCLIPImageVariationPipeline" if of_pictures else "UnCLIPPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    if of_pictures:
        config = {"architectures": ["CLIPVisionModelWithProjection"], "projection_dim": 16}
        config |= {field: getattr(clips.IMAGE, ours) for ours, (field, _) in clip._IMAGE_SIZES.items()}
        config["image_size"] = clips.IMAGE.image_size
        shapes = clip._shapes(dataclasses.replace(clips.IMAGE, projection=16))
        tensors = {clip._name(("image", *path)): clip.to_theirs(path, np.zeros(x.shape)) for path, x in shapes.items()}
        write_part(folder / "image_encoder", config, {name: value.shape for name, value in tensors.items()})
        (folder / "image_encoder" / WEIGHTS[0]).rename(folder / "image_encoder" / "model.safetensors")
        return folder
    fields = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2}
    fields |= {"embedding_dim": 16, "num_embeddings": 20}
    write_part(folder / "prior", fields, prior.tensor_shapes(*prior.to_module(fields)))
    tensors = load_file(folder / "prior" / WEIGHTS[0])
    save_file(tensors | {"clip_std": np.abs(tensors["clip_std"])}, folder / "prior" / WEIGHTS[0])
    scheduler = {"prediction_type": "sample", "clip_sample_range": 5.0}
    write_scheduler(folder / "prior_scheduler", "UnCLIPScheduler", **scheduler)
    return folder


def random_params(net, example):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(net.init, jax.random.key(0), example)["params"]
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32) / 4, shapes)


# The hub's names of the published pipelines, and the folders that stand for them on the documentation's pages.
HUB = {
    "kakaobrain/karlo-v1-alpha-image-variations": "karlo-variations",
    "kakaobrain/karlo-v1-alpha": "karlo",
    "DeepFloyd/IF-I-XL-v1.0": "if-1",
    "DeepFloyd/IF-II-L-v1.0": "if-2",
}


def write(folder):
    """The narrow pipeline that a folder of `HUB` holds."""
    if folder.name.startswith("karlo"):
        return write_unclip(folder, of_pictures=folder.name == "karlo-variations")
    return write_if(folder, enlarges=folder.name == "if-2")
