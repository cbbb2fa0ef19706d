"""What a run can be told: every field with its default, and the objects that a config stands for.

`diffusion/`, `models/` and `data/` know nothing of it: they take the arguments that this module makes of the fields.
"""

import dataclasses
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from ddpm_jax.diffusion.gaussian import Parameterization
from ddpm_jax.diffusion.guidance import Guidance
from ddpm_jax.diffusion.samplers import Steps
from ddpm_jax.diffusion.schedules import Schedule, make_betas, make_schedule, rescale_to_zero_terminal_snr
from ddpm_jax.interop import transformers
from ddpm_jax.interop.diffusers import autoencoder as autoencoder_lib
from ddpm_jax.interop.transformers import CLIP
from ddpm_jax.models.autoencoder import Autoencoder
from ddpm_jax.models.clip import CLIPImageEncoder, CLIPTextEncoder, TextEncoder
from ddpm_jax.models.embedding_condition import Embedded, EmbeddingCondition
from ddpm_jax.models.last_step import OwnLastStep
from ddpm_jax.models.prior import Prior
from ddpm_jax.models.unet import UNet
from ddpm_jax.runtime.errors import UserError, nearest
from ddpm_jax.sampling.captions import CaptionCondition
from ddpm_jax.sampling.condition import ClassCondition, Condition, NoCondition
from ddpm_jax.sampling.decoder import Decoder, Pixels
from ddpm_jax.sampling.embeddings import Embedder, Embeddings, ImageEmbedding, Units
from ddpm_jax.sampling.generate import Model, Request
from ddpm_jax.sampling.given import Given, LowResolution, MaskedPicture
from ddpm_jax.sampling.latents import Latents
from ddpm_jax.text.encoders import FrozenTexts, Texts, TrainedTexts
from ddpm_jax.text.tokenizers import Tokenizer

DTYPES = ("float32", "bfloat16")
TRAINED = "trained"  # text.encoder that is not a folder
OBJECTIVES = ("diffusion", "autoencoder", "clip")
DECAYS = ("constant", "cosine", "linear")  # of the learning rate
_ANY_CLASSES = tuple(map(str, range(10)))  # of a class-conditional run whose images have not been opened yet


