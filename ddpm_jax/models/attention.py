"""Attention that avoids storing the whole matrix of logits if it is large.

It is computed in one of three ways, chosen by shape, dtype and device (`way`), with the same result up to rounding;
`--mode=plan` prints which one, and why.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

# The most bytes of one example's float32 logits, over all heads, that are stored at a time. On a CPU with two cores,
# Stable Diffusion's largest attention at 512x512 took a third of the time that it takes with the whole matrix; chunks
# twice as large were slower, chunks half as large were not faster.
LARGEST_LOGITS = 16 * 2**20

_WIDEST_HEAD = 128  # that cuDNN's kernel takes on every GPU it supports

_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # the logit of masked keys


@dataclasses.dataclass(frozen=True)
class Way:
    """How an attention is computed.

    Attributes:
      name: "cudnn", "chunks" (of the queries) or "whole" (matrix of logits).
      reason: why.
    """

    name: str
    reason: str


_seen: ContextVar[dict[str, None] | None] = ContextVar("_seen", default=None)


@contextlib.contextmanager
def observed() -> Iterator[dict[str, None]]:
    """Collects, as its keys, a sentence about each kind of attention that is traced within."""
    seen: dict[str, None] = {}
    token = _seen.set(seen)
    try:
        yield seen
    finally:
        _seen.reset(token)


def way(query: Any, key: Any, has_bias: bool = False, gpu: Any = None) -> Way:
    """The way of an attention.

    On TPUs XLA keeps the chunks' logits in on-chip memory. Compiled for a v5e, Stable Diffusion's largest attention
    only reads the queries, keys and values from HBM and writes the result, so a custom kernel would save no traffic
    (docs/tpu.md).

    Args:
      query: of [B, L, heads, width] and a dtype.
      key: of [B, M, heads, width].
      has_bias: whether a bias or a mask is added to the logits.
      gpu: the device if it is a GPU, else None.
    """
    length, heads, width = query.shape[1:]
    size = 4 * heads * length * key.shape[1]
    plain = Way("whole", f"an example's logits take {_mebibytes(size)}")
    if size > LARGEST_LOGITS:
        plain = Way("chunks", f"an example's logits, {_mebibytes(size)}, exceed {_mebibytes(LARGEST_LOGITS)}")
    if gpu is None:
        return plain
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        obstacle = f"not in {query.dtype}"
    elif width % 8 or width > _WIDEST_HEAD:
        obstacle = f"not for heads of width {width}: only multiples of 8 up to {_WIDEST_HEAD}"
    elif has_bias and (length % 2 or key.shape[1] % 2):
        obstacle = "not with a mask or bias and an odd number of queries or keys"
    elif float(gpu.compute_capability) < 8:
        obstacle = f"not on GPUs of compute capability {gpu.compute_capability}"
    else:
        return Way("cudnn", "cuDNN's fused kernel stores no logits")
    return dataclasses.replace(plain, reason=f"{plain.reason}; cuDNN's fused kernel does {obstacle}")


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:.3g} MiB"


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    causal: bool = False,
    bias: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(width of a head)) v, for each head.

    On a GPU it is cuDNN's fused kernel where that supports the shape and dtype. Otherwise, if an example's logits need
    more than LARGEST_LOGITS bytes, they are computed for a chunk of the queries at a time, and again for the gradient,
    so that neither pass stores the whole matrix. The chunk size depends only on the shape of one example, so the number
    of images in a batch does not change an image. Logits and softmax are in float32.

    Args:
      query: [B, L, heads, width].
      key, value: [B, M, heads, width].
      mask: bool [B, M], the keys to attend to, at least one per example; None: all.
      causal: a query attends only to keys at its own position and before.
      bias: [heads, L, M], added to the logits of every example.
      scale: above 0, the factor of q k^T instead of 1 / sqrt(width of a head).

    Returns:
      [B, L, heads, width] in value's dtype.
    """
    gpu = jax.local_devices()[0] if jax.default_backend() == "gpu" else None
    chosen = way(query, key, mask is not None or bias is not None, gpu)
    seen = _seen.get()
    if seen is not None:
        length, heads, width = query.shape[1:]
        seen[f"{length} queries, {key.shape[1]} keys, {heads} x {width} channels: {chosen.name}, {chosen.reason}"] = (
            None
        )

    def whole(
        query: jax.Array, key: jax.Array, value: jax.Array, implementation: Literal["xla", "cudnn"] = "xla"
    ) -> jax.Array:
        options: Any = {"scale": scale, "is_causal": causal, "implementation": implementation}
        if mask is not None:  # cuDNN takes no mask that leaves the queries out
            shape = (len(mask), 1, query.shape[1] if implementation == "cudnn" else 1, mask.shape[1])
            options["mask"] = jnp.broadcast_to(mask[:, None, None, :], shape)
        options["bias"] = None if bias is None else bias[None]
        attended: jax.Array = jax.nn.dot_product_attention(query, key, value, **options)
        return attended

    def plain(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        if way(query, key).name == "chunks":
            row = 4 * query.shape[2] * key.shape[1]  # bytes of one query's logits
            return _in_chunks(query, key, value, mask, causal, bias, scale, max(LARGEST_LOGITS // row, 1))
        return whole(query, key, value)

    if chosen.name != "cudnn":
        return plain(query, key, value)
    attended: jax.Array = lax.platform_dependent(
        query, key, value, cuda=partial(whole, implementation="cudnn"), default=plain
    )
    return attended


def _in_chunks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    causal: bool,
    bias: jax.Array | None,
    scale: float | None,
    size: int,
) -> jax.Array:
    """The same with the logits of at most `size` queries at a time.

    The batch is not split, so that it can be sharded. Heads come before queries, and the division by the sum of the
    weights comes after the product with the values, which is faster on XLA's CPU backend than `jax.nn`'s form.
    """
    batch, length, heads, width = query.shape
    count = -(-length // size)
    size = -(-length // count)
    query = jnp.pad(query, ((0, 0), (0, count * size - length), (0, 0), (0, 0)))
    chunks = query.reshape(batch, count, size, heads, width).transpose(1, 0, 3, 2, 4)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    scale = width**-0.5 if scale is None else scale
    if bias is not None:
        bias = jnp.pad(bias, ((0, 0), (0, count * size - length), (0, 0)))
        bias = bias.reshape(heads, count, size, -1).swapaxes(0, 1)

    @jax.checkpoint
    def attend_some(chunk: tuple[jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        places, query, bias = chunk
        logits = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
        if bias is not None:
            logits += bias / scale  # since scale multiplies it below
        if mask is not None:
            logits = jnp.where(mask[:, None, None, :], logits, _MASKED)
        if causal:
            logits = jnp.where(places[:, None] >= jnp.arange(key.shape[2]), logits, _MASKED)
        weights = jnp.exp(scale * (logits - lax.stop_gradient(logits.max(axis=-1, keepdims=True))))
        total = weights.sum(axis=-1, keepdims=True)
        attended = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return (attended / total).astype(value.dtype)

    places = jnp.arange(count * size).reshape(count, size)
    attended: jax.Array = lax.map(attend_some, (places, chunks, bias))  # [count, B, heads, size, width]
    return attended.transpose(1, 0, 3, 2, 4).reshape(batch, count * size, heads, width)[:, :length]
