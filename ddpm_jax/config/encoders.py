"""The encoders of texts and pictures of a config: trained along with the run, or frozen and read from files."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax.config.defaults import TRAINED
from ddpm_jax.config.values import from_json
from ddpm_jax.interop import transformers
from ddpm_jax.interop.diffusers import autoencoder as autoencoder_lib
from ddpm_jax.interop.transformers import CLIP
from ddpm_jax.models.autoencoder import Autoencoder
from ddpm_jax.models.clip import CLIPImageEncoder, CLIPTextEncoder, TextEncoder
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.sampling.embeddings import Embedder, Units
from ddpm_jax.text.encoders import FrozenTexts, Texts, TrainedTexts
from ddpm_jax.text.tokenizers import Tokenizer


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
        open_params=lambda: held_in(dtype, transformers.read(encoder_folder)[1]),
        cache_bytes=int(config.data.cache_gib * 2**30),
        mask_padding=text.mask_padding,
        pooled=text.pooled,
        mask_in_encoder=text.mask_in_encoder,
    )
    return frozen.trained() if config.lora.text_encoder else frozen


def train_tokenizer(config: ConfigDict, captions: Iterable[str]) -> Tokenizer:
    """Trains the tokenizer of a config that names none."""
    text, end_last = config.text, config.train.objective == "clip"
    return Tokenizer.train(captions, text.vocab_size, text.max_length or 64, end_last=end_last)


def _end_token(config: ConfigDict, tokenizer: Tokenizer) -> int:
    """The id of the token whose state represents the whole text in a CLIP's text encoder."""
    end = tokenizer.end_id
    if end is None or end == 2:
        what = "ends texts with the token 2, by which transformers means the largest one" if end else "ends no text"
        raise UserError(
            f"the tokenizer of config.text.tokenizer, {config.text.tokenizer!r}, {what}; accepted for a CLIP: one with "
            "another end token, or '', which trains one"
        )
    return end


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


def autoencoder_folder(path: str | Path) -> Path:
    """The folder of the autoencoder in a diffusers folder, which may be a whole pipeline's."""
    folder = Path(path).expanduser()
    return folder / "vae" if (folder / "vae").is_dir() else folder


def open_autoencoder(path: str | Path) -> tuple[Autoencoder, float]:
    """The autoencoder of a workdir or of a diffusers folder, without its parameters, and the scaling factor of its
    latents, or 1 if that is not known yet.

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


def make_embedder(config: ConfigDict, dataset: Mapping[str, Any] | None = None) -> Embedder:
    """The CLIP whose image embeddings the run draws or takes as an input; `dataset` as in `make_condition`."""
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


def is_workdir(path: str | Path) -> bool:
    """Whether a folder contains a run, not another project's files."""
    return (Path(path).expanduser() / "dataset.json").is_file()


def held_in(dtype: str | None, params: Any) -> Any:
    """The parameters in this dtype; None: in their own."""
    return params if dtype is None else jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)