def default_config() -> ConfigDict:
    """Every field of a run. The values are the paper's for CIFAR-10 (Ho et al. 2020, appendix B)."""
    config = ConfigDict()
    config.seed = 0  # of the weights, the order of the images and all noise

    config.data = data = ConfigDict()
    data.source = "tfds"  # digits, numbers, tfds, folder or array
    data.name = "cifar10"  # of the tensorflow-datasets data set
    data.split = "train"  # of that data set
    data.path = ""  # of the folder, or of the .npz or .npy file
    data.data_dir = ""  # where tensorflow-datasets keeps its files; "": its default
    data.height = 32  # divisible by 2 ** (levels - 1)
    data.width = 32  # the same
    data.channels = 3  # 1: grey, 3: RGB
    data.num_digits = 2  # of each number of source numbers
    data.held_out = ()  # numbers that source numbers leaves out
    data.caption = ""  # the text feature of a tensorflow-datasets data set, for runs with captions
    data.flip = True  # random horizontal flips
    data.skip_broken = False  # go on without the images of a folder that cannot be read
    data.cache_gib = 2.0  # a set that is smaller when decoded is decoded once and kept in memory
    data.num_workers = 0  # processes that decode a larger set; 0: threads

    config.model = model = ConfigDict()
    model.channels = 128  # of the first level
    model.channel_multipliers = (1, 2, 2, 2)  # one for each level; the image is halved from one level to the next
    model.level_channels = ()  # the channels of each level themselves, as in (32, 48, 64); replaces the multipliers
    model.num_res_blocks = 2  # residual blocks in each level
    model.level_res_blocks = ()  # the residual blocks of each level, as in (2, 2, 3); replaces num_res_blocks
    model.attention_resolutions = (16,)  # levels whose longer side is one of these have attention
    model.attention_levels = ()  # on or off for each level, as in (False, True, False, False); replaces the resolutions
    model.middle_attention = True  # attention between the two blocks in the middle
    model.middle_attention_groups = -1  # of the norm before that attention; 0: no norm; -1: num_groups
    model.num_heads = 1  # of attention; divides the channels of every level that has it
    model.head_channels = 0  # channels of a head, as many as fit; replaces num_heads; 0: off
    model.attention_patch_size = 1  # attention among patches of so many pixels a side, not single ones
    model.transformer_depth = 0  # blocks of the spatial transformer that replaces each attention; 0: attention alone
    model.cross_attention = "separate"  # of pixels to tokens: separate, joint with the pixels' own, or alone
    model.context_groups = 0  # of a group norm of the tokens in each joint or alone attention; 0: no norm
    model.token_channels = 0  # what the tokens are projected to first; 0: they are not
    model.pooling_heads = 0  # of an attention pooling of the tokens, added to the time embedding; 0: none
    model.dropout = 0.1  # rate, in residual blocks
    model.num_groups = 32  # of group normalisation; divides the channels of every level
    model.norm_epsilon = 1e-6  # of group normalisation
    model.activation = "swish"  # in residual blocks: swish, gelu, mish or relu
    model.outer_activation = "swish"  # in the time embedding and before the last convolution: the same names
    model.residual_scale = 1.0  # divides the sum that ends a residual block
    model.middle_residual_scale = 1.0  # the same for the blocks in the middle
    model.time_embedding = "sinusoids"  # or learned: a vector for each timestep
    model.time_frequency_shift = 1.0  # of the sinusoids: 0, as in Stable Diffusion, to 1, as in the paper
    model.time_cosines_first = False  # the embedding is cosines, then sines
    model.time_channels = 0  # width of the time embedding; 0: four times model.channels
    model.time_activations = ()  # of the time embedding, in turn, before residual blocks; (): activation
    model.vector_embedding = "linear"  # of a vector that is added to the time embedding: linear, mlp or none
    model.scale_shift = False  # the time embedding scales and shifts norms (AdaGN), where the paper adds it
    model.downsample = "conv"  # conv, avg_pool, max_pool or residual
    model.downsample_padding = "same"  # of conv: same, at the right and bottom, or symmetric, as PyTorch's
    model.downsample_levels = ()  # one for each halving of the size, as in ("conv", "residual"); replaces downsample
    model.upsample = "nearest"  # nearest, transposed or residual
    model.upsample_levels = ()  # one for each doubling, in the order of downsample_levels; replaces upsample
    model.center_input = False  # the network sees 2 x - 1
    model.class_conditional = False  # learn the classes of the data set
    model.null_class = True  # a class-conditional network also knows no class, which guidance needs
    model.masked_picture = False  # it is given a mask and the latents of the picture without what is under it
    model.dtype = "float32"  # or bfloat16: what convolutions and matrix products compute in
    model.remat = "none"  # norms or blocks: recompute those instead of keeping them, for memory

    config.text = text = ConfigDict()
    text.encoder = ""  # "": no captions; trained: along with the network; a transformers folder; or a CLIP's workdir
    text.tokenizer = ""  # a transformers folder or tokenizer.json; "": the encoder's, or one trained on the captions
    text.vocab_size = 512  # tokens of a tokenizer that is trained, at most
    text.max_length = 0  # tokens of a caption, the rest is cut; 0: as the tokenizer's files say, 64 if it is trained
    text.width = 64  # of an encoder that is trained, like the two that follow
    text.num_layers = 2  # of its Transformer; 0: the embeddings of tokens and of their places alone
    text.num_heads = 4  # of its attention
    text.dropout = 0.1  # share of examples that are trained without their caption, for guidance
    text.mask_padding = True  # the network does not attend to the padding of a caption
    text.mask_in_encoder = False  # with mask_padding off: the frozen encoder leaves it aside, as in DeepFloyd IF
    text.pooled = True  # the state of the whole caption is added to the time embedding

    config.autoencoder = autoencoder = ConfigDict()
    autoencoder.source = ""  # workdir or diffusers folder of the autoencoder whose latents are diffused; "": pixels are
    autoencoder.scaling_factor = 0.0  # of the latents; 0: the folder's, or for a workdir measured on the data
    autoencoder.latent_channels = 4  # of an autoencoder that is trained (train.objective), like all that follow
    autoencoder.level_channels = (128, 256, 512, 512)  # one for each level; the image is halved from one to the next
    autoencoder.num_res_blocks = 2  # residual blocks in each level
    autoencoder.num_groups = 32  # of group normalisation
    autoencoder.middle_attention = True  # attention between the two blocks in the middle
    autoencoder.kl_weight = 1e-6  # of the Kullback-Leibler divergence, beside the mean absolute error of the pixels

    config.clip = clip = ConfigDict()  # of a CLIP that is trained (train.objective); its text encoder: config.text
    clip.patch_size = 4  # of the image encoder, in pixels; divides data.height and data.width
    clip.width = 256  # of the image encoder's states
    clip.num_layers = 6  # of its Transformer
    clip.num_heads = 4  # of its attention
    clip.projection = 256  # width of the embeddings that pictures and texts share

    config.prior = prior = ConfigDict()
    prior.clip = ""  # workdir or folder of the CLIP whose image embeddings are diffused, by a prior; "": pictures are
    prior.width = 256  # of the prior's Transformer
    prior.num_layers = 4  # of the Transformer
    prior.num_heads = 4  # of its attention
    prior.candidates = 2  # embeddings that sampling draws, of which the one that suits the text best is kept
    prior.mean = ()  # of embeddings, which the network sees as (embedding - mean) / std; (): of length sqrt(width)
    prior.std = ()  # the same

    config.embedding = embedding = ConfigDict()
    embedding.clip = ""  # of the CLIP whose image embedding the network is given, as DALL-E 2's decoder is; "": none
    embedding.normalized = True  # to length 1, and times the root of the width; False: as CLIP gives it
    embedding.dropout = 0.1  # share of examples that are trained without it, for guidance
    embedding.num_tokens = 4  # that it becomes, beside those of the text
    embedding.token_width = 64  # of all these tokens

    config.upscale = upscale = ConfigDict()
    upscale.height = 0  # of the pictures that the run enlarges to data.height and data.width; 0: it enlarges none
    upscale.width = 0  # the same
    upscale.max_augmentation = 0.5  # training noises them up to this share of the timesteps; 0: they are not noised
    upscale.augmentation = 0.1  # the share to which sampling noises them
    upscale.enlarging = "linear"  # how they are enlarged: linear, corners (linear between corner pixels) or cubic
    upscale.own_last_step = False  # the network of the lowest timestep has weights of its own, as in Karlo

    config.diffusion = diffusion = ConfigDict()
    diffusion.schedule = "linear"  # linear, quadratic, constant, jsd, warmup10, warmup50, cosine or sigmoid
    diffusion.num_timesteps = 1000  # T
    diffusion.beta_start = 1e-4  # of linear, quadratic and the warm-ups
    diffusion.beta_end = 0.02  # of these and of constant
    diffusion.schedule_options = ConfigDict()  # of the cosine and sigmoid schedules
    diffusion.betas = ()  # the user's own betas; they take the place of all of the above
    diffusion.zero_terminal_snr = False  # rescale the betas so that the last timestep is pure noise; for x_0 and v
    diffusion.prediction = "eps"  # eps, x_0 or v
    diffusion.variance = "fixed_large"  # fixed_small, fixed_large or learned
    diffusion.loss = "simple"  # simple, hybrid or vlb
    diffusion.weighting = "none"  # none, min_snr, p2 or truncated_snr
    diffusion.vlb_weight = 1e-3  # of the bound in the hybrid loss
    diffusion.timestep_sampler = "uniform"  # uniform, stratified or importance
    diffusion.clip = True  # the predicted x_0 to [-clip_range, clip_range] when sampling
    diffusion.clip_range = 1.0  # 1 for images; larger for embeddings, whose values lie further out
    diffusion.dynamic_threshold = 0.0  # a quantile such as 0.995 for dynamic thresholding; 0: off
    diffusion.threshold_limit = 0.0  # the largest threshold of dynamic thresholding; 0: any

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "adam"  # any of optax
    optimizer.learning_rate = 2e-4  # after the warm-up
    optimizer.decay = "constant"  # constant, cosine or linear, after the warm-up
    optimizer.decay_steps = 0  # the step at which the learning rate has reached 0; 0: train.num_steps
    optimizer.warmup_steps = 5000  # in which the learning rate rises from 0
    optimizer.grad_clip = 1.0  # global norm; 0: off
    optimizer.options = ConfigDict()  # further arguments of the optax optimiser: b1, b2, eps, weight_decay, ...

    config.train = train = ConfigDict()
    train.objective = "diffusion"  # or what other runs use: autoencoder, their autoencoder.source; clip, text.encoder
    train.batch_size = 128  # of all devices together
    train.num_steps = 800_000  # of the whole run
    train.ema_decays = (0.9999,)  # the first is the one that pictures are made with
    train.label_dropout = 0.0  # share of examples that are trained without their class, for guidance
    train.accumulation = 1  # in how many parts a batch's gradient is taken, one after the other, for memory
    train.steps_per_dispatch = 1  # that the host hands to an accelerator at once
    train.init_from = ""  # a workdir whose averaged weights this run starts from

    config.lora = lora = ConfigDict()
    lora.rank = 0  # of LoRA adapters for attention's projections, trained instead of the network; 0: train the network
    lora.alpha = 0.0  # the adapters are multiplied by alpha / rank; 0: alpha is the rank
    lora.text_encoder = False  # adapters for the attention of the frozen text encoder, too, which then runs every step

    config.mesh = mesh = ConfigDict()
    mesh.data = -1  # devices that divide the batch alone; -1: what fsdp leaves
    mesh.fsdp = 1  # devices that divide parameters, averages and optimiser state, too

    config.log = log = ConfigDict()
    log.every_steps = 100  # a line of metrics.jsonl
    log.tensorboard = True  # the same for TensorBoard
    log.wandb = ""  # project of Weights & Biases; "": none
    log.sample_every_steps = 5000  # a grid of EMA samples; 0: none
    log.sample_images = 64  # in that grid
    log.sample_steps = 250  # timesteps that these are sampled at; 0: every one

    config.evaluate = evaluate = ConfigDict()
    evaluate.every_steps = 0  # bits/dim and a Frechet distance on the way, or a CLIP's retrieval; 0: none
    evaluate.likelihood_images = 128  # whose bits/dim are estimated; 0: none
    evaluate.num_images = 512  # samples whose Frechet distance is taken, or a CLIP's pictures; 0: none
    evaluate.num_real = 10_000  # training images that they are compared with
    evaluate.sampler = "dpmpp_2m"  # of these samples
    evaluate.num_steps = 20  # timesteps that they are sampled at
    evaluate.features = ""  # digits, inception or the file of its weights; "": as the images' size asks

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every_steps = 5000  # steps between two
    checkpoint.every_minutes = 0.0  # also after so many minutes; 0: off
    checkpoint.keep = 3  # of the newest

    config.sample = sample = ConfigDict()
    sample.sampler = "ddpm"  # ddpm, ddim, dpmpp_2m, dpmpp_2m_sde, heun, unipc or plms
    sample.num_steps = 0  # timesteps to call the network at; 0: every one
    sample.spacing = ""  # linspace, leading, trailing, quadratic, logsnr or karras; "": as suits the sampler
    sample.spacing_offset = 0  # added to the timesteps of the leading spacing
    sample.skip_lowest = False  # of num_steps + 1 timesteps, the lowest is left out
    sample.stop_at_first = False  # end at the first timestep's noise level, not at the clean image
    sample.levels = ""  # noise levels between timesteps too: linspace, karras or logsnr; "": the timesteps' own
    sample.fractional = False  # call the network at fractional timesteps there, not at the nearest
    sample.scaled_start = False  # start from noise of the first level's size, not of variance 1
    sample.eta = 0.0  # of ddim: 0, deterministic, to 1
    sample.order = 0  # of unipc: 1, 2 or 3; 0: 2
    sample.guidance_scale = 1.0  # of a class-conditional run: 1 is the class alone, more exaggerates it
    sample.guidance_rescale = 0.0  # 0 to 1: brings the guided output back to the usual contrast
    sample.guidance_interval = ()  # (lowest, highest) guided timestep; (): all
    sample.num_images = 64  # in the grid at the end of training
    sample.batch_size = 256  # images at a time
    return config


