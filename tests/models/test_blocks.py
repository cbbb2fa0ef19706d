from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.models import blocks


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def randomised(module, *arguments, seed=0):
    """Parameters with no (almost) zero layer, scaled to keep activations near 1; also as float64."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *arguments)
    rng = np.random.default_rng(seed)

    def draw(leaf):
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 4
        return jnp.asarray(rng.standard_normal(leaf.shape) / np.sqrt(fan_in), jnp.float32)

    variables = jax.tree.map(draw, shapes)
    return variables, jax.tree.map(lambda v: np.asarray(v, np.float64), variables["params"])


@partial(jax.jit, static_argnums=0)
def apply(module, variables, *arguments, **rngs):
    return module.apply(variables, *arguments, rngs=rngs or None)


def swish(x):
    return x / (1 + np.exp(-x))


def group_norm(p, x, groups, epsilon=1e-6):
    grouped = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    centred = grouped - grouped.mean((1, 3), keepdims=True)
    return (centred / np.sqrt((centred**2).mean((1, 3), keepdims=True) + epsilon)).reshape(x.shape) * p["scale"] + p[
        "bias"
    ]


def conv(p, x, padding=((1, 1), (1, 1)), stride=1):
    kernel = p["kernel"]
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = x.shape[1] - kernel.shape[0] + 1, x.shape[2] - kernel.shape[1] + 1
    taps = (x[:, i : i + height, j : j + width] @ kernel[i, j] for i, j in np.ndindex(kernel.shape[:2]))
    return sum(taps)[:, ::stride, ::stride] + p["bias"]


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


# The time embedding.


@pytest.mark.parametrize("dim", [1, 2, 3, 8, 33, 128])
def test_timestep_embedding(measure, dim):
    """Sines of t / 10000^(i / (half - 1)), then the cosines, then a zero if the width is odd."""
    t = np.array([0, 1, 17, 500, 999])
    half = dim // 2
    angles = t[:, None] * 10_000.0 ** (-np.arange(half) / max(half - 1, 1))
    expected = np.concatenate([np.sin(angles), np.cos(angles), np.zeros((5, dim % 2))], axis=1)
    got = blocks.timestep_embedding(jnp.asarray(t), dim)
    assert got.shape == (5, dim)
    assert got.dtype == jnp.float32
    what, against = "time embedding", "sines and cosines, float64"
    measure(f"{what}, t to 17", against, np.abs(got[:3] - expected[:3]).max(), 6e-6)
    # float32's frequency is 1e-7 off, times t
    measure(f"{what}, t to 999", against, np.abs(got - expected).max(), 3e-4)


def test_timestep_embedding_of_fractions_and_another_period():
    t = np.array([0.25, 3.5])
    angles = t[:, None] * 100.0 ** (-np.arange(4) / 3)
    got = blocks.timestep_embedding(jnp.asarray(t), 8, max_period=100.0)
    np.testing.assert_allclose(got, np.concatenate([np.sin(angles), np.cos(angles)], axis=1), atol=2e-6)


def test_timestep_embedding_of_stable_diffusion():
    """Cosines first, and frequencies that stop short of 1 / 10000."""
    t = np.array([1.0, 17.0])
    angles = t[:, None] * 10_000.0 ** (-np.arange(4) / 4)
    got = blocks.timestep_embedding(jnp.asarray(t), 9, frequency_shift=0.0, cosines_first=True)
    expected = np.concatenate([np.cos(angles), np.sin(angles), np.zeros((2, 1))], axis=1)
    np.testing.assert_allclose(got, expected, atol=6e-6)


# Initialisation.


def kernels(module, *arguments):
    params = jax.jit(module.init)(jax.random.key(0, impl="rbg"), *arguments)["params"]
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    return {"/".join(k.key for k in path): np.asarray(v, np.float64) for path, v in flat}


IMAGE, EMBEDDING = (2, 8, 8, 64), (2, 256)


@pytest.mark.parametrize(
    ("module", "arguments", "small"),
    [
        (blocks.Conv(96), (IMAGE,), ()),
        (blocks.Dense(96), (IMAGE,), ()),
        (blocks.Downsample(), (IMAGE,), ()),
        (blocks.Upsample(), (IMAGE,), ()),
        (blocks.Upsample("transposed"), (IMAGE,), ()),
        (blocks.ResBlock(96), (IMAGE, EMBEDDING), ("conv_1/kernel",)),
        (blocks.AttentionBlock(), (IMAGE, (2, 5, 48)), ("out/kernel", "cross_out/kernel")),
    ],
)
def test_kernels_are_uniform_with_the_variance_of_fan_avg(measure, module, arguments, small):
    """std sqrt(2 / (fan_in + fan_out)), bounds sqrt(3) times that; 1e-5 of it for a branch's last layer."""
    found = kernels(module, *(jnp.zeros(shape) for shape in arguments))
    for name, value in found.items():
        if not name.endswith("kernel"):
            np.testing.assert_array_equal(value, 1.0 if name.endswith("scale") else 0.0)
            continue
        taps = np.prod(value.shape[:-2])
        std = np.sqrt(2 / (taps * (value.shape[-2] + value.shape[-1]))) * (1e-5 if name in small else 1)
        bound = np.sqrt(3) * std
        assert np.abs(value).max() <= bound * (1 + 1e-6)
        assert np.abs(value).max() > bound * (1 - 20 / value.size)
        # The square of a uniform number has the relative standard deviation sqrt(4 / 5).
        what, against = f"initial kernels of `{type(module).__name__}`", "uniform, variance 2 / (fan_in + fan_out)"
        errors = (
            abs(value.var() / std**2 - 1) / np.sqrt(0.8 / value.size),
            abs(value.mean()) / std * np.sqrt(value.size),
        )
        measure(f"{what}: variance", against, errors[0], 5, "standard errors")
        measure(f"{what}: mean", against, errors[1], 5, "standard errors")
    assert set(small) <= set(found)


