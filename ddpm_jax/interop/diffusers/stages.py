"""Stages of diffusers' pipelines with several networks; each stage becomes a run."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ddpm_jax.interop import tensors as tensors_lib
from ddpm_jax.interop import transformers
from ddpm_jax.interop.diffusers.fields import WEIGHTS
from ddpm_jax.interop.transformers import CLIP, Encoder
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.files import read_json_object
from ddpm_jax.text.tokenizers import Tokenizer

INDEX = "model_index.json"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One network of a pipeline, read.

    Attributes:
      name: its purpose, used as the folder's name.
      config: of the run.
      params: of the network.
      texts: the tokenizer of the prompts, and the encoder's module and parameters; None: it takes no prompts.
      clip: the CLIP whose image embeddings the network takes or draws; None: there is none in the folder.
      described: further entries in the description of the run's data, as JSON values.
      notes: sentences about differences from diffusers in sampling, and about ignored parts.
    """

    name: str
    config: ConfigDict
    params: Any
    texts: tuple[Tokenizer, Encoder, Any] | None = None
    clip: CLIP | None = None
    described: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def class_name(folder: Path) -> str | None:
    """The pipeline class named in a folder, or None."""
    index = read_json_object(folder / INDEX) if (folder / INDEX).is_file() else {}
    name = index.get("_class_name")
    return name if isinstance(name, str) else None


def named_parts(folder: Path) -> set[str]:
    """The pipeline's own parts that its index names."""
    index = read_json_object(folder / INDEX)
    return {part for part, entry in index.items() if isinstance(entry, list) and entry and entry[0] is not None}


def require_parts(folder: Path, kind: str, parts: tuple[str, ...]) -> None:
    """UserError for the first of the parts that the pipeline's folder lacks."""
    for part in parts:
        if not (folder / part).is_dir():
            raise UserError(f"{str(folder)!r} has no {part}/, which diffusers' {kind} has")


def read_fields(folder: Path, part: str = "", file: str = "config.json") -> tuple[dict[str, Any], str]:
    """Reads the config file of a part, or of the folder itself; returns its fields and its path."""
    path = folder / part / file
    if not path.is_file():
        raise UserError(f"{str(path)!r} does not exist; every diffusers folder has one")
    return read_json_object(path), str(path)


def read_tensors(folder: Path, part: str) -> tuple[Path, tensors_lib.Tensors]:
    """Reads the weights of a diffusers part; returns the file and its tensors."""
    return tensors_lib.read_weights(folder / part, WEIGHTS)


def read_texts(
    folder: Path, length: int | None = None, prepared: Callable[[Tokenizer], Tokenizer] = lambda tokenizer: tokenizer
) -> tuple[Tokenizer, Encoder, Any]:
    """Reads the tokenizer, and the text encoder's module and parameters.

    Args:
      folder: of the pipeline.
      length: number of tokens of every text; None: from the tokenizer's files.
      prepared: applied to the tokenizer.
    """
    tokenizer = prepared(Tokenizer.read(folder / "tokenizer", length))
    encoder, params = transformers.read(folder / "text_encoder")
    transformers.check_tokenizer(tokenizer, encoder, str(folder / "text_encoder"))
    return tokenizer, encoder, params


@contextmanager
def values_of(*files: str) -> Iterator[None]:
    """Turns errors due to values of the wrong type into a UserError that names the files."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{' or '.join(map(repr, files))} has an invalid value: {error}") from None
