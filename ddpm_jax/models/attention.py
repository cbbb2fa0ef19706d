"""Attention that avoids storing the whole matrix of logits if it is large."""

import jax
import jax.numpy as jnp
from jax import lax

# The most bytes of one example's float32 logits, over all heads, that are stored at a time. On a CPU with two cores,
# Stable Diffusion's largest attention at 512x512 took a third of the time that it takes with the whole matrix; chunks
# twice as large were slower, chunks half as large were not faster.
LARGEST_LOGITS = 16 * 2**20

_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # the logit of masked keys


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

    If an example's logits need more than LARGEST_LOGITS bytes, they are computed for a chunk of the queries at a time,
    and again for the gradient, so that neither pass stores the whole matrix. The chunk size depends only on the shape
    of one example, so the number of images in a batch does not change an image. Logits and softmax are in float32.

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
    _, length, heads, _ = query.shape
    row = 4 * heads * key.shape[1]  # bytes of one query's logits
    if length * row > LARGEST_LOGITS:
        return _in_chunks(query, key, value, mask, causal, bias, scale, max(LARGEST_LOGITS // row, 1))
    mask = None if mask is None else mask[:, None, None, :]
    bias = None if bias is None else bias[None]
    return jax.nn.dot_product_attention(query, key, value, bias, mask, scale=scale, is_causal=causal)


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
