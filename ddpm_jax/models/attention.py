"""Attention that avoids storing the whole matrix of logits if it is large.

It is computed in one of four ways, chosen by shape, dtype and device (`way`), with the same result up to rounding;
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

LARGEST_LOGITS = 16 * 2**20  # bytes of one example's float32 logits, over all heads, that are stored at a time

# On CPUs, larger matrices are computed for one head and so many queries at a time. With half as many queries, Stable
# Diffusion's largest attention at 512x512 takes longer; with twice as many, as long.
_LARGEST_ON_CPU, _QUERIES_ON_CPU = 2**17, 256

_WIDEST_HEAD = 128  # that cuDNN's kernel takes on every GPU it supports

_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # the logit of masked keys

_Softmax = tuple[jax.Array, jax.Array]  # of each query the largest logit, and log(the sum of exp(logit - largest))


@dataclasses.dataclass(frozen=True)
class Way:
    """How an attention is computed.

    Attributes:
      name: "cudnn", "heads" (one after the other), "chunks" (of the queries) or "whole" (matrix of logits).
      reason: why.
    """

    name: str
    reason: str


_seen: ContextVar[dict[str, None] | None] = ContextVar("_seen", default=None)
_device: ContextVar[Any] = ContextVar("_device", default=None)


@contextlib.contextmanager
def observed(device: Any) -> Iterator[dict[str, None]]:
    """Within, attention is traced for this device, which this machine need not have.

    Yields a dict whose keys are sentences, one about each kind of attention that is traced.
    """
    seen: dict[str, None] = {}
    tokens = _seen.set(seen), _device.set(device)
    try:
        yield seen
    finally:
        _seen.reset(tokens[0])
        _device.reset(tokens[1])


def way(query: Any, key: Any, device: Any, has_mask: bool = False, has_bias: bool = False) -> Way:
    """The way of an attention.

    On TPUs XLA keeps the chunks' logits in on-chip memory. Compiled for a v5e, Stable Diffusion's largest attention
    only reads the queries, keys and values from HBM and writes the result, so a custom kernel would save no traffic
    (docs/tpu.md).

    Args:
      query: of [B, L, heads, width] and a dtype.
      key: of [B, M, heads, width].
      device: the one that computes it.
      has_mask: whether keys are masked.
      has_bias: whether a bias is added to the logits.
    """
    length, heads, width = query.shape[1:]
    size = 4 * heads * length * key.shape[1]
    plain = Way("whole", f"an example's logits take {_mebibytes(size)}")
    if device.platform == "cpu" and size > _LARGEST_ON_CPU and not has_bias:
        exceeded = f"an example's logits, {_mebibytes(size)}, exceed {_mebibytes(_LARGEST_ON_CPU)}"
        return Way("heads", f"{exceeded}, and a CPU's cache holds those of one head and {_QUERIES_ON_CPU} queries")
    if size > LARGEST_LOGITS:
        plain = Way("chunks", f"an example's logits, {_mebibytes(size)}, exceed {_mebibytes(LARGEST_LOGITS)}")
    if device.platform != "gpu":
        return plain
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        obstacle = f"not in {query.dtype}"
    elif width % 8 or width > _WIDEST_HEAD:
        obstacle = f"not for heads of width {width}: only multiples of 8 up to {_WIDEST_HEAD}"
    elif (has_mask or has_bias) and (length % 2 or key.shape[1] % 2):
        obstacle = "not with a mask or bias and an odd number of queries or keys"
    elif float(device.compute_capability) < 8:
        obstacle = f"not on GPUs of compute capability {device.compute_capability}"
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
    much memory, they are computed for a part of the queries at a time, on CPUs also for one head at a time, and again
    for the gradient, so that neither pass stores the whole matrix. The parts depend only on the shape of one example,
    so the number of images in a batch does not change an image. Logits and softmax are in float32.

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
    device = _device.get() or jax.local_devices()[0]
    chosen = way(query, key, device, mask is not None, bias is not None)
    seen = _seen.get()
    if seen is not None:
        length, heads, width = query.shape[1:]
        seen[f"{length} queries, {key.shape[1]} keys, {heads} x {width} channels: {chosen.name}, {chosen.reason}"] = (
            None
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if chosen.name == "heads":
        return _by_heads(query, key, value, mask, causal, scale)

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

    row = 4 * query.shape[2] * key.shape[1]  # bytes of one query's logits

    def plain(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        if query.shape[1] * row > LARGEST_LOGITS:
            return _in_chunks(query, key, value, mask, causal, bias, scale, max(LARGEST_LOGITS // row, 1))
        return whole(query, key, value)

    if chosen.name != "cudnn":
        return plain(query, key, value)
    attended: jax.Array = lax.platform_dependent(
        query, key, value, cuda=partial(whole, implementation="cudnn"), default=plain
    )
    return attended


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _by_heads(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, causal: bool, scale: float
) -> jax.Array:
    """The same for one head and some of the queries at a time, so that a CPU's cache holds the logits.

    The gradient is computed from the logits again (Dao et al. 2022, algorithm 4). The batch is not split, so that it
    can be sharded. Like all functions with a custom gradient, this one supports reverse-mode differentiation only.
    """
    return _by_heads_forward(query, key, value, mask, causal, scale)[0]


def _by_heads_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, causal: bool, scale: float
) -> tuple[jax.Array, tuple[Any, ...]]:
    def attend_head(head: tuple[jax.Array, ...]) -> tuple[jax.Array, _Softmax]:
        query, key, value = head

        def attend_some(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, _Softmax]:
            places, query = part
            logits = _head_logits(places, query, key, mask, causal)
            largest = logits.max(axis=-1, keepdims=True)
            weights = jnp.exp(logits - largest)
            total = weights.sum(axis=-1, keepdims=True)
            return jnp.einsum("bqk,bkd->bqd", weights, value) / total, (largest, jnp.log(total))

        places, parts = _split(query)
        attended, softmax = lax.map(attend_some, (places, parts))
        return _joined(attended, query.shape[1]), softmax

    attended, softmax = lax.map(attend_head, (scale * _heads(query), _heads(key), _heads(value)))
    attended = _unheads(attended).astype(value.dtype)
    return attended, (query, key, value, mask, attended, softmax)


def _by_heads_backward(causal: bool, scale: float, kept: tuple[Any, ...], g: jax.Array) -> tuple[jax.Array | None, ...]:
    query, key, value, mask, attended, softmax = kept
    g = g.astype(jnp.float32)
    product = jnp.sum(g * attended, axis=-1, keepdims=True)

    def attend_head(head: tuple[Any, ...]) -> tuple[jax.Array, ...]:
        query, key, value, g, product, softmax = head

        def attend_some(sums: tuple[jax.Array, ...], part: tuple[Any, ...]) -> tuple[Any, jax.Array]:
            places, query, g, product, (largest, log_total) = part
            # With the division in the exponent, XLA's CPU backend writes the weights once, not twice.
            weights = jnp.exp(_head_logits(places, query, key, mask, causal) - largest - log_total)
            of_logits = weights * (jnp.einsum("bqd,bkd->bqk", g, value) - product)
            if mask is not None:
                of_logits = jnp.where(mask[:, None, :], of_logits, 0.0)
            # Summed over queries with the keys last: the other way round, XLA's CPU backend takes twice as long.
            of_key, of_value = (
                total + jnp.einsum("bqd,bqk->bdk", *pair)
                for total, pair in zip(sums, ((query, of_logits), (g, weights)), strict=True)
            )
            return (of_key, of_value), jnp.einsum("bqk,bkd->bqd", of_logits, key)

        places, queries = _split(query)
        parts = (places, queries, *(_split(x)[1] for x in (g, product)), softmax)
        zero = jnp.zeros_like(key.swapaxes(1, 2)), jnp.zeros_like(value.swapaxes(1, 2))
        (of_key, of_value), of_query = lax.scan(attend_some, zero, parts)
        return _joined(of_query, query.shape[1]), of_key.swapaxes(1, 2), of_value.swapaxes(1, 2)

    heads = (scale * _heads(query), *map(_heads, (key, value, g, product)), softmax)
    of_query, of_key, of_value = map(_unheads, lax.map(attend_head, heads))
    found = zip((scale * of_query, of_key, of_value), (query, key, value), strict=True)
    return *(gradient.astype(x.dtype) for gradient, x in found), None


_by_heads.defvjp(_by_heads_forward, _by_heads_backward)


def _heads(x: jax.Array) -> jax.Array:
    """[B, L, heads, width] as float32 [heads, B, L, width]."""
    return x.astype(jnp.float32).transpose(2, 0, 1, 3)


def _unheads(x: jax.Array) -> jax.Array:
    return x.transpose(1, 2, 0, 3)


def _split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The places [count, size] of the rows of x [B, L, width], and the rows [count, B, size, width], padded."""
    batch, length, width = x.shape
    count = -(-length // _QUERIES_ON_CPU)
    size = -(-length // count)
    x = jnp.pad(x, ((0, 0), (0, count * size - length), (0, 0)))
    return jnp.arange(count * size).reshape(count, size), x.reshape(batch, count, size, width).swapaxes(0, 1)


def _joined(parts: jax.Array, length: int) -> jax.Array:
    count, batch, size, width = parts.shape
    return parts.swapaxes(0, 1).reshape(batch, count * size, width)[:, :length]


def _head_logits(
    places: jax.Array, query: jax.Array, key: jax.Array, mask: jax.Array | None, causal: bool
) -> jax.Array:
    logits = jnp.einsum("bqd,bkd->bqk", query, key)
    if mask is not None:
        logits = jnp.where(mask[:, None, :], logits, _MASKED)
    if causal:
        logits = jnp.where(places[:, None] >= jnp.arange(key.shape[1]), logits, _MASKED)
    return logits


def _in_chunks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    causal: bool,
    bias: jax.Array | None,
    scale: float,
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
