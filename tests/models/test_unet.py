import math
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.models import blocks
from ddpm_jax.models.unet import UNet
from ddpm_jax.planning.flops import matrix_flops

SMALL = {
    "channels": 8,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "num_groups": 4,
}
TINY = {**SMALL, "channel_multipliers": (1,), "attention_resolutions": ()}  # attention in the middle alone
CELEBA = {"channel_multipliers": (1, 1, 2, 2, 4, 4)}
KEY = jax.random.key(0)
FAST = jax.random.key(0, impl="rbg")  # a generator that compiles faster
apply = jax.jit(lambda net, *arguments: net.apply(*arguments), static_argnums=0)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


X, TIMES = normal(0, 3, 8, 8, 3), jnp.array([0, 400, 999])


def init_shapes(net, x=X, cond=None):
    t = jnp.zeros(x.shape[:1], jnp.int32)
    return jax.eval_shape(lambda: net.init(KEY, jnp.zeros(x.shape), t, cond))["params"]


def count(params):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@cache
def parameters_of_the_plain_network():
    return count(init_shapes(UNet(**SMALL)))


def randomised(net, x=X, cond=None, seed=0):
    """Variables with no (almost) zero layer, scaled to keep activations near 1."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        fan_in = math.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 4
        return jnp.asarray(rng.standard_normal(leaf.shape) / math.sqrt(fan_in), jnp.float32)

    return {"params": jax.tree.map(draw, init_shapes(net, x, cond))}


def attention_blocks(params):
    return sorted(name for name in params if name.endswith("_attention"))


@pytest.mark.slow
def test_skip_connections_are_scaled():
    """As if the skip connection of every residual block of the decoder were multiplied on the way."""
    plain, scaled = UNet(**SMALL), UNet(**SMALL, skip_scale=0.3)
    variables = randomised(plain)

    def multiply(call, arguments, options, context):
        if isinstance(context.module, blocks.ResBlock) and len(arguments) == 3 and arguments[2] is not None:
            arguments = (*arguments[:2], 0.3 * arguments[2])
        return call(*arguments, **options)

    with nn.intercept_methods(multiply):
        expected = plain.apply(variables, X, TIMES)
    found = scaled.apply(variables, X, TIMES)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(found - plain.apply(variables, X, TIMES)).max() > 0.1


# Sizes.


@pytest.mark.parametrize(
    ("options", "size", "parameters"),
    [
        ({}, 32, 35_746_307),
        pytest.param(CELEBA, 256, 113_673_219, marks=pytest.mark.slow),
        pytest.param({**CELEBA, "channels": 192}, 256, 255_677_955, marks=pytest.mark.slow),
    ],
)
def test_parameters_of_the_original_networks(measure, options, size, parameters):
    found = count(init_shapes(UNet(**options), np.zeros((1, size, size, 3))))
    measure(f"parameters of the {size}x{size} network", f"the original's {parameters:,}", abs(found - parameters), 0)


def test_attention_of_the_cifar_10_network():
    """At 16x16: two on the way down, three on the way up; and in the middle."""
    names = attention_blocks(init_shapes(UNet(), np.zeros((1, 32, 32, 3))))
    assert names == [
        "down_1_0_attention",
        "down_1_1_attention",
        "middle_0_attention",
        "up_1_0_attention",
        "up_1_1_attention",
        "up_1_2_attention",
    ]


@pytest.mark.parametrize(
    ("options", "shape", "levels"),
    [
        ({"attention_resolutions": (8,)}, (8, 8), {0}),
        ({"attention_resolutions": (4, 8)}, (8, 8), {0, 1}),
        ({"attention_resolutions": ()}, (8, 8), set()),
        ({"attention_resolutions": (8,)}, (8, 16), {1}),
        ({"attention_resolutions": (8,)}, (16, 8), {1}),
        ({"attention_levels": (True, False), "attention_resolutions": (4,)}, (8, 8), {0}),
    ],
)
@pytest.mark.parametrize("middle", [True, False])
def test_where_attention_is(options, shape, levels, middle):
    net = UNet(**{**SMALL, **options, "middle_attention": middle})
    expected = [f"down_{i}_0_attention" for i in levels] + [f"up_{i}_{j}_attention" for i in levels for j in (0, 1)]
    expected += ["middle_0_attention"] * middle
    assert attention_blocks(init_shapes(net, np.zeros((1, *shape, 3)))) == sorted(expected)


@pytest.mark.parametrize(
    ("options", "shape", "cond", "channels", "parameters"),
    [
        ({}, (8, 8, 3), {}, 3, 0),
        ({}, (8, 8, 1), {}, 1, -2 * 9 * 8 - 2 * (9 * 8 + 1)),
        ({}, (4, 16, 3), {}, 3, None),
        ({"upsample": "transposed"}, (8, 8, 3), {}, 3, (16 - 9) * 16 * 16),
        ({"downsample": "avg_pool"}, (8, 8, 3), {}, 3, -(9 * 8 * 8 + 8)),
        ({"downsample": "max_pool"}, (8, 8, 3), {}, 3, -(9 * 8 * 8 + 8)),
        ({"num_heads": 4}, (8, 8, 3), {}, 3, 0),
        # Four attentions of 16 channels, whose every projection's outer side is four times as wide.
        ({"attention_patch_size": 2}, (8, 8, 3), {}, 3, 4 * (4 * 3 * 16 * 16 + 3 * 16)),
        ({"scale_shift": True}, (8, 8, 3), {}, 3, (32 + 1) * (3 * 8 + 5 * 16)),
        ({"learned_variance": True}, (8, 8, 3), {}, 6, 3 * (9 * 8 + 1)),
        ({"out_channels": 5}, (8, 8, 3), {}, 5, 2 * (9 * 8 + 1)),
        ({"out_channels": 5, "learned_variance": True}, (8, 8, 3), {}, 10, 7 * (9 * 8 + 1)),
        ({"num_classes": 10}, (8, 8, 3), {}, 3, 11 * 32),
        ({"num_classes": 10}, (8, 8, 3), {"label": (2,)}, 3, 11 * 32),
        ({"num_classes": 10, "null_class": False}, (8, 8, 3), {"label": (2,)}, 3, 10 * 32),
        ({"time_embedding": "learned", "num_timesteps": 100}, (8, 8, 3), {}, 3, 100 * 8),
        ({"level_channels": (8, 16), "channel_multipliers": (7,)}, (8, 8, 3), {}, 3, 0),
        ({"head_channels": 8}, (8, 8, 3), {}, 3, 0),
        ({"head_channels": 12}, (8, 8, 3), {}, 3, -4 * (3 * (4 * 16 + 4) + 4 * 16)),  # one head of 12 in 16 channels
        ({"middle_attention_groups": 2}, (8, 8, 3), {}, 3, 0),
        ({"middle_attention_groups": 0}, (8, 8, 3), {}, 3, -2 * 16),
        # Two norms, a convolution more, and the time embedding.
        ({"downsample": "residual"}, (8, 8, 3), {}, 3, 2 * 2 * 8 + (9 * 8 + 1) * 8 + 33 * 8),
        ({"upsample_levels": ("residual",)}, (8, 8, 3), {}, 3, 2 * 2 * 16 + (9 * 16 + 1) * 16 + 33 * 16),
        ({}, (8, 8, 3), {"vector": (2, 7)}, 3, (7 + 1) * 32),
        ({}, (8, 8, 3), {"image": (2, 8, 8, 2)}, 3, 2 * 9 * 8),
        # A norm, two projections of the tokens, two of the pixels.
        ({}, (8, 8, 3), {"tokens": (2, 5, 7)}, 3, 4 * (2 * 16 + 2 * (7 + 1) * 16 + 2 * (16 + 1) * 16)),
        ({"dropout": 0.1, "remat": "blocks", "dtype": jnp.bfloat16}, (8, 8, 3), {}, 3, 0),
        ({"channel_multipliers": (1,)}, (7, 9, 3), {}, 3, None),
        ({"channel_multipliers": (1, 2, 3), "num_res_blocks": 2}, (8, 12, 3), {}, 3, None),
    ],
)
def test_shapes_and_parameters_of_options(options, shape, cond, channels, parameters):
    """The last column is the number of additional parameters over the plain network, counted by hand."""
    net = UNet(**{**SMALL, **options})
    cond = {k: jnp.zeros(s, jnp.int32 if k == "label" else jnp.float32) for k, s in cond.items()}
    x, t = jnp.zeros((2, *shape)), jnp.zeros(2, jnp.int32)
    out, variables = jax.eval_shape(lambda: net.init_with_output(KEY, x, t, cond))
    assert out.shape == (2, *shape[:2], channels)
    assert out.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    if parameters is not None:
        assert count(variables) - parameters_of_the_plain_network() == parameters


# Values.


@pytest.mark.slow
def test_wiring():
    """The network from its blocks, which have tests of their own, as drawn: two levels, two blocks each."""
    net = UNet(channels=8, channel_multipliers=(1, 2), attention_resolutions=(4,), num_groups=4, num_heads=2)
    variables = randomised(net)

    def reference(variables, x, t):
        p = variables["params"]
        part = lambda module, name, *arguments: module.apply({"params": p[name]}, *arguments)  # noqa: E731
        linear = lambda name, v: v @ p[name]["kernel"] + p[name]["bias"]  # noqa: E731
        join = lambda *parts: jnp.concatenate(parts, axis=-1)  # noqa: E731
        e = nn.swish(linear("time_1", nn.swish(linear("time_0", blocks.timestep_embedding(t, 8)))))

        def block(name, features, h, attention):
            h = part(blocks.ResBlock(features, num_groups=4), f"{name}_res", h, e)
            return part(blocks.AttentionBlock(2, num_groups=4), f"{name}_attention", h) if attention else h

        a0 = part(blocks.Conv(8), "conv_in", x)
        a1 = block("down_0_0", 8, a0, False)
        a2 = block("down_0_1", 8, a1, False)
        a3 = part(blocks.Downsample(), "down_0_downsample", a2)
        b1 = block("down_1_0", 16, a3, True)
        b2 = block("down_1_1", 16, b1, True)
        h = block("middle_1", 16, block("middle_0", 16, b2, True), False)
        for i, skip in enumerate((b2, b1, a3)):
            h = block(f"up_1_{i}", 16, join(h, skip), True)
        h = part(blocks.Upsample(), "up_1_upsample", h)
        for i, skip in enumerate((a2, a1, a0)):
            h = block(f"up_0_{i}", 8, join(h, skip), False)
        return part(blocks.Conv(3), "conv_out", nn.swish(part(blocks.GroupNorm(4), "norm_out", h)))

    got, expected = apply(net, variables, X, TIMES), jax.jit(reference)(variables, X, TIMES)
    np.testing.assert_allclose(got, expected, atol=5e-6 * float(jnp.abs(expected).max()))
    assert np.abs(expected).max() > 0.1


def test_output_is_zero_at_initialisation():
    net = UNet(**TINY, num_classes=3, learned_variance=True)
    out = jax.jit(lambda: net.init_with_output(FAST, X, TIMES)[0])()
    assert 0 < np.abs(out).max() < 1e-4


def test_every_input_and_condition_counts():
    """x, t, and each entry of cond change the output of every image, and only of the image that they belong to."""
    net = UNet(**TINY, num_classes=4)
    cond = {
        "label": jnp.array([0, 1, 2]),
        "vector": normal(1, 3, 6),
        "image": normal(2, 3, 8, 8, 2),
        "tokens": normal(3, 3, 5, 7),
    }
    variables = randomised(net, cond=cond)
    plain = apply(net, variables, X, TIMES, cond)
    changed = {
        "x": apply(net, variables, X.at[1].multiply(-1), TIMES, cond),
        "t": apply(net, variables, X, TIMES.at[1].set(390), cond),
        "label": apply(net, variables, X, TIMES, {**cond, "label": jnp.array([0, 3, 2])}),
        **{
            k: apply(net, variables, X, TIMES, {**cond, k: cond[k].at[1].multiply(-1)})
            for k in ("vector", "image", "tokens")
        },
    }
    for name, out in changed.items():
        difference = np.abs(out - plain).max((1, 2, 3))
        assert difference[1] > 1e-2, name
        assert difference[[0, 2]].max() < 1e-5, name


def test_no_label_is_the_null_class():
    net = UNet(**TINY, num_classes=4)
    variables = randomised(net)
    null = apply(net, variables, X, TIMES, {"label": jnp.full(3, 4)})
    np.testing.assert_allclose(apply(net, variables, X, TIMES), null, atol=1e-6)
    assert np.abs(apply(net, variables, X, TIMES, {"label": jnp.full(3, 3)}) - null).max() > 1e-2


def test_tokens_of_another_length():
    """And in another order: attention has no positions."""
    net, cond = UNet(**TINY), {"tokens": normal(3, 3, 5, 7)}
    variables = randomised(net, cond=cond)
    reversed_tokens = {"tokens": cond["tokens"][:, ::-1]}
    twice = {"tokens": jnp.concatenate([cond["tokens"]] * 2, axis=1)}
    plain = apply(net, variables, X, TIMES, cond)
    for other in (reversed_tokens, twice):
        np.testing.assert_allclose(apply(net, variables, X, TIMES, other), plain, atol=2e-5)


def test_masked_tokens_are_not_seen():
    """Bit for bit, whatever their values. Unmasked tokens affect their own image, and only that."""
    net, tokens = UNet(**TINY), normal(3, 3, 5, 7)
    mask = jnp.arange(5) < jnp.array([[3], [1], [5]])
    variables = randomised(net, cond={"tokens": tokens})

    def call(tokens):
        return apply(net, variables, X, TIMES, {"tokens": tokens, "tokens_mask": mask})

    found = call(tokens)
    np.testing.assert_array_equal(call(jnp.where(mask[..., None], tokens, 1e3)), found)
    for row, last in enumerate((2, 0, 4)):
        changed = np.abs(call(tokens.at[row, last].add(1.0)) - found).max((1, 2, 3))
        assert np.flatnonzero(changed > 1e-3).tolist() == [row]
    alone = apply(net, variables, X, TIMES, {"tokens": tokens[:, :3]})  # as if there were no others
    np.testing.assert_allclose(alone[0], found[0], atol=2e-5)


def test_without_a_mask_all_tokens_are_seen():
    net, tokens = UNet(**TINY), normal(3, 3, 5, 7)
    cond, everything = {"tokens": tokens}, {"tokens": tokens, "tokens_mask": jnp.ones((3, 5), bool)}
    shapes = init_shapes(net, cond=cond)
    assert shapes == init_shapes(net, cond=everything)
    variables = randomised(net, cond=cond)
    found, expected = (apply(net, variables, X, TIMES, each) for each in (everything, cond))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_bfloat16():
    """Parameters and output stay float32; the result agrees with float32's to within accumulated 8-bit rounding."""
    net, low = UNet(**TINY), UNet(**TINY, dtype=jnp.bfloat16)
    variables = randomised(net)
    expected, got = (apply(n, variables, X, TIMES) for n in (net, low))
    assert got.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(init_shapes(low))} == {jnp.dtype("float32")}
    error = np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))
    assert 1e-4 < error < 0.02