# Fields that may differ when a run goes on: they change how long and how it is watched, not what is learned.
MAY_CHANGE = (
    "train.num_steps",
    "train.steps_per_dispatch",
    "model.remat",
    "mesh",
    "log",
    "evaluate",
    "checkpoint",
    "sample",
    "data.cache_gib",
    "data.num_workers",
    "data.data_dir",
    "data.path",
)
_COMMON_OPTIMIZERS = ("adabelief", "adafactor", "adam", "adamax", "adamw", "lamb", "lion", "nadam", "radam", "sgd")
# The options of sampling that a table of coefficients is made of.
FREE_FORM = ("diffusion.schedule_options", "optimizer.options")


def fields(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("section.field", value) of every leaf."""
    for name, value in config.items():
        if isinstance(value, Mapping | ConfigDict) and prefix + name not in FREE_FORM:
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, dict(value) if isinstance(value, Mapping | ConfigDict) else value


def to_json(config: ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote; ValueError if the text is something else.

    A field that came after the run was started has its default, which is to change nothing.
    """

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: tuples(item) for name, item in value.items()}
        return tuple(tuples(item) for item in value) if isinstance(value, list) else value

    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    config = default_config()
    with config.ignore_type():
        config.update(tuples(value))
    return config


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """What differs in fields that may not change while a run goes on, as "field: old -> new"."""
    old_fields, new_fields = dict(fields(old)), dict(fields(new))
    return [
        f"{name}: {old_fields.get(name)!r} -> {new_fields.get(name)!r}"
        for name in sorted(old_fields.keys() | new_fields.keys())
        if old_fields.get(name) != new_fields.get(name)
        and not any(name == allowed or name.startswith(allowed + ".") for allowed in MAY_CHANGE)
    ]


