from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import t5s
from references import dense

from ddpm_jax.models import attention
from ddpm_jax.models.t5 import T5Encoder, distance_buckets

NARROW = t5s.NET
IDS = np.array([[5, 4, 9, 1, 0, 0, 0], [5, 1, 2, 3, 8, 1, 0]], np.int32)
MASK = np.array([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]], bool)


@partial(jax.jit, static_argnums=0)
def apply(module, params, *arguments):
    return module.apply({"params": params}, *arguments)


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        ({}, 35_332_800),
        ({"width": 4096, "num_layers": 24, "num_heads": 64, "mlp_width": 10_240}, 4_762_310_656),
    ],
)
def test_parameters_of_v1_1(sizes, count):
    shapes = jax.eval_shape(T5Encoder(**sizes).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (16, 64), (12, 100), (4, 9), (32, 200)])
def test_buckets(num_buckets, max_distance):
    """In whole numbers: log(d / m) / log(M / m) (n - m) is at least k if d^(n - m) m^k is at least M^k m^(n - m)."""
    each = num_buckets // 2
    exact = each // 2
    rest = each - exact

    def bucket(distance):
        d = abs(distance)
        steps = range(1, rest)
        far = sum(d**rest * exact**k >= max_distance**k * exact**rest for k in steps)
        return each * (distance > 0) + (d if d < exact else exact + far)

    distances = range(-1000, 1001)
    found = distance_buckets(np.array(distances), num_buckets, max_distance)
    assert found.dtype == np.int32
    assert found.tolist() == [bucket(distance) for distance in distances]


def reference(net, params, ids, mask):
    """The states in float64, row by row and head by head."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(p, x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + net.epsilon) * p["scale"]

    def hidden(block, x):
        h = dense(block["mlp_0"], x)
        h = np.maximum(h, 0) if net.activation == "relu" else gelu_new(h)
        return h * dense(block["mlp_linear"], x) if net.gated else h

    places = np.arange(ids.shape[1])
    bias = p["distances"]["embedding"][distance_buckets(places - places[:, None], net.num_buckets, net.max_distance)]
    rows = []
    for row, allowed in zip(ids, mask, strict=True):
        x = p["tokens"]["embedding"][row]
        for i in range(net.num_layers):
            block = p["transformer"][f"block_{i}"]
            h = norm(block["norm_0"], x)
            heads = []
            for head in range(net.num_heads):
                own = slice(head * net.head_width, (head + 1) * net.head_width)
                q, k, v = (dense(block["attention"][name], h)[:, own] for name in ("query", "key", "value"))
                weights = np.exp(q @ k.T + bias[..., head]) * allowed
                heads.append(weights / weights.sum(-1, keepdims=True) @ v)
            x = x + dense(block["attention"]["out"], np.concatenate(heads, -1))
            x = x + dense(block["mlp_1"], hidden(block, norm(block["norm_1"], x)))
        rows.append(norm(p["final_norm"], x))
    return np.stack(rows)


def gelu_new(x):
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


@pytest.mark.parametrize("options", [{}, {"activation": "relu", "gated": False}, {"activation": "relu"}])
@pytest.mark.parametrize("chunked", [False, True])
def test_states(monkeypatch, options, chunked):
    if chunked:  # the logits of two queries at a time
        monkeypatch.setattr(attention, "LARGEST_LOGITS", 2 * 4 * NARROW.num_heads * IDS.shape[1])
    net = NARROW.clone(**options)
    params = t5s.random_params(net)
    for mask in (MASK, None):
        found = jax.jit(lambda mask=mask: net.apply({"params": params}, IDS, mask))()
        kept = np.ones_like(MASK) if mask is None else mask
        expected = reference(net, params, IDS, kept)
        assert found.tokens.dtype == found.pooled.dtype == jnp.float32
        assert found.projected is None
        np.testing.assert_allclose(found.tokens[kept], expected[kept], atol=2e-5)
        means = [states[row].mean(0) for states, row in zip(expected, kept, strict=True)]
        np.testing.assert_allclose(found.pooled, means, atol=2e-5)


def test_padding_changes_nothing():
    """Neither how much of it there is, nor what its ids are."""
    params = t5s.random_params(NARROW)
    found = apply(NARROW, params, IDS, MASK)
    longer, mask = (np.pad(array, ((0, 0), (0, 30))) for array in (IDS, MASK))
    for ids in (longer, np.where(mask, longer, 7)):
        padded = apply(NARROW, params, ids, mask)
        np.testing.assert_allclose(found.tokens[MASK], padded.tokens[mask], atol=1e-5)
        np.testing.assert_allclose(found.pooled, padded.pooled, atol=1e-5)


def test_half_precision():
    net = NARROW.clone(dtype=jnp.bfloat16)
    params = t5s.random_params(net)
    found, expected = (apply(module, params, IDS, MASK).tokens[MASK] for module in (net, NARROW))
    assert found.dtype == jnp.float32
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 0 < error < 5e-2
