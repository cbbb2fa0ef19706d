"""What the readers of diffusers' pipelines of several networks give: each network as a stage, which becomes a run."""

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
      name: what it does, as the name of a folder.
      config: of the run.
      params: of the network.
      texts: the tokenizer of the prompts, and the encoder's module and parameters; None: it takes no prompts.
      clip: whose image embeddings the network is given or draws; None: there is none in the folder.
      described: what else the description of the run's data says, as JSON values.
      notes: sentences about what is sampled otherwise than by diffusers, or was left aside.
    """

    name: str
    config: ConfigDict
    params: Any
    texts: tuple[Tokenizer, Encoder, Any] | None = None
    clip: CLIP | None = None
    described: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def class_name(folder: Path) -> str | None:
    """The class of pipeline that a folder names; None: none."""
    index = read_json_object(folder / INDEX) if (folder / INDEX).is_file() else {}
    name = index.get("_class_name")
    return name if isinstance(name, str) else None


def named_parts(folder: Path) -> set[str]:
    """The parts of its own that a pipeline's index names."""
    index = read_json_object(folder / INDEX)
    return {part for part, entry in index.items() if isinstance(entry, list) and entry and entry[0] is not None}


def require_parts(folder: Path, kind: str, parts: tuple[str, ...]) -> None:
    """UserError for the first of the parts that the folder of a pipeline does not have."""
    for part in parts:
        if not (folder / part).is_dir():
            raise UserError(f"{str(folder)!r} has no {part}/, which a pipeline of diffusers' {kind} has")


def read_fields(folder: Path, part: str, file: str = "config.json") -> tuple[dict[str, Any], str]:
    """The fields of a part's config file, and the file."""
    path = folder / part / file
    if not path.is_file():
        raise UserError(f"there is no {str(path)!r}; a diffusers folder has one")
    return read_json_object(path), str(path)


def read_tensors(folder: Path, part: str) -> tuple[Path, tensors_lib.Tensors]:
    """The weights' file of a part of diffusers, and its tensors."""
    return tensors_lib.read_weights(folder / part, WEIGHTS)


def read_texts(
    folder: Path, length: int | None = None, prepared: Callable[[Tokenizer], Tokenizer] = lambda tokenizer: tokenizer
) -> tuple[Tokenizer, Encoder, Any]:
    """The tokenizer and the encoder of text, its module and parameters.

    Args:
      folder: of the pipeline.
      length: tokens of every text; None: as the tokenizer's files say.
      prepared: what becomes of the tokenizer.
    """
    tokenizer = prepared(Tokenizer.read(folder / "tokenizer", length))
    encoder, params = transformers.read(folder / "text_encoder")
    transformers.check_tokenizer(tokenizer, encoder, str(folder / "text_encoder"))
    return tokenizer, encoder, params


@contextmanager
def values_of(*files: str) -> Iterator[None]:
    """UserError that names the files for a value of theirs of another type than any that is read."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{' or '.join(map(repr, files))} holds a value that does not fit: {error}") from None
