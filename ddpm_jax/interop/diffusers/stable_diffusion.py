"""diffusers' Stable Diffusion pipelines: UNet, scheduler, autoencoder, text encoder and tokenizer in one folder."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax.diffusion.tables import DEFAULT_SPACING
from ddpm_jax.interop import tensors as tensors_lib
from ddpm_jax.interop import transformers
from ddpm_jax.interop.diffusers import autoencoder as autoencoder_lib
from ddpm_jax.interop.diffusers import deepfloyd, unclip
from ddpm_jax.interop.diffusers import scheduler as scheduler_lib
from ddpm_jax.interop.diffusers import unet_condition as unet_lib
from ddpm_jax.interop.diffusers.fields import WEIGHTS, refusal
from ddpm_jax.interop.diffusers.stages import INDEX, require_parts
from ddpm_jax.interop.transformers import clip as clip_lib
from ddpm_jax.models.autoencoder import Autoencoder
from ddpm_jax.models.clip import CLIPTextEncoder
from ddpm_jax.models.unet import UNet
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.files import new_folder, read_json_object, write_text
from ddpm_jax.sampling.captions import CaptionCondition
from ddpm_jax.sampling.condition import NoCondition
from ddpm_jax.sampling.generate import Model
from ddpm_jax.sampling.latents import Latents
from ddpm_jax.text.encoders import FrozenTexts
from ddpm_jax.text.tokenizers import Tokenizer

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
# Parts of other pipelines, with an explanation.
_FOREIGN = {
    "text_encoder_2": "a second text encoder, as Stable Diffusion XL has",
    "text_encoder_3": "a third text encoder, as Stable Diffusion 3 has",
    "transformer": "a transformer in place of the UNet, as Stable Diffusion 3 has",
    "prior": "a prior, as unCLIP has",
}
# Without a version, or with one up to 0.5.1, diffusers treats the folder as its older four-channel pipeline.
_INPAINT = {"_class_name": PIPELINES[2], "_diffusers_version": "0.6.0"}
_GUIDANCE = 7.5  # diffusers' default
_CONFIGS = {
    "unet": "config.json",
    "scheduler": "scheduler_config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
}


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A Stable Diffusion, read.

    Attributes:
      config: of the run.
      params: of the UNet.
      layout: further information from the UNet's file.
      text_encoder: the module and its parameters.
      autoencoder: the module, its parameters and the scaling factor of its latents.
      tokenizer: of the prompts.
      notes: sentences about differences from diffusers in sampling, and about ignored parts.
    """

    config: ConfigDict
    params: Any
    layout: unet_lib.Layout
    text_encoder: tuple[CLIPTextEncoder, Any]
    autoencoder: tuple[Autoencoder, Any, float]
    tokenizer: Tokenizer
    notes: list[str]


def is_pipeline(folder: Path) -> bool:
    """Whether a diffusers folder contains more than an unconditional UNet and its scheduler."""
    return (folder / "vae").is_dir() or (folder / "text_encoder").is_dir()


def read(folder: str | Path, source: str | None = None) -> Pipeline:
    """Reads a pipeline's folder.

    Args:
      folder: with model_index.json, unet/, scheduler/, vae/, text_encoder/ and tokenizer/.
      source: its name in the run's config; None: the folder.

    Raises:
      UserError: a part that is missing, broken or not supported; it is named.
    """
    folder = Path(folder)
    index = read_json_object(folder / INDEX) if (folder / INDEX).is_file() else {}
    for part, whose in _FOREIGN.items():
        if _is_named(index, part) or (folder / part).is_dir():
            raise UserError(f"{str(folder)!r} has {part!r}, {whose}; accepted: Stable Diffusion 1 and 2")
    kind = index.get("_class_name", PIPELINES[0])
    if kind not in PIPELINES:
        raise refusal(str(folder / INDEX), "_class_name", kind, (*PIPELINES, *deepfloyd.PIPELINES, *unclip.PIPELINES))
    require_parts(folder, kind, ("unet", "scheduler", "vae", "text_encoder", "tokenizer"))
    paths = {part: folder / part / file for part, file in _CONFIGS.items()}
    fields = {part: read_json_object(path) for part, path in paths.items()}
    weights = {"unet": WEIGHTS, "vae": WEIGHTS, "text_encoder": transformers.WEIGHTS}
    pipeline = assemble(
        fields,
        lambda part: tensors_lib.read_weights(folder / part, weights[part]),
        Tokenizer.read(folder / "tokenizer"),
        source=source or str(folder),
        where={part: str(path) for part, path in paths.items()},
    )
    if _is_named(index, "safety_checker"):
        pipeline.notes.append("the safety checker is ignored: the run does not check its pictures")
    return pipeline


