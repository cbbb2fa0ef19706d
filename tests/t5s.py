"""A small T5 of random weights, with a sentencepiece model of words and single characters."""

import string
import struct

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.interop import transformers
from ddpm_jax.models.t5 import T5Encoder

WORDS = ("a", "red", "apple", "two", "green", "pears", "plum")
PIECES = (
    ("<pad>", 0.0, 3),
    ("</s>", 0.0, 3),
    ("<unk>", 0.0, 2),
    *(("\u2581" + word, -2.0, 1) for word in WORDS),
    *((character, -9.0, 1) for character in "\u2581" + string.ascii_lowercase),
)
NET = T5Encoder(
    len(PIECES) + 110,  # a hundred sentinels, and some that no token has
    width=16,
    num_layers=2,
    num_heads=3,
    head_width=8,
    mlp_width=24,
    num_buckets=8,
    max_distance=20,
)


def field(number, value):
    """A field of a protocol buffer message: a whole number below 128, a float, or bytes."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    assert len(value) < 128
    return bytes([number << 3 | 2, len(value)]) + value


def spiece(pieces=PIECES, kind=1):
    """The bytes of a sentencepiece model."""
    content = (field(1, text.encode()) + field(2, score) + field(3, type_) for text, score, type_ in pieces)
    return b"".join(field(1, piece) for piece in content) + field(2, field(3, kind))


def random_params(net):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32) / 2, shapes)


def write_t5(folder):
    """A transformers folder of it."""
    transformers.write(folder, NET, random_params(NET))
    (folder / "spiece.model").write_bytes(spiece())
    return folder