@pytest.mark.slow
def test_remat_has_the_same_gradients_with_dropout():
    """It stores less of the forward pass; "norms" recomputes no convolutions, "blocks" does."""
    variables, x = randomised(UNet(**TINY)), X[:, :4, :4]

    def gradients(remat):
        net = UNet(**TINY, dropout=0.2, remat=remat)
        loss = lambda v: jnp.sum(net.apply(v, x, TIMES, train=True, rngs={"dropout": FAST}) ** 2)  # noqa: E731
        traced = jax.jit(jax.value_and_grad(loss)).trace(variables)
        kept = jax.eval_shape(lambda v: jax.tree.leaves(jax.vjp(loss, v)[1]), variables)
        return traced.lower().compile()(variables), matrix_flops(traced.jaxpr), sum(x.size for x in kept)

    (plain, once, all_kept) = gradients("none")
    # Some gradients, as of a key's bias, are zero but for rounding.
    noise = 1e-7 * max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
    for remat, costs_more in (("norms", False), ("blocks", True)):
        found, flops, kept = gradients(remat)
        assert (flops > once) == costs_more
        assert flops >= once
        assert kept < 0.8 * all_kept
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(a).max()) + noise)


def test_dropout_only_in_training():
    net = UNet(**TINY, dropout=0.3)
    variables = randomised(net)
    train = jax.jit(lambda v, key: net.apply(v, X, TIMES, train=True, rngs={"dropout": key}))
    plain = apply(UNet(**TINY), variables, X, TIMES)
    np.testing.assert_array_equal(apply(net, variables, X, TIMES), plain)
    first, again, other = (train(variables, jax.random.key(i, impl="rbg")) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - plain).max() > 0.05
    assert np.abs(first - other).max() > 0.05


