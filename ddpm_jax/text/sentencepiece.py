"""Reads model files of the sentencepiece library (Kudo & Richardson 2018) without that library."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from ddpm_jax.runtime.errors import UserError, first_line, reason

_Field = descriptor_pb2.FieldDescriptorProto
_UNIGRAM = 1  # kind of model
_UNKNOWN, _CONTROL = 2, 3  # kinds of pieces

# The fields of sentencepiece_model.proto that are read: name, number, type, default.
_PIECE = (
    ("piece", 1, _Field.TYPE_STRING, ""),
    ("score", 2, _Field.TYPE_FLOAT, "0"),
    ("type", 3, _Field.TYPE_INT32, "1"),
)
_TRAINER = (("model_type", 3, _Field.TYPE_INT32, str(_UNIGRAM)),)
_NORMALIZER = (("precompiled_charsmap", 2, _Field.TYPE_BYTES, ""),)


@dataclasses.dataclass(frozen=True)
class Unigram:
    """A unigram model of subwords (Kudo 2018, arXiv:1804.10959).

    Attributes:
      pieces: (piece, logarithm of its probability), in the order of their ids.
      unknown: id of the piece for unknown characters.
      control: pieces that do not occur in texts, such as the end token.
      normalization: how characters are replaced first, as the `tokenizers` library takes it; b"": not at all.
    """

    pieces: tuple[tuple[str, float], ...]
    unknown: int
    control: tuple[str, ...]
    normalization: bytes


def read(path: str | Path) -> Unigram:
    """Reads a file such as spiece.model; UserError if it is broken or holds a different kind of model."""
    try:
        model = _model_class().FromString(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {reason(error)}") from None
    except DecodeError as error:
        raise UserError(f"{str(path)!r} is not a sentencepiece model: {first_line(error)}") from None
    if model.trainer_spec.model_type != _UNIGRAM:
        raise UserError(f"{str(path)!r} holds a model of type {model.trainer_spec.model_type}; accepted: 1 (unigram)")
    unknown = [i for i, piece in enumerate(model.pieces) if piece.type == _UNKNOWN]
    if len(unknown) != 1:
        raise UserError(f"{str(path)!r} has {len(unknown)} unknown tokens; accepted: one")
    return Unigram(
        tuple((piece.piece, piece.score) for piece in model.pieces),
        unknown[0],
        tuple(piece.piece for piece in model.pieces if piece.type == _CONTROL),
        model.normalizer_spec.precompiled_charsmap,
    )


@functools.cache
def _model_class() -> Any:
    """The class of the protocol buffer message in such a file."""
    file = descriptor_pb2.FileDescriptorProto(name="ddpm_jax/sentencepiece.proto", package="ddpm_jax", syntax="proto2")
    for message, fields in (("Piece", _PIECE), ("Trainer", _TRAINER), ("Normalizer", _NORMALIZER)):
        own = file.message_type.add(name=message)
        for name, number, kind, default in fields:
            own.field.add(name=name, number=number, type=kind, label=_Field.LABEL_OPTIONAL, default_value=default)
    whole = file.message_type.add(name="Model")
    for name, number, message, label in (
        ("pieces", 1, "Piece", _Field.LABEL_REPEATED),
        ("trainer_spec", 2, "Trainer", _Field.LABEL_OPTIONAL),
        ("normalizer_spec", 3, "Normalizer", _Field.LABEL_OPTIONAL),
    ):
        kind = _Field.TYPE_MESSAGE
        whole.field.add(name=name, number=number, type=kind, type_name=f".ddpm_jax.{message}", label=label)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("ddpm_jax.Model"))
