"""A small CLIP with random weights, and CLIP's tokenizer with single bytes as tokens."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import pre_tokenizers

from ddpm_jax.interop.transformers import CLIP
from ddpm_jax.models.clip import CLIPImageEncoder, CLIPTextEncoder
from ddpm_jax.text.tokenizers import Tokenizer

VOCAB_SIZE = 2 * 256 + 2
TEXT = CLIPTextEncoder(
    VOCAB_SIZE, max_length=24, width=16, num_layers=2, num_heads=2, mlp_width=24, end_token=513, projection=8
)
IMAGE = CLIPImageEncoder(image_size=12, patch_size=4, width=24, num_layers=2, num_heads=3, mlp_width=32, projection=8)


def write_tokenizer(folder, max_length=24):
    """CLIP's vocab.json and merges.txt without any merges; the start and end tokens are 512 and 513."""
    folder.mkdir(exist_ok=True)
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": max_length}))
    return folder


def make_clip(folder):
    """A CLIP; its tokenizer's files are written to the folder."""
    rng = np.random.default_rng(0)
    examples = {"text": jnp.zeros((1, 2), jnp.int32), "image": jnp.zeros((1, 12, 12, 3))}
    params = {}
    for name, net in (("text", TEXT), ("image", IMAGE)):
        shapes = jax.eval_shape(net.init, jax.random.key(0), examples[name])["params"]
        params[name] = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    tokenizer = Tokenizer.read(write_tokenizer(folder))
    return CLIP(TEXT, IMAGE, params, 2.5, tokenizer, (0.5, 0.4, 0.3), (0.25, 0.5, 0.75))