# Refused.


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"downsample": "pool"}, (1, 8, 8, 3), "downsample is 'pool'; accepted: conv, avg_pool, max_pool"),
        ({"upsample": "linear"}, (1, 8, 8, 3), "upsample is 'linear'; accepted: nearest, transposed"),
        ({"remat": "all"}, (1, 8, 8, 3), "remat is 'all'; accepted: none, norms, blocks"),
        ({"activation": "elu"}, (1, 8, 8, 3), "activation is 'elu'; accepted: swish, gelu, mish, relu"),
        ({"time_embedding": "fourier"}, (1, 8, 8, 3), "time_embedding is 'fourier'; accepted: sinusoids, learned"),
        ({"downsample_padding": "valid"}, (1, 8, 8, 3), "downsample_padding is 'valid'; accepted: same, symmetric"),
        ({"downsample_levels": ("pool",)}, (1, 8, 8, 3), "downsample_levels is 'pool'; accepted: conv"),
        ({"upsample_levels": ("nearest",) * 2}, (1, 8, 8, 3), "upsample_levels has 2 entries for 1 halvings"),
        ({"head_channels": 17}, (1, 8, 8, 3), "head_channels 17 is more than the 16 channels of a level"),
        ({"attention_levels": (True,)}, (1, 8, 8, 3), "attention_levels has 1 entries for 2 levels"),
        ({}, (8, 8, 3), r"x has shape \(8, 8, 3\); accepted: \[B, H, W, C\]"),
        ({}, (1, 8, 7, 3), "an image of 8x7 cannot be halved 1 times: .*divisible by 2"),
        (
            {"channel_multipliers": (1, 1, 1)},
            (1, 6, 8, 3),
            "an image of 6x8 cannot be halved 2 times: .*divisible by 4",
        ),
        ({"num_groups": 3}, (1, 8, 8, 3), "8 channels cannot be normalised in 3 groups"),
        ({"num_heads": 3}, (1, 8, 8, 3), "num_heads 3 does not divide the 16 channels"),
        ({"attention_patch_size": 3}, (1, 8, 8, 3), "attention_patch_size 3 does not divide a 4x4 level"),
    ],
)
def test_refused_options_and_images(options, shape, message):
    with pytest.raises(ValueError, match=message):
        init_shapes(UNet(**{**SMALL, **options}), np.zeros(shape))