def sampling_calls(config: ConfigDict, schedule: Schedule) -> int:
    """How often sampling calls the network; ValueError for sampler options that do not go together."""
    return len(sampling_steps(config).table(schedule, config.diffusion.variance).t)


def make_betas_from(config: ConfigDict) -> np.ndarray:
    """The float64 [T] betas."""
    diffusion = config.diffusion
    if diffusion.betas:
        betas = np.asarray(diffusion.betas, np.float64)
    else:
        betas = make_betas(
            diffusion.schedule,
            diffusion.num_timesteps,
            diffusion.beta_start,
            diffusion.beta_end,
            **diffusion.schedule_options,
        )
    return rescale_to_zero_terminal_snr(betas) if diffusion.zero_terminal_snr else betas


def make_schedule_from(config: ConfigDict) -> Schedule:
    return make_schedule(make_betas_from(config))


def history_timesteps(config: ConfigDict) -> int | None:
    """T if training keeps a history of losses by timestep, else None."""
    keeps = config.train.objective == "diffusion" and config.diffusion.timestep_sampler == "importance"
    return len(make_betas_from(config)) if keeps else None


def make_condition(config: ConfigDict, dataset: Mapping[str, Any] | None = None, dtype: str | None = None) -> Condition:
    """What can be said to the run.

    Args:
      config: of the run.
      dataset: the description of its images, with what the workdir keeps of its texts; None: there is none yet, and
        classes and captions are any.
      dtype: what the weights of frozen parts are held in; None: float32.
    """
    if config.text.encoder:
        return CaptionCondition(
            texts=make_texts(config, dataset or {}, dtype),
            dropout=config.text.dropout,
            shown=tuple((dataset or {}).get("shown_captions", ("",))),
        )
    if not config.model.class_conditional:
        return NoCondition()
    names = (dataset or {}).get("class_names")
    names = tuple(_ANY_CLASSES if names is None else names)
    return ClassCondition(names, config.train.label_dropout, config.model.null_class)


