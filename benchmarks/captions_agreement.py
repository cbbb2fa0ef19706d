"""How often the caption that a picture was made from is recognised among all captions.

    python benchmarks/captions_agreement.py real.npz samples.npz

Both files hold `image`, uint8 [N, H, H, C], and N strings: `caption` in the real set, `prompt` in the samples, each of
which is a caption of the real set. A small CLIP (Radford et al. 2021) is trained on the real pictures. For each picture
it ranks all distinct captions by their similarity. The table has the shares of pictures whose own caption ranks first,
and among the first five, for

- the samples;
- the real pictures that the CLIP was trained on;
- unseen real pictures: one per caption, for a random fifth of the captions that have several pictures;
- guessing.

The same CLIP is used for all of them. Samples as good as real pictures, without being copies of them, reach the share
of the unseen ones.
"""

import argparse
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import print_json

from ddpm_jax.evaluation.agreement import retrieval
from ddpm_jax.models.clip import CLIPImageEncoder, TextEncoder
from ddpm_jax.runtime.images import to_float
from ddpm_jax.text.tokenizers import Tokenizer

WIDTH, TEXT_WIDTH, SHARED = 128, 64, 64
VOCAB_SIZE, MAX_LENGTH = 2048, 64
SHIFT = 2  # pixels