def test_without_a_null_class_every_call_names_a_class():
    """Except for initialisation, whose values are the same with and without a class."""
    net = UNet(**TINY, num_classes=4, null_class=False)
    assert jax.tree.map(jnp.shape, init_shapes(net)) == jax.tree.map(
        jnp.shape, init_shapes(net, cond={"label": jnp.zeros(3, jnp.int32)})
    )
    variables = {"params": init_shapes(net)}
    with pytest.raises(ValueError, match="the network has no null class; name a class for every image"):
        jax.eval_shape(lambda v: net.apply(v, X, TIMES), variables)


def test_a_learned_time_embedding_has_no_fractions():
    net = UNet(**TINY, time_embedding="learned", num_timesteps=1000)
    with pytest.raises(ValueError, match="t is float32, but the network's time embedding is learned"):
        jax.eval_shape(lambda: net.init(KEY, X, TIMES.astype(jnp.float32)))


@pytest.mark.parametrize("t", [0, [0, 1], [[0]]])
def test_refused_timesteps(t):
    net = UNet(**SMALL)
    with pytest.raises(ValueError, match=r"t has shape .*; accepted: \(1,\), one entry per image"):
        jax.eval_shape(lambda: net.init(KEY, X[:1], jnp.array(t)))


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        ({"text": jnp.zeros((3, 4))}, "cond has 'text'; accepted: label, vector, image, tokens"),
        ({"label": jnp.zeros(3, jnp.int32)}, "cond has 'label', but the network has no classes"),
    ],
)
def test_refused_conditions(cond, message):
    with pytest.raises(ValueError, match=message):
        init_shapes(UNet(**SMALL), X, cond)