def make_texts(config: ConfigDict, dataset: Mapping[str, Any], dtype: str | None = None) -> Texts:
    """How captions and prompts reach the network; `dataset` and `dtype` as in `make_condition`."""
    text = config.text
    is_trained = text.encoder == TRAINED
    encoder_folder = dataset.get("text_encoder", text.encoder)
    if "tokenizer" in dataset:
        tokenizer = Tokenizer.from_json(dataset["tokenizer"])
    elif text.tokenizer or not is_trained:
        tokenizer = Tokenizer.read(text.tokenizer or encoder_folder, text.max_length or None)
    else:
        tokenizer = train_tokenizer(config, ())
    if is_trained:
        vocab_size = tokenizer.vocab_size if text.tokenizer else text.vocab_size
        sizes = (text.width, text.num_layers, text.num_heads)
        dtype = jnp.dtype(config.model.dtype)
        encoder: nn.Module
        if config.train.objective == "clip":
            more = {"mlp_width": 4 * text.width, "end_token": _end_token(config, tokenizer)}
            more |= {"projection": config.clip.projection}
            encoder = CLIPTextEncoder(vocab_size, tokenizer.max_length, *sizes, dtype=dtype, **more)
        else:
            encoder = TextEncoder(vocab_size, tokenizer.max_length, *sizes, dtype=dtype)
        return TrainedTexts(tokenizer, encoder, text.mask_padding, text.pooled)
    read = open_text_encoder(encoder_folder)
    transformers.check_tokenizer(tokenizer, read, encoder_folder)
    frozen = FrozenTexts(
        tokenizer,
        read,
        open_params=lambda: _held_in(dtype, transformers.read(encoder_folder)[1]),
        cache_bytes=int(config.data.cache_gib * 2**30),
        mask_padding=text.mask_padding,
        pooled=text.pooled,
        mask_in_encoder=text.mask_in_encoder,
    )
    return frozen.trained() if config.lora.text_encoder else frozen