# Blocks against float64 NumPy.


def test_conv():
    module, x = blocks.Conv(5), normal(0, 2, 6, 5, 3)
    variables, p = randomised(module, x)
    np.testing.assert_allclose(apply(module, variables, x), conv(p, np.asarray(x, np.float64)), atol=3e-6)


def test_dense():
    module, x = blocks.Dense(5), normal(0, 2, 6, 5, 3)
    variables, p = randomised(module, x)
    np.testing.assert_allclose(apply(module, variables, x), dense(p, np.asarray(x, np.float64)), atol=3e-6)


@pytest.mark.parametrize("features", [8, 12])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_res_block(features, scale_shift):
    module = blocks.ResBlock(features, scale_shift=scale_shift, num_groups=4)
    x, embedding = normal(0, 2, 6, 4, 8), normal(1, 2, 10)
    variables, p = randomised(module, x, embedding)
    x64 = np.asarray(x, np.float64)
    h = conv(p["conv_0"], swish(group_norm(p["norm_0"], x64, 4)))
    modulation = dense(p["embedding"], np.asarray(embedding, np.float64))[:, None, None]
    if scale_shift:
        scale, shift = np.split(modulation, 2, axis=-1)
        h = group_norm(p["norm_1"], h, 4) * (1 + scale) + shift
    else:
        h = group_norm(p["norm_1"], h + modulation, 4)
    h = conv(p["conv_1"], swish(h))
    shortcut = dense(p["shortcut"], x64) if features != 8 else x64
    assert ("shortcut" in p) == (features != 8)
    np.testing.assert_allclose(apply(module, variables, x, embedding), shortcut + h, atol=5e-6)