@pytest.mark.parametrize(
    ("options", "cond", "message"),
    [
        ({"cross_attention": "joint"}, {}, "cond has no 'tokens', which cross_attention 'joint' needs"),
        ({"cross_attention": "both"}, {}, "cross_attention is 'both'; accepted: separate, joint, alone"),
        ({"pooling_heads": 2}, {}, "cond has no 'tokens', which pooling_heads 2 needs"),
        ({"token_channels": 8}, {}, "cond has no 'tokens', which token_channels 8 needs"),
        ({"context_groups": 2}, {}, "context_groups is 2; accepted with cross_attention 'separate': 0"),
        (
            {"cross_attention": "joint", "transformer_depth": 1},
            {"tokens": jnp.zeros((3, 2, 4))},
            "cross_attention is 'joint'; accepted with a transformer_depth: 'separate'",
        ),
        ({}, {"level": jnp.zeros((3, 1))}, r"cond\['level'\] has shape \(3, 1\); accepted: \(3,\)"),
        ({"vector_embedding": "none"}, {"vector": jnp.zeros((3, 4))}, r"cond\['vector'\] has 4 channels; accepted: 32"),
        ({"level_res_blocks": (1, 2, 3)}, {}, r"level_res_blocks is \(1, 2, 3\); accepted: 1 or more for 2 levels"),
        ({"residual_scale": 0.0}, {}, "residual_scale is 0.0; accepted: above 0"),
        ({"time_activations": ("tanh",)}, {}, "time_activations is 'tanh'; accepted: swish"),
    ],
)
def test_refused_options_of_conditions(options, cond, message):
    with pytest.raises(ValueError, match=message):
        init_shapes(UNet(**{**SMALL, **options}), X, cond)