def train_tokenizer(config: ConfigDict, captions: Iterable[str]) -> Tokenizer:
    """The tokenizer that the config asks for where it names none."""
    text, end_last = config.text, config.train.objective == "clip"
    return Tokenizer.train(captions, text.vocab_size, text.max_length or 64, end_last=end_last)


def _end_token(config: ConfigDict, tokenizer: Tokenizer) -> int:
    """The id of the token at which a CLIP's text encoder has the state of the whole text."""
    end = tokenizer.end_id
    if end is None or end == 2:
        what = "ends texts with the token 2, by which transformers means the largest one" if end else "ends no text"
        raise UserError(
            f"the tokenizer of config.text.tokenizer, {config.text.tokenizer!r}, {what}; accepted for a CLIP: one with "
            "another end token, or '', which trains one"
        )
    return end


def make_pixels(config: ConfigDict) -> Pixels:
    data = config.data
    return Pixels((data.height, data.width, data.channels), data.flip)


def make_autoencoder(config: ConfigDict) -> Autoencoder:
    """The autoencoder that a run with train.objective "autoencoder" trains."""
    autoencoder = config.autoencoder
    return Autoencoder(
        channels=config.data.channels,
        latent_channels=autoencoder.latent_channels,
        widths=tuple(autoencoder.level_channels),
        num_res_blocks=autoencoder.num_res_blocks,
        num_groups=autoencoder.num_groups,
        middle_attention=autoencoder.middle_attention,
        dtype=jnp.dtype(config.model.dtype),
    )


def make_clip_encoders(
    config: ConfigDict, dataset: Mapping[str, Any] | None = None
) -> tuple[CLIPTextEncoder, CLIPImageEncoder]:
    """The encoders of the CLIP that a run with train.objective "clip" trains; `dataset` as in `make_condition`."""
    data, clip = config.data, config.clip
    texts = make_texts(config, dataset or {})
    assert isinstance(texts, TrainedTexts)
    assert isinstance(texts.encoder, CLIPTextEncoder)
    return texts.encoder, CLIPImageEncoder(
        image_size=data.height if data.height == data.width else (data.height, data.width),
        patch_size=clip.patch_size,
        channels=data.channels,
        width=clip.width,
        num_layers=clip.num_layers,
        num_heads=clip.num_heads,
        mlp_width=4 * clip.width,
        projection=clip.projection,
        dtype=jnp.dtype(config.model.dtype),
    )


def open_text_encoder(path: str | Path) -> transformers.Encoder:
    """The text encoder of a transformers folder or of a CLIP's workdir, without its parameters.

    Raises:
      UserError: no such encoder there, or one that is not supported.
    """
    if not is_workdir(path):
        return transformers.read_module(path)
    folder = Path(path).expanduser()
    config = from_json((folder / "config.json").read_text())
    if config.train.objective != "clip":
        raise UserError(
            f"config.text.encoder {str(path)!r} is a run with train.objective {config.train.objective!r}; accepted: "
            "'clip'"
        )
    return make_clip_encoders(config, {"tokenizer": (folder / "tokenizer.json").read_text("utf-8")})[0]


def is_workdir(path: str | Path) -> bool:
    """Whether a folder holds a run, not another project's files."""
    return (Path(path).expanduser() / "dataset.json").is_file()


def autoencoder_folder(path: str | Path) -> Path:
    """Where the autoencoder lies in a diffusers folder, which may be a whole pipeline's."""
    folder = Path(path).expanduser()
    return folder / "vae" if (folder / "vae").is_dir() else folder


def open_autoencoder(path: str | Path) -> tuple[Autoencoder, float]:
    """The autoencoder of a workdir or of a diffusers folder, without its parameters, and the scaling factor of its
    latents, 1 where that is not known yet.

    Raises:
      UserError: no autoencoder there, or one that is not supported.
    """
    if not is_workdir(path):
        return autoencoder_lib.read_module(autoencoder_folder(path))
    config = from_json((Path(path).expanduser() / "config.json").read_text())
    if config.train.objective != "autoencoder":
        raise UserError(
            f"config.autoencoder.source {str(path)!r} is a run with train.objective {config.train.objective!r}; "
            "accepted: 'autoencoder'"
        )
    return make_autoencoder(config), 1.0