def _is_named(index: Mapping[str, Any], part: str) -> bool:
    entry = index.get(part)
    return isinstance(entry, list) and bool(entry) and entry[0] is not None


def assemble(
    fields: Mapping[str, Mapping[str, Any]],
    open_tensors: Callable[[str], tuple[str | Path, tensors_lib.Tensors]],
    tokenizer: Tokenizer,
    *,
    source: str,
    where: Mapping[str, str],
) -> Pipeline:
    """Assembles a pipeline from the parts "unet", "scheduler", "vae" and "text_encoder".

    Args:
      fields: of each part's config file.
      open_tensors: returns (file, tensors) of a part, with the names of diffusers and transformers.
      tokenizer: of the prompts.
      source: the pipeline's name in the run's config.
      where: each part's config file, for error messages.

    Raises:
      UserError: a value or a tensor that is not supported.
    """
    config = config_lib.default_config()
    try:
        clip = clip_lib.to_module(fields["text_encoder"], where["text_encoder"])
        autoencoder, factor = autoencoder_lib.to_module(fields["vae"], where["vae"])
        notes = scheduler_lib.read(config, fields["scheduler"], where["scheduler"])
        layout = unet_lib.read(config, fields["unet"], where["unet"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        files = ", ".join(map(repr, where.values()))
        raise UserError(f"one of {files} has an invalid value: {error}") from None
    _check(where, clip, autoencoder, layout)
    transformers.check_tokenizer(tokenizer, clip, where["text_encoder"])
    _set_fields(config, autoencoder, layout, source)
    net = config_lib.make_network(config, NoCondition())
    assert isinstance(net, UNet)
    path, tensors = open_tensors("text_encoder")
    text_encoder = clip, clip_lib.to_params(path, tensors, clip)
    path, tensors = open_tensors("vae")
    latents = autoencoder, autoencoder_lib.to_params(path, tensors, autoencoder), factor
    path, tensors = open_tensors("unet")
    params = unet_lib.to_params(path, tensors, net, layout)
    return Pipeline(config, params, layout, text_encoder, latents, tokenizer, notes)


def why_not(model: Model) -> str:
    """How a run differs from a Stable Diffusion, as a phrase to follow "this run"; "" if it is one."""
    if not isinstance(model.condition, CaptionCondition):
        return "takes no prompts"
    texts = model.condition.texts
    if not isinstance(texts, FrozenTexts) or not isinstance(model.net, UNet):
        return f"has a text encoder trained with the network (text.encoder {config_lib.TRAINED!r})"
    if not isinstance(texts.encoder, CLIPTextEncoder):
        return "has a text encoder other than CLIP's (text.encoder)"
    if not isinstance(model.decoder, Latents):
        return "diffuses pixels instead of an autoencoder's latents (autoencoder.source)"
    if not model.net.transformer_depth:
        return "has no spatial transformers (model.transformer_depth is 0)"
    if texts.mask_padding:
        return "ignores the padding of prompts (text.mask_padding)"
    return "uses a vector for the whole prompt (text.pooled)" if texts.pooled else ""


def layout_of(model: Model, dataset: Mapping[str, Any]) -> unet_lib.Layout:
    """The layout that a run's network was imported with, or else one derived from the run.

    Args:
      model: of a run that is a Stable Diffusion.
      dataset: the description of its data.
    """
    if "diffusers" in dataset:
        fields = dataset["diffusers"]
        return unet_lib.Layout(**{**fields, "sample_size": tuple(fields["sample_size"])})
    texts, _, latents = parts_of(model)
    height, width, channels = latents.shape
    in_channels = channels if model.given is None else _with_masked_picture(channels)
    return unet_lib.Layout(texts.encoder.width, in_channels, channels, (height, width))


def parts_of(model: Model) -> tuple[FrozenTexts, UNet, Latents]:
    """The text encoder, the network and the autoencoder of a Stable Diffusion."""
    assert isinstance(model.condition, CaptionCondition)
    texts, net, latents = model.condition.texts, model.net, model.decoder
    assert isinstance(texts, FrozenTexts)
    assert isinstance(net, UNet)
    assert isinstance(latents, Latents)
    return texts, net, latents


def write(folder: str | Path, config: ConfigDict, dataset: Mapping[str, Any], model: Model, params: Any) -> list[str]:
    """Atomically writes a folder that diffusers' `StableDiffusionPipeline` opens, or `StableDiffusionInpaintPipeline`
    for a network that takes a masked picture.

    Args:
      folder: must not exist, or be empty.
      config, dataset, model, params: of a run.

    Returns:
      Sentences about differences between diffusers and the run in sampling.

    Raises:
      UserError: the folder is not empty, the run is not a Stable Diffusion, or it has an option that diffusers lacks.
    """
    if why := why_not(model):
        raise UserError(f"this run {why}, unlike Stable Diffusion; accepted: --out of a .safetensors file")
    texts, net, latents = parts_of(model)
    layout = layout_of(model, dataset)
    scheduler, notes = scheduler_lib.to_fields(config)
    unet = unet_lib.to_fields(config, net, layout)
    # The network uses the tokens' states, which do not depend on the projection.
    assert isinstance(texts.encoder, CLIPTextEncoder)
    encoder, states = dataclasses.replace(texts.encoder, projection=None), dict(texts.open_params())
    states.pop("projection", None)
    index = {
        **({"_class_name": PIPELINES[0]} if model.given is None else _INPAINT),
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    with new_folder(folder, "--out") as temporary:
        texts.tokenizer.write_clip(temporary / "tokenizer")
        files = {INDEX: index, f"unet/{_CONFIGS['unet']}": unet, f"scheduler/{_CONFIGS['scheduler']}": scheduler}
        for name, fields in files.items():
            write_text(temporary / name, json.dumps(fields, indent=2) + "\n")
        clip_lib.write(temporary / "text_encoder", encoder, states)
        autoencoder_lib.write(temporary / "vae", latents.autoencoder, latents.open_params(), latents.scaling_factor)
        tensors = unet_lib.to_tensors(params, len(net.widths), layout.linear_projections)
        tensors_lib.write(temporary / "unet" / WEIGHTS[0], tensors, {"format": "pt"})
    return notes


def _check(where: Mapping[str, str], clip: CLIPTextEncoder, autoencoder: Autoencoder, layout: unet_lib.Layout) -> None:
    """UserError for parts that do not fit together."""
    if layout.context_width != clip.width:
        raise UserError(
            f"cross_attention_dim is {layout.context_width} in {where['unet']!r}, but hidden_size is {clip.width} in "
            f"{where['text_encoder']!r}; accepted: the same"
        )
    if autoencoder.latent_channels != layout.latent_channels:
        raise UserError(
            f"out_channels is {layout.latent_channels} in {where['unet']!r}, but latent_channels is "
            f"{autoencoder.latent_channels} in {where['vae']!r}; accepted: the same"
        )
    accepted = layout.latent_channels, _with_masked_picture(layout.latent_channels)
    if layout.in_channels not in accepted:
        raise refusal(where["unet"], "in_channels", layout.in_channels, accepted)
    if layout.vector_width or layout.level:
        raise UserError(f"class_embed_type is set in {where['unet']!r}; accepted in Stable Diffusion: None")


def _with_masked_picture(channels: int) -> int:
    """The number of channels of latents, a mask, and the latents of a masked picture."""
    return 2 * channels + 1


def _set_fields(config: ConfigDict, autoencoder: Autoencoder, layout: unet_lib.Layout, source: str) -> None:
    """Sets the fields of a run's config other than those of its network and diffusion."""
    height, width = (side * autoencoder.downscaling for side in layout.sample_size)
    config.data.update(source="folder", height=height, width=width, channels=autoencoder.channels, flip=False)
    # As in training: the network attends to padding, and takes no vector for the whole text.
    config.text.update(encoder=f"{source}/text_encoder", mask_padding=False, pooled=False, dropout=0.1)
    config.autoencoder.source = f"{source}/vae"
    config.diffusion.update(clip=False, dynamic_threshold=0.0)
    config.model.masked_picture = layout.in_channels > layout.latent_channels
    config.sample.update(guidance_scale=_GUIDANCE, num_images=4, batch_size=4)
    # Set even if it is the sampler's default, so that it also applies to a sampler chosen later.
    config.sample.spacing = config.sample.spacing or DEFAULT_SPACING[config.sample.sampler]
    config.log.sample_images = 4