def test_res_block_whose_sum_is_divided():
    x = normal(0, 2, 6, 4, 8)
    module, divided = (blocks.ResBlock(8, num_groups=4, residual_scale=scale) for scale in (1.0, 2.0))
    variables, _ = randomised(module, x)
    np.testing.assert_allclose(apply(divided, variables, x), apply(module, variables, x) / 2, rtol=1e-6)


def test_res_block_without_an_embedding():
    module, x = blocks.ResBlock(12, num_groups=4), normal(0, 2, 6, 4, 8)
    variables, p = randomised(module, x)
    assert sorted(p) == ["conv_0", "conv_1", "norm_0", "norm_1", "shortcut"]
    x64 = np.asarray(x, np.float64)
    h = conv(p["conv_0"], swish(group_norm(p["norm_0"], x64, 4)))
    h = conv(p["conv_1"], swish(group_norm(p["norm_1"], h, 4)))
    np.testing.assert_allclose(apply(module, variables, x), dense(p["shortcut"], x64) + h, atol=5e-6)


@pytest.mark.parametrize(("resample", "activation"), [("down", "relu"), ("up", "mish")])
def test_res_block_that_changes_the_size(resample, activation):
    """Both branches do, before the first convolution."""
    functions = {"relu": lambda x: np.maximum(x, 0), "mish": lambda x: x * np.tanh(np.log1p(np.exp(x)))}
    module = blocks.ResBlock(8, activation=activation, resample=resample, num_groups=4)
    x, embedding = normal(0, 2, 6, 4, 8), normal(1, 2, 10)
    variables, p = randomised(module, x, embedding)
    x64, f = np.asarray(x, np.float64), functions[activation]

    def resized(v):
        if resample == "up":
            return v.repeat(2, axis=1).repeat(2, axis=2)
        return v.reshape(2, 3, 2, 2, 2, 8).mean((2, 4))

    h = conv(p["conv_0"], resized(f(group_norm(p["norm_0"], x64, 4))))
    h = group_norm(p["norm_1"], h + dense(p["embedding"], np.asarray(embedding, np.float64))[:, None, None], 4)
    expected = resized(x64) + conv(p["conv_1"], f(h))
    np.testing.assert_allclose(apply(module, variables, x, embedding), expected, atol=5e-6)


def attention(p, prefix, tokens, context, heads):
    """Softmax(q k^T / sqrt(C / heads)) v, head by head."""
    query = dense(p[prefix + "query"], tokens)
    key, value = (dense(p[prefix + name], context) for name in ("key", "value"))
    results = []
    for q, k, v in zip(*(np.split(a, heads, axis=-1) for a in (query, key, value)), strict=True):
        logits = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        results.append(weights / weights.sum(-1, keepdims=True) @ v)
    return dense(p[prefix + "out"], np.concatenate(results, axis=-1))


def patches(x, p):
    """[B, N, p * p * C]: patches row by row, and within a patch pixels row by row."""
    batch, height, width, _ = x.shape
    tokens = [x[:, i : i + p, j : j + p].reshape(batch, -1) for i in range(0, height, p) for j in range(0, width, p)]
    return np.stack(tokens, axis=1)


def from_patches(tokens, shape, p):
    x, places = np.zeros(shape), [(i, j) for i in range(0, shape[1], p) for j in range(0, shape[2], p)]
    for n, (i, j) in enumerate(places):
        x[:, i : i + p, j : j + p] = tokens[:, n].reshape(shape[0], p, p, shape[3])
    return x


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize(("heads", "context"), [(1, None), (4, None), (2, (2, 3, 5))])
def test_attention_block(heads, context, patch_size):
    """A patch size of 1 is attention among pixels."""
    module = blocks.AttentionBlock(num_heads=heads, patch_size=patch_size, num_groups=4)
    x = normal(0, 2, 4, 6, 8)
    arguments = (x,) if context is None else (x, normal(1, *context))
    variables, p = randomised(module, *arguments)
    h = np.asarray(x, np.float64)
    tokens = patches(group_norm(p["norm"], h, 4), patch_size)
    h = h + from_patches(attention(p, "", tokens, tokens, heads), h.shape, patch_size)
    if context is not None:
        tokens = patches(group_norm(p["cross_norm"], h, 4), patch_size)
        across = attention(p, "cross_", tokens, np.asarray(arguments[1], np.float64), heads)
        h = h + from_patches(across, h.shape, patch_size)
    np.testing.assert_allclose(apply(module, variables, *arguments), h, atol=6e-6)