class SmallCLIP(nn.Module):
    """Both encoders, with projections of the same width and a learned temperature."""

    image: CLIPImageEncoder
    text: TextEncoder

    def setup(self):
        self.projection = nn.Dense(SHARED, use_bias=False)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(np.log(1 / 0.07)), ())

    def pictures(self, pictures):
        return unit(self.image(to_float(pictures)).projected)

    def captions(self, ids, mask):
        return unit(self.projection(self.text(ids, mask).pooled))

    def __call__(self, pictures, ids, mask):
        """The logits [B, B] of all pairs of a picture and a caption."""
        scale = jnp.exp(jnp.minimum(self.logit_scale, np.log(100)))
        return scale * self.pictures(pictures) @ self.captions(ids, mask).T


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def shifted(key, pictures):
    """The pictures, each moved by up to SHIFT pixels either way; its edges are repeated."""
    padded = jnp.pad(pictures, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    corners = jax.random.randint(key, (len(pictures), 2), 0, 2 * SHIFT + 1)
    return jax.vmap(lambda x, corner: jax.lax.dynamic_slice(x, (*corner, 0), pictures.shape[1:]))(padded, corners)


def contrastive_loss(logits, captions):
    """The symmetric cross-entropy of a batch; equal captions do not count as negatives of one another."""
    same = (captions[:, None] == captions) & ~jnp.eye(len(captions), dtype=bool)
    logits, own = jnp.where(same, -jnp.inf, logits), jnp.arange(len(captions))
    rows, columns = (optax.softmax_cross_entropy_with_integer_labels(x, own).mean() for x in (logits, logits.T))
    return (rows + columns) / 2


def train(net, pictures, captions, ids, mask, *, steps, batch, rate, decay=0.1):
    """The parameters after `steps` steps of AdamW.

    Args:
      net: a SmallCLIP.
      pictures: uint8 [N, H, H, C].
      captions: int [N], the row of `ids` with each picture's caption.
      ids, mask: of the distinct captions.
    """
    optimizer = optax.adamw(
        optax.warmup_cosine_decay_schedule(0, rate, steps // 20, steps),
        b2=0.98,
        weight_decay=decay,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
    )

    @jax.jit
    def step(params, state, key, rows):
        chosen = captions[rows]

        def loss(params):
            logits = net.apply({"params": params}, shifted(key, pictures[rows]), ids[chosen], mask[chosen])
            return contrastive_loss(logits, chosen)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    pictures, captions, ids, mask = map(jnp.asarray, (pictures, captions, ids, mask))
    params = jax.jit(net.init)(jax.random.key(0), pictures[:1], ids[:1], mask[:1])["params"]
    state, rng, order = optimizer.init(params), np.random.default_rng(0), np.zeros(0, int)
    for i in range(steps):
        if len(order) < batch:
            order = np.concatenate([order, rng.permutation(len(pictures))])
        rows, order = order[:batch], order[batch:]
        params, state, loss = step(params, state, jax.random.key(i + 1), rows)
        if (i + 1) % 100 == 0:
            print(f"step {i + 1} of {steps}: loss {loss:.3f}", flush=True)
    return params


def held_out(captions, share=0.2):
    """bool [N]: one picture of each caption in a random share of the captions that have several."""
    rng, counts = np.random.default_rng(0), np.bincount(captions)
    several = np.flatnonzero(counts > 1)
    taken = np.zeros(len(captions), bool)
    for caption in rng.choice(several, round(share * len(several)), replace=False):
        taken[rng.choice(np.flatnonzero(captions == caption))] = True
    return taken


def read(path, field):
    with np.load(path) as file:
        return file["image"], file[field]


def main(options):
    real, texts = read(options.real, "caption")
    samples, prompts = read(options.samples, "prompt")
    names, captions = np.unique(texts, return_inverse=True)
    unknown = sorted(set(prompts.tolist()) - set(names.tolist()))
    if unknown:
        raise SystemExit(f"prompt {unknown[0]!r} in {options.samples!r} is not a caption in {options.real!r}")
    if samples.shape[1:] != real.shape[1:]:
        raise SystemExit(f"the samples have shape {samples.shape[1:]}, the real pictures {real.shape[1:]}")
    size, channels = real.shape[2:]
    tokenizer = Tokenizer.train(names.tolist(), VOCAB_SIZE, MAX_LENGTH)
    tokens = tokenizer.encode(names.tolist())
    length = int(tokens.mask.sum(1).max())  # most captions are much shorter than MAX_LENGTH
    ids, mask = tokens.ids[:, :length], tokens.mask[:, :length]
    net = SmallCLIP(
        CLIPImageEncoder(size, options.patch, channels, WIDTH, 2, 4, 4 * WIDTH, "gelu", projection=SHARED),
        TextEncoder(tokenizer.vocab_size, length, TEXT_WIDTH, num_layers=1),
    )
    began, unseen = time.perf_counter(), held_out(captions)
    sizes = {"steps": options.steps, "batch": options.batch, "rate": options.rate}
    params = train(net, real[~unseen], captions[~unseen], ids, mask, **sizes)
    seconds = round(time.perf_counter() - began)

    embed = jax.jit(lambda pictures: net.apply({"params": params}, pictures, method="pictures"))
    embedded = np.asarray(net.apply({"params": params}, ids, mask, method="captions")).T
    sets = {
        "samples": (samples, np.searchsorted(names, prompts)),
        "real, trained on": (real[~unseen], captions[~unseen]),
        "real, unseen": (real[unseen], captions[unseen]),
    }
    rows = {}
    for name, (pictures, right) in sets.items():
        parts = np.array_split(pictures, -(-len(pictures) // 512))
        similarities = np.concatenate([embed(part) for part in parts]) @ embedded
        rows[name] = (len(pictures), *(retrieval(similarities, right, within) for within in (1, 5)))
    rows["chance"] = (0, 1 / len(names), min(5 / len(names), 1.0))

    print(f"{len(names)} captions; trained in {seconds} s")
    print(f"{'':16}  {'pictures':>8}  {'first':>6}  {'first five':>10}")
    for name, (count, first, five) in rows.items():
        print(f"{name:16}  {count or '':>8}  {first:6.1%}  {five:10.1%}")
    shares = {
        name: {"pictures": count, "first": first, "first_five": five} for name, (count, first, five) in rows.items()
    }
    print_json("captions_agreement", captions=len(names), seconds=seconds, **sizes, shares=shares)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("real", help=".npz of the real pictures, with `image` and `caption`")
    parser.add_argument("samples", help=".npz written by --mode=sample --output=npz, with `image` and `prompt`")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3, help="of learning")
    parser.add_argument("--patch", type=int, default=8, help="height and width of a patch of the image encoder")
    main(parser.parse_args())
