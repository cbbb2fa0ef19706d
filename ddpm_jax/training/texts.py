"""The tokenizer and the frozen text encoder of a run, kept in its workdir so that sampling needs nothing else."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ddpm_jax.config import TRAINED, is_workdir, make_texts, open_text_encoder, train_tokenizer
from ddpm_jax.data.source import Source
from ddpm_jax.data.spread import spread_captions
from ddpm_jax.interop import transformers
from ddpm_jax.runtime import workdir
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.training.clips import load_clip

_SHOWN = 64  # captions to sample with if no prompts are given


def text_description(
    config: ConfigDict, source: Source, folder: Path, known: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Makes the tokenizer, and copies a frozen encoder to the workdir.

    Args:
      config: of the run.
      source: its images, with captions.
      folder: the workdir.
      known: the description from an earlier start of the run.

    Returns:
      Entries for the description of the run's data: "tokenizer", the text of a tokenizer.json; "shown_captions"; and
      "text_encoder", the folder of a frozen encoder. {} without captions.

    Raises:
      UserError: a tokenizer or an encoder that cannot be read.
    """
    if not config.text.encoder:
        return {}
    found = dict(known or {})
    if "tokenizer" not in found:
        found["tokenizer"] = _tokenizer(config, source)
    if "shown_captions" not in found:
        # The captions of the pictures in data.png.
        found["shown_captions"] = spread_captions(source, _SHOWN)
    if config.text.encoder != TRAINED:
        found[workdir.TEXT_ENCODER] = workdir.keep_part(
            folder,
            workdir.TEXT_ENCODER,
            known,
            lambda target: transformers.write(target, *read_text_encoder(config.text.encoder)),
        )
    return {name: found[name] for name in ("tokenizer", "shown_captions", "text_encoder") if name in found}


def read_text_encoder(path: str | Path) -> tuple[transformers.Encoder, Any]:
    """Reads the text encoder of a transformers folder or of a CLIP's workdir, with its float32 parameters.

    Raises:
      UserError: no such encoder there, or one that is not supported.
    """
    if not is_workdir(path):
        return transformers.read(path)
    open_text_encoder(path)  # raises a UserError if the run is not a CLIP
    clip = load_clip(path)
    return clip.text, clip.params["text"]


def _tokenizer(config: ConfigDict, source: Source) -> str:
    """The text of a new run's tokenizer.json."""
    started: Mapping[str, Any] = {}
    if config.train.init_from and config.text.encoder == TRAINED:
        started = workdir.read_dataset(config.train.init_from) or {}
    if config.text.encoder == TRAINED and not config.text.tokenizer:
        if "tokenizer" in started:  # its encoder's embeddings are for these tokens
            return started["tokenizer"]
        return train_tokenizer(config, itertools.chain.from_iterable(source.captions)).to_json()
    found = make_texts(config, {}).tokenizer.to_json()
    if found != started.get("tokenizer", found):
        raise UserError(
            f"--init_from {config.train.init_from!r} has a different tokenizer from config.text.tokenizer, "
            f"{config.text.tokenizer!r}; accepted: config.text.tokenizer='', which takes over that run's"
        )
    return found