def make_decoder(config: ConfigDict, dataset: Mapping[str, Any] | None = None, dtype: str | None = None) -> Decoder:
    """What lies between pictures and what the run diffuses; `dataset` and `dtype` as in `make_condition`."""
    if config.prior.clip:
        return Embeddings(make_embedder(config, dataset))
    if not config.autoencoder.source:
        return make_pixels(config)
    data, folder = config.data, (dataset or {}).get("autoencoder", config.autoencoder.source)
    autoencoder, scaling_factor = open_autoencoder(folder)
    return Latents(
        (data.height, data.width, data.channels),
        autoencoder,
        open_params=lambda: _held_in(dtype, autoencoder_lib.read(folder)[1]),
        scaling_factor=config.autoencoder.scaling_factor or scaling_factor,
        flip=data.flip,
        cache_bytes=int(data.cache_gib * 2**30),
    )


def make_embedder(config: ConfigDict, dataset: Mapping[str, Any] | None = None) -> Embedder:
    """The CLIP whose image embeddings the run draws, or is given; `dataset` as in `make_condition`."""
    dataset, units = dataset or {}, None
    if config.prior.mean:
        units = Units(np.array(config.prior.mean, np.float32), np.array(config.prior.std, np.float32))
    elif config.embedding.clip and not config.embedding.normalized:
        units = Units()
    if "embedding_width" in dataset:
        return Embedder(dataset["embedding_width"], _refuse_pictures, units)
    folder = dataset.get("clip", config.prior.clip or config.embedding.clip)
    if is_workdir(folder):
        width = from_json((Path(folder).expanduser() / "config.json").read_text()).clip.projection
    else:
        width = transformers.clip_width(folder)
    return Embedder(width, lambda: transformers.read_clip(folder), units)


def _refuse_pictures() -> CLIP:
    raise UserError(
        "this run was imported without CLIP's image encoder, which embeds pictures; accepted for variations of "
        "pictures: an import of diffusers' UnCLIPImageVariationPipeline"
    )


def make_network(config: ConfigDict, condition: Condition | None = None) -> nn.Module:
    """The network; None: of any condition that the config can have."""
    condition = make_condition(config) if condition is None else condition
    if config.prior.clip:
        return condition.network(_make_prior(config, condition))
    options = dict(config.model)
    del options["class_conditional"], options["masked_picture"]
    off = (
        *("level_channels", "level_res_blocks", "attention_levels", "downsample_levels", "upsample_levels"),
        *("head_channels", "token_channels", "time_channels"),
    )
    groups = options["middle_attention_groups"]
    net = UNet(
        **{
            **options,
            **{name: options[name] or None for name in off},
            "middle_attention_groups": None if groups < 0 else groups,
            "num_timesteps": len(make_betas_from(config)) if options["time_embedding"] == "learned" else None,
            "dtype": jnp.dtype(options["dtype"]),
            "learned_variance": config.diffusion.variance == "learned",
            **condition.network_options(),
            **({"vector_embedding": "none"} if config.embedding.clip else {}),
        }
    )
    embedding = config.embedding
    if embedding.clip:
        time_width = net.time_channels or 4 * net.channels
        told = EmbeddingCondition(embedding.token_width, time_width, embedding.num_tokens, net.dtype)
        return condition.network(Embedded(net, told))
    if config.upscale.own_last_step:
        return condition.network(OwnLastStep(net, net.clone()))
    return condition.network(net)


def _make_prior(config: ConfigDict, condition: Condition) -> Prior:
    if not isinstance(condition, CaptionCondition):
        raise ValueError("prior.clip needs texts: a text.encoder, which is usually the same CLIP")
    prior, num_tokens = config.prior, condition.texts.tokenizer.max_length
    return Prior(prior.width, prior.num_layers, prior.num_heads, num_tokens, dtype=jnp.dtype(config.model.dtype))


def make_model(config: ConfigDict, dataset: Mapping[str, Any] | None = None, dtype: str | None = None) -> Model:
    """The parts of the run's system; `dataset` and `dtype` as in `make_condition`."""
    condition, decoder = make_condition(config, dataset, dtype), make_decoder(config, dataset, dtype)
    net, schedule = make_network(config, condition), make_schedule_from(config)
    return Model(condition, net, schedule, decoder, make_given(config, schedule, decoder, dataset))