@pytest.mark.parametrize("cross_attention", ["joint", "alone"])
def test_attention_to_the_context_in_one_softmax(cross_attention):
    """With a norm of the context over its tokens, and a mask over these that does not affect the pixels."""
    options = {"cross_attention": cross_attention, "context_groups": 2, "num_groups": 4}
    module, x, context = blocks.AttentionBlock(2, **options), normal(0, 2, 2, 3, 8), normal(1, 2, 5, 6)
    variables, p = randomised(module, x, context)
    assert ("key" in p) == (cross_attention == "joint")
    x64 = np.asarray(x, np.float64)
    tokens = group_norm(p["norm"], x64, 4).reshape(2, 6, 8)
    seen = group_norm(p["context_norm"], np.asarray(context, np.float64)[:, None], 2, 1e-5)[:, 0]
    mask = np.array([[True, True, False, False, False], [True, False, True, True, True]])

    def expected(example, kept):
        def heads(name, source):
            return dense(p[name], source).reshape(len(source), 2, 4)

        keys, values = heads("cross_key", seen[example][kept]), heads("cross_value", seen[example][kept])
        if cross_attention == "joint":
            keys = np.concatenate([keys, heads("key", tokens[example])])
            values = np.concatenate([values, heads("value", tokens[example])])
        logits = np.einsum("qhc,khc->hqk", heads("query", tokens[example]), keys) / 2
        weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        return dense(p["out"], np.einsum("hqk,khc->qhc", weights, values).reshape(6, 8)).reshape(2, 3, 8)

    for given in (mask, None):
        found = apply(module, variables, x, context, given)
        kept = np.ones_like(mask) if given is None else mask
        wanted = x64 + np.stack([expected(example, kept[example]) for example in range(2)])
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_attention_with_heads_of_a_width_and_without_a_norm():
    """Two heads of 3 channels fit into 8; they are projected back from 6."""
    module, x = blocks.AttentionBlock(head_channels=3, num_groups=0), normal(0, 2, 2, 3, 8)
    variables, p = randomised(module, x)
    assert sorted(p) == ["key", "out", "query", "value"]
    assert p["query"]["kernel"].shape == (8, 6)
    tokens = np.asarray(x, np.float64).reshape(2, 6, 8)
    expected = tokens + attention(p, "", tokens, tokens, 2)
    np.testing.assert_allclose(apply(module, variables, x), expected.reshape(x.shape), atol=6e-6)


def test_group_norm_scale_shift():
    module, x, modulation = blocks.GroupNorm(2), normal(0, 3, 4, 4, 6), normal(1, 3, 12)
    variables, p = randomised(module, x)
    plain = group_norm(p, np.asarray(x, np.float64), 2)
    scale, shift = np.split(np.asarray(modulation, np.float64)[:, None, None], 2, axis=-1)
    np.testing.assert_allclose(apply(module, variables, x), plain, atol=3e-6)
    np.testing.assert_allclose(apply(module, variables, x, modulation), plain * (1 + scale) + shift, atol=5e-6)


@pytest.mark.parametrize("method", ["conv", "avg_pool", "max_pool"])
def test_downsample(method):
    """The convolution pads at the right and the bottom only."""
    module, x = blocks.Downsample(method), normal(0, 2, 6, 4, 3)
    variables, x64 = {}, np.asarray(x, np.float64)
    if method == "conv":
        variables, p = randomised(module, x)
        expected = conv(p["conv"], x64, ((0, 1), (0, 1)), stride=2)
    else:
        squares = x64.reshape(2, 3, 2, 2, 2, 3)
        expected = squares.mean((2, 4)) if method == "avg_pool" else squares.max((2, 4))
    np.testing.assert_allclose(apply(module, variables, x), expected, atol=3e-6)