@pytest.mark.slow
def test_level_is_embedded_like_the_timestep():
    """Super-resolution networks take the picture's noise level; also checks level_res_blocks."""
    net = UNet(**SMALL, level_res_blocks=(1, 2))
    cond = {"image": normal(1, 3, 8, 8, 3), "level": jnp.array([0, 250, 999])}
    shapes = init_shapes(net, X, cond)
    assert {name for name in shapes if name.startswith("level")} == {"level_0", "level_1"}
    assert shapes["conv_in"]["kernel"].shape == (3, 3, 6, 8)
    assert {"down_1_1_res", "up_1_2_res"} <= shapes.keys()
    assert not {"down_0_1_res", "up_0_2_res"} & shapes.keys()
    variables = randomised(net, X, cond)
    found, other = (apply(net, variables, X, TIMES, cond | {"level": level}) for level in (cond["level"], TIMES[::-1]))
    assert np.abs(found - other)[0].max() > 1e-3
    # With the same weights for both, the level and t may be exchanged.
    params = variables["params"] | {f"level_{i}": variables["params"][f"time_{i}"] for i in range(2)}
    swapped = apply(net, {"params": params}, X, cond["level"], cond | {"level": TIMES})
    np.testing.assert_allclose(apply(net, {"params": params}, X, TIMES, cond), swapped, atol=1e-5)


@pytest.mark.slow
def test_spatial_transformers_take_the_place_of_attention():
    """The rest of the network is the same, and each attends to the tokens selected by the mask."""
    net, plain = UNet(**TINY, attention_levels=(True,), transformer_depth=2), UNet(**TINY, attention_levels=(True,))
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.standard_normal((3, 5, 6)), jnp.float32)
    cond = {"tokens": tokens, "tokens_mask": jnp.arange(5) < jnp.array([[5], [3], [1]])}
    shapes = init_shapes(net, X, cond)
    replaced = {name.removesuffix("_transformer") for name in shapes if name.endswith("_transformer")}
    assert replaced == {name.removesuffix("_attention") for name in init_shapes(plain, X, cond) if "_attention" in name}
    blocks = {name for name in shapes["middle_0_transformer"] if name.startswith("block_")}
    assert blocks == {"block_0", "block_1"}
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32), shapes)
    call = jax.jit(lambda cond: net.apply({"params": params}, X, TIMES, cond))
    output, others = call(cond), call({**cond, "tokens": tokens.at[:, 3:].add(1.0)})
    np.testing.assert_array_equal(output[1:], others[1:])
    assert np.abs(output[0] - others[0]).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "cond", "message"),
    [
        ({}, None, "cond has no 'tokens', which transformer_depth above 0 needs"),
        ({"attention_patch_size": 2}, {"tokens": jnp.zeros((3, 5, 6))}, "attention_patch_size is 2; accepted with"),
        (
            {"middle_attention_groups": 2},
            {"tokens": jnp.zeros((3, 5, 6))},
            "middle_attention_groups is 2; accepted with",
        ),
    ],
)
def test_spatial_transformers_need_tokens_and_refuse_what_they_do_not_read(options, cond, message):
    with pytest.raises(ValueError, match=message):
        init_shapes(UNet(**TINY, transformer_depth=1, **options), X, cond)