def make_given(
    config: ConfigDict, schedule: Schedule, decoder: Decoder, dataset: Mapping[str, Any] | None = None
) -> Given | None:
    """What the run is given besides its condition; None: nothing. `dataset` as in `make_condition`."""
    data, upscale = config.data, config.upscale
    if config.embedding.clip:
        return ImageEmbedding(make_embedder(config, dataset), config.embedding.dropout)
    if config.model.masked_picture:
        assert isinstance(decoder, Latents)
        return MaskedPicture(decoder.shape, decoder.autoencoder.downscaling)
    if not upscale.height:
        return None
    low, high = ((sizes.height, sizes.width, data.channels) for sizes in (upscale, data))
    return LowResolution(
        low, high, schedule, upscale.max_augmentation, upscale.augmentation, data.flip, upscale.enlarging
    )


def _held_in(dtype: str | None, params: Any) -> Any:
    return params if dtype is None else jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """Step -> learning rate: linear warm-up from 0, then constant or falling to 0."""
    optimizer = config.optimizer
    steps = optimizer.decay_steps or config.train.num_steps
    rate, remaining = optimizer.learning_rate, max(steps - optimizer.warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(rate),
        "cosine": optax.cosine_decay_schedule(rate, remaining),
        "linear": optax.linear_schedule(rate, 0.0, remaining),
    }[optimizer.decay]
    if not optimizer.warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, rate, optimizer.warmup_steps)
    return optax.join_schedules([warmup, after], [optimizer.warmup_steps])


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Clipping by global norm, then the named optax optimiser."""
    name, options = config.optimizer.name, dict(config.optimizer.options)
    factory: Any = getattr(optax, name, None)
    parameters = list(inspect.signature(factory).parameters) if callable(factory) else []
    if "learning_rate" not in parameters or name.startswith("scale_by"):
        raise UserError(
            f"config.optimizer.name is {name!r}, which is no optimiser of optax.{nearest(name, _COMMON_OPTIMIZERS)}"
        )
    unknown = [option for option in options if option not in parameters or option == "learning_rate"]
    if unknown:
        raise UserError(
            f"config.optimizer.options has {unknown[0]!r}, which optax.{name} does not take."
            f"{nearest(unknown[0], parameters)}"
        )
    optimizer = factory(learning_rate=learning_rate(config), **options)
    if config.optimizer.grad_clip:
        optimizer = optax.chain(optax.clip_by_global_norm(config.optimizer.grad_clip), optimizer)
    return optimizer


def loss_options(config: ConfigDict) -> dict[str, Any]:
    """The keyword arguments of `training_loss`."""
    names = ("prediction", "variance", "loss", "weighting", "vlb_weight")
    return {name: config.diffusion[name] for name in names}


def step_options(config: ConfigDict) -> dict[str, Any]:
    """The keyword arguments of `make_train_step` that the config fixes, but for the steps per dispatch."""
    return {"seed": config.seed, "accumulation": config.train.accumulation}


def lora_scale(config: ConfigDict) -> float:
    """What LoRA's adapters are multiplied by."""
    return (config.lora.alpha or config.lora.rank) / config.lora.rank


def sampling_steps(config: ConfigDict) -> Steps:
    """The steps that the run samples by."""
    sample = config.sample
    return Steps(
        sampler=sample.sampler,
        num_steps=sample.num_steps or None,
        spacing=sample.spacing or None,
        spacing_offset=sample.spacing_offset,
        skip_lowest=sample.skip_lowest,
        stop_at_first=sample.stop_at_first,
        eta=sample.eta or None,
        order=sample.order or None,
        levels=sample.levels or None,
        fractional=sample.fractional,
        scaled_start=sample.scaled_start,
    )


def parameterization(config: ConfigDict) -> Parameterization:
    """What the network's output means."""
    diffusion = config.diffusion
    return Parameterization(
        diffusion.prediction,
        diffusion.variance,
        diffusion.clip,
        diffusion.dynamic_threshold or None,
        diffusion.clip_range,
        diffusion.threshold_limit or None,
    )


def guidance(config: ConfigDict) -> Guidance:
    """The guidance that the run samples with."""
    return Guidance(*(config.sample[f"guidance_{name}"] for name in ("scale", "rescale", "interval")))


def sampling_request(config: ConfigDict, condition: Condition) -> Request:
    """How the run samples where nothing else is asked for."""
    candidates = config.prior.candidates if config.prior.clip else 1
    return Request(condition, sampling_steps(config), parameterization(config), guidance(config), candidates=candidates)


def evaluation_request(config: ConfigDict, condition: Condition) -> Request:
    """How the evaluation during training samples."""
    evaluate, stop = config.evaluate, config.sample.stop_at_first
    steps = Steps(evaluate.sampler, evaluate.num_steps, stop_at_first=stop)
    return dataclasses.replace(sampling_request(config, condition), steps=steps)