def test_downsample_with_symmetric_padding():
    module, x = blocks.Downsample("conv", symmetric=True), normal(0, 2, 6, 4, 3)
    variables, p = randomised(module, x)
    expected = conv(p["conv"], np.asarray(x, np.float64), stride=2)
    np.testing.assert_allclose(apply(module, variables, x), expected, atol=3e-6)


@pytest.mark.parametrize("method", ["nearest", "transposed"])
def test_upsample(method):
    module, x = blocks.Upsample(method), normal(0, 2, 3, 4, 3)
    variables, p = randomised(module, x)
    x64 = np.asarray(x, np.float64)
    if method == "nearest":
        expected = conv(p, x64.repeat(2, axis=1).repeat(2, axis=2))
    else:
        spread = np.zeros((2, 5, 7, 3))
        spread[:, ::2, ::2] = x64
        expected = conv(p, spread, ((2, 2), (2, 2)))
    assert p["kernel"].shape[:2] == ((3, 3) if method == "nearest" else (4, 4))
    np.testing.assert_allclose(apply(module, variables, x), expected, atol=5e-6)


# Training, precision, mistakes.


def test_res_block_drops_out_before_the_second_convolution_only_in_training():
    """The last convolution is linear, so that dropout in front of it keeps the mean."""
    x, embedding = normal(0, 64, 8, 8, 8), normal(1, 64, 10)
    make = lambda **options: blocks.ResBlock(8, num_groups=4, **options)  # noqa: E731
    variables, _ = randomised(make(), x, embedding)
    plain = apply(make(), variables, x, embedding)
    np.testing.assert_array_equal(apply(make(dropout=0.3), variables, x, embedding), plain)
    np.testing.assert_array_equal(apply(make(dropout=0.0, train=True), variables, x, embedding), plain)
    dropped = jnp.stack(
        [
            apply(make(dropout=0.3, train=True), variables, x, embedding, dropout=jax.random.key(i, impl="rbg"))
            for i in range(20)
        ]
    )
    assert np.std(dropped, axis=0).min() > 0.01
    error = np.std(dropped, axis=0) / np.sqrt(20)
    z = (dropped.mean(0) - plain) / error
    assert abs(np.mean(z)) < 0.05
    assert 0.9 < np.std(z) < 1.3


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (blocks.ResBlock(12, num_groups=4), ((2, 8, 8, 8), (2, 10))),
        (blocks.AttentionBlock(2, num_groups=4), ((2, 8, 8, 8),)),
    ],
)
def test_bfloat16_is_close_to_float32(module, arguments):
    arguments = [normal(i, *shape) for i, shape in enumerate(arguments)]
    variables, _ = randomised(module, *arguments)
    low = module.clone(dtype=jnp.bfloat16)
    got = apply(low, variables, *(a.astype(jnp.bfloat16) for a in arguments))
    assert got.dtype == jnp.bfloat16
    expected = apply(module, variables, *arguments)
    assert np.max(np.abs(got.astype(jnp.float32) - expected)) < 0.03 * np.max(np.abs(expected))
    types = jax.tree.map(lambda v: v.dtype, jax.eval_shape(low.init, jax.random.key(0), *arguments))
    assert set(jax.tree.leaves(types)) == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (blocks.GroupNorm(3), "8 channels cannot be normalised in 3 groups"),
        (blocks.AttentionBlock(num_groups=4, patch_size=4), "attention_patch_size 4 does not divide a 4x6 level"),
        (blocks.AttentionBlock(num_groups=4, num_heads=3), "num_heads 3 does not divide the 8 channels"),
    ],
)
def test_refused_sizes(module, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 4, 6, 8)))
