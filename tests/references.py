"""Reference formulas in float64, used by tests of several modules."""

from math import erf

import numpy as np


def coefficients(betas, timesteps):
    """For a descending sub-sequence of timesteps, in float64: a, s, x_0's factor, x's factor, posterior variance, beta.

    The sub-sequence is a diffusion of its own, with the betas that give it the same abar (Improved DDPM, section 4).
    """
    abar = np.cumprod(1 - np.asarray(betas, np.float64))[np.asarray(timesteps)]
    previous = np.append(abar[1:], 1.0)
    beta = 1 - abar / previous
    return (
        np.sqrt(abar),
        np.sqrt(1 - abar),
        beta * np.sqrt(previous) / (1 - abar),
        (1 - previous) * np.sqrt(1 - beta) / (1 - abar),
        beta * (1 - previous) / (1 - abar),
        beta,
    )


# The Transformer's.


def dense(p, x):
    return x @ p["kernel"] + p.get("bias", 0)


def layer_norm(p, x, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * p["scale"] + p["bias"]


def attention(p, x, context, heads, allowed):
    """Softmax(q k^T / sqrt(C / heads)) v, head by head; allowed: [B, L, M]."""
    query, key, value = (
        np.split(dense(p[name], source), heads, axis=-1)
        for name, source in (("query", x), ("key", context), ("value", context))
    )
    results = []
    for q, k, v in zip(query, key, value, strict=True):
        weights = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])) * allowed
        results.append(weights / weights.sum(-1, keepdims=True) @ v)
    return dense(p["out"], np.concatenate(results, axis=-1))


ACTIVATIONS = {
    "gelu": lambda x: x * (1 + np.vectorize(erf)(x / np.sqrt(2))) / 2,
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
}


def transformer(p, x, heads, allowed, activation, epsilon):
    """Blocks of norm, attention, residual, norm, MLP, residual; p: of each block by name; allowed: [B, L, L]."""
    for i in range(len(p)):
        block = p[f"block_{i}"]
        h = layer_norm(block["norm_0"], x, epsilon)
        x = x + attention(block["attention"], h, h, heads, allowed)
        h = layer_norm(block["norm_1"], x, epsilon)
        x = x + dense(block["mlp_1"], ACTIVATIONS[activation](dense(block["mlp_0"], h)))
    return x
